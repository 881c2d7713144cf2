"""Augmentation of a training batch, with the settings of SpeechBrain's recipes.

Axes: B batch, T samples, S speakers.
"""

import torch
from speechbrain.dataio.batch import PaddedData


def augment(batch, hparams):
    """Augment the signals of a training batch in place.

    The part of the mixture that is not in the sources, such as noise, remains.

    Arguments
    ---------
    batch : PaddedBatch
        With ``mix_sig`` and ``s1_sig`` to ``sS_sig``, [B, T] each.
    hparams : SimpleNamespace
        Settings; a missing switch is off. ``use_speedperturb``:
        ``speed_perturb`` changes mixture and sources together, unless
        ``dynamic_mixing`` has already changed the sources. ``use_rand_shift``:
        rolls each source by ``min_shift`` to ``max_shift`` samples.
        ``use_wavedrop``: ``drop_freq`` and ``drop_chunk`` remove frequencies
        and chunks from the mixture.

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
        # One call for all signals, so that all get the same speed and the
        # mixture remains the sum.
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
    """Roll the sources within their lengths, and update the mixture.

    The signals [1 + S, B, T] are the mixture and its sources.
    """
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
