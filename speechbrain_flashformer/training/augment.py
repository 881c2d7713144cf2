"""Changes to a training batch, by the names of SpeechBrain's recipes.

Axes: B batch, T samples, S speakers.
"""

import torch
from speechbrain.dataio.batch import PaddedData


def augment(batch, hparams):
    """Change the signals of a training batch in place.

    The mixture keeps what is not its sources: noise stays in noisy data.

    Arguments
    ---------
    batch : PaddedBatch
        With ``mix_sig`` and ``s1_sig`` to ``sS_sig``, [B, T] each.
    hparams : SimpleNamespace
        What is not there is off. ``use_speedperturb``: ``speed_perturb``
        changes mixture and sources alike, unless ``dynamic_mixing`` has
        changed the sources already. ``use_rand_shift``: every source is moved
        around by ``min_shift`` to ``max_shift`` samples. ``use_wavedrop``:
        ``drop_freq`` and ``drop_chunk`` take pieces out of the mixture.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> from speechbrain.dataio.batch import PaddedBatch
    >>> s1, s2 = torch.randn(2, 100)
    >>> item = {"mix_sig": s1 + s2, "s1_sig": s1, "s2_sig": s2}
    >>> batch = PaddedBatch([item])
    >>> hparams = SimpleNamespace(
    ...     num_spks=2, use_rand_shift=True, min_shift=5, max_shift=5
    ... )
    >>> augment(batch, hparams)
    >>> torch.equal(batch.s1_sig.data[0], s1.roll(5))
    True
    """

    def _on(name):
        return getattr(hparams, name, False)

    names = ["mix_sig"] + [f"s{i + 1}_sig" for i in range(hparams.num_spks)]
    lengths = batch.mix_sig.lengths
    signals = torch.stack([getattr(batch, name).data for name in names])
    if _on("use_speedperturb") and not _on("dynamic_mixing"):
        # One draw for all of them: they stay a mixture and its sources.
        wide = signals.flatten(0, 1)
        signals = hparams.speed_perturb(wide).unflatten(0, signals.shape[:2])
    if _on("use_rand_shift"):
        signals = _shift(signals, lengths, hparams)
    mixture = signals[0]
    if _on("use_wavedrop"):
        mixture = hparams.drop_freq(mixture)
        mixture = hparams.drop_chunk(mixture, lengths)
    for name, signal in zip(names, [mixture, *signals[1:]]):
        setattr(batch, name, PaddedData(signal, lengths))


def _shift(signals, lengths, hparams):
    """Roll each source [1 + S, B, T] inside its length, and the mixture."""
    mixture, sources = signals[0], signals[1:]
    S, B, T = sources.shape
    shifts = torch.randint(hparams.min_shift, hparams.max_shift + 1, (S, B, 1))
    samples = (lengths * T).round().long().clamp(min=1)[:, None]
    place = torch.arange(T, device=signals.device)
    index = (place - shifts.to(signals.device)) % samples
    index = torch.where(place < samples, index, place)
    moved = sources.gather(2, index)
    rest = mixture - sources.sum(0)
    return torch.cat([(rest + moved.sum(0))[None], moved])
