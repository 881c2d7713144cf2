"""Separation metrics that ignore padding.

Axes: B batch, T samples, S speakers. Signals are [B, T, S], as in SpeechBrain's
recipes; lengths are relative to T, [B]. SI-SNR and SDR are in dB; higher is
better.

Sources: SI-SNR as in "SDR - half-baked or well done?" (Le Roux et al.,
arXiv:1811.02508, eq. 3, on signals of zero mean); SDR as in BSS Eval version 3
(Vincent et al., 2006), as in ``mir_eval.separation``.
"""

import importlib.util
import math
from itertools import permutations

import torch
from scipy.fft import next_fast_len

EPS = 1e-8


def padding_mask(signal, lengths=None):
    """Mask of valid samples.

    Arguments
    ---------
    signal : torch.Tensor
        [B, T, ...].
    lengths : torch.Tensor, optional
        Relative lengths, [B].

    Returns
    -------
    torch.Tensor
        [B, T, 1], 1 at valid samples and 0 at padding.

    Example
    -------
    >>> padding_mask(torch.zeros(2, 4), torch.tensor([1.0, 0.5]))[1, :, 0]
    tensor([1., 1., 0., 0.])
    """
    B, T = signal.shape[:2]
    if lengths is None:
        return torch.ones(B, T, 1, device=signal.device)
    ends = (lengths.to(signal.device) * T).round()
    place = torch.arange(T, device=signal.device)
    return (place < ends[:, None]).unsqueeze(2).float()


def si_snr(targets, predictions, lengths=None):
    """Scale-invariant signal-to-noise ratio of each source.

    Arguments
    ---------
    targets : torch.Tensor
        Clean sources, [B, T, S].
    predictions : torch.Tensor
        Their estimates, in the same order, [B, T, S].
    lengths : torch.Tensor, optional
        Relative lengths, [B].

    Returns
    -------
    torch.Tensor
        dB, [B, S].

    Example
    -------
    >>> x = torch.randn(1, 1000, 2)
    >>> (si_snr(x, 3 * x) > 60).all()
    tensor(True)
    """
    targets, predictions = _centered(lengths, targets, predictions)
    energy = targets.square().sum(1, keepdim=True)
    gain = (targets * predictions).sum(1, keepdim=True) / (energy + EPS)
    signal = gain * targets
    noise = predictions - signal
    ratio = signal.square().sum(1) / (noise.square().sum(1) + EPS)
    return 10 * torch.log10(ratio + EPS)


def _centered(lengths, *signals):
    """Subtract the mean of signals [B, T, S]; set padding to 0."""
    mask = padding_mask(signals[0], lengths)
    count = mask.sum(1, keepdim=True).clamp(min=1)
    signals = [x.float() * mask for x in signals]
    return [(x - x.sum(1, keepdim=True) / count) * mask for x in signals]


def best_order(targets, predictions, lengths=None):
    """Assign estimates to sources for the highest mean SI-SNR.

    Arguments
    ---------
    targets : torch.Tensor
        Clean sources, [B, T, S].
    predictions : torch.Tensor
        Estimates in any order, [B, T, S].
    lengths : torch.Tensor, optional
        Relative lengths, [B].

    Returns
    -------
    tuple of torch.Tensor
        SI-SNR in dB of each source with its estimate [B, S], and the index of
        that estimate [B, S].

    Raises
    ------
    ValueError
        If targets and predictions have different shapes.

    Example
    -------
    >>> x = torch.randn(1, 1000, 2)
    >>> best_order(x, x.flip(2))[1]
    tensor([[1, 0]])
    """
    check_shapes(targets, predictions)
    with torch.no_grad():
        # All pairs from one matrix product. It is precise enough for a choice,
        # up to about 60 dB. Only the best order needs a gradient.
        clean, separated = _centered(lengths, targets, predictions)
        products = clean.mT @ separated
        energy = clean.square().sum(1)[:, :, None]
        outputs = separated.square().sum(1)[:, None]
        signal = products.square() / (energy + EPS)
        noise = (outputs - signal).clamp(min=0)
        order = assignment((signal + EPS).log() - (noise + EPS).log())
    return si_snr(targets, reorder(predictions, order), lengths), order


def check_shapes(targets, predictions):
    """Raise a ValueError unless both tensors have the same shape."""
    if targets.shape != predictions.shape:
        raise ValueError(
            "sources and estimates must have one shape [B, T, S], got "
            f"{tuple(targets.shape)} and {tuple(predictions.shape)}"
        )


def assignment(scores):
    """Assign one estimate to each source, for the highest mean score.

    Arguments
    ---------
    scores : torch.Tensor
        Score of every source (rows) with every estimate (columns), [B, S, S].

    Returns
    -------
    torch.Tensor
        Index of the estimate of each source, [B, S].

    Example
    -------
    >>> assignment(torch.tensor([[[1.0, 9.0], [2.0, 3.0]]]))
    tensor([[1, 0]])
    """
    S = scores.shape[1]
    orders = torch.tensor(list(permutations(range(S))), device=scores.device)
    means = scores[:, torch.arange(S), orders].mean(2)  # [B, orders]
    return orders[means.argmax(1)]


def reorder(predictions, order):
    """Reorder estimates.

    Arguments
    ---------
    predictions : torch.Tensor
        Estimates, [B, T, S].
    order : torch.Tensor
        Indices of estimates, [B, S], as from ``best_order``.

    Returns
    -------
    torch.Tensor
        Estimates in the order of the sources, [B, T, S].

    Example
    -------
    >>> reorder(torch.tensor([[[1, 2]]]), torch.tensor([[1, 0]]))
    tensor([[[2, 1]]])
    """
    return predictions.gather(2, order[:, None].expand_as(predictions))


def sdr(target, estimate, filter_length=512):
    """Signal-to-distortion ratio, which allows a short filter of the target.

    Arguments
    ---------
    target : torch.Tensor
        Clean sources, [S, T].
    estimate : torch.Tensor
        Their estimates, in the same order, [..., S, T]; several sets of
        estimates cost little more than one.
    filter_length : int
        Taps of the allowed filter; 512 is the usual value.

    Returns
    -------
    torch.Tensor
        dB, float64, on the CPU, [..., S]; -80 for a silent estimate, like
        SI-SNR.

    Example
    -------
    >>> x = torch.randn(1, 4000)
    >>> (sdr(x, 0.5 * x.roll(3)) > 20).all()
    tensor(True)
    """
    # Not every device has float64.
    target, estimate = target.cpu().double(), estimate.cpu().double()
    taps = filter_length
    # Much faster than a length with a large prime factor.
    size = next_fast_len(target.shape[1] + taps - 1, real=True)
    spectrum = torch.fft.rfft(target, n=size)
    auto = torch.fft.irfft(spectrum.abs().square(), n=size)[:, :taps]
    cross = torch.fft.irfft(
        spectrum.conj() * torch.fft.rfft(estimate, n=size), n=size
    )[..., :taps]
    lag = torch.arange(taps)
    toeplitz = auto[:, (lag[:, None] - lag).abs()]
    # A silent or very narrow-band target makes the system singular.
    ridge = 1e-10 * auto[:, :1, None] + torch.finfo(torch.float64).tiny
    toeplitz = toeplitz + ridge * torch.eye(taps)
    # One factorization for all K estimates: [S, taps, K].
    columns = cross.reshape(-1, *auto.shape).permute(1, 2, 0)
    filters = torch.linalg.solve(toeplitz, columns)
    explained = (filters * columns).sum(1).T.reshape(cross.shape[:-1])
    energy = estimate.square().sum(-1)
    rest = energy - explained
    ratio = explained.clamp(min=EPS**2) / rest.clamp(min=EPS**2)
    return 10 * torch.log10(torch.where(energy > 0, ratio, EPS))


def perceptual(name, target, estimate, sample_rate):
    """Compute PESQ or STOI of each source.

    Arguments
    ---------
    name : str
        ``pesq`` (ITU-T P.862: narrowband at 8000 Hz, wideband at 16000 Hz) or
        ``stoi`` (Taal et al., 2011).
    target : torch.Tensor
        Clean sources, [S, T].
    estimate : torch.Tensor
        Their estimates, in the same order, [S, T].
    sample_rate : int
        Hz.

    Returns
    -------
    list of float
        S values; NaN where the metric finds no speech.

    Raises
    ------
    ImportError
        If the package of the metric is not installed.
    ValueError
        If the name is unknown, or PESQ is not defined at the sampling rate.

    Example
    -------
    >>> x = torch.randn(1, 8000)
    >>> round(perceptual("stoi", x, x, 8000)[0], 3)
    1.0
    """
    check_perceptual([name], sample_rate)
    pairs = zip(*(x.cpu().double().numpy() for x in (target, estimate)))
    if name == "stoi":
        from pystoi import stoi

        values = [float(stoi(x, y, sample_rate)) for x, y in pairs]
        # pystoi returns 1e-5, with a warning, if there is too little speech.
        return [math.nan if value == 1e-5 else value for value in values]
    from pesq import PesqError, pesq

    band = {8000: "nb", 16000: "wb"}[sample_rate]
    values = [
        pesq(sample_rate, x, y, band, on_error=PesqError.RETURN_VALUES)
        for x, y in pairs
    ]
    return [value if value > 0 else math.nan for value in values]


def check_perceptual(names, sample_rate):
    """Check the arguments of ``perceptual`` before any computation.

    Arguments
    ---------
    names : list of str
        Metrics.
    sample_rate : int
        Hz.

    Raises
    ------
    ImportError, ValueError
        As ``perceptual``.
    """
    packages = {"pesq": "pesq", "stoi": "pystoi"}
    for name in names:
        if name not in packages:
            raise ValueError(f"no measure {name!r}: there are pesq and stoi")
        if name == "pesq" and sample_rate not in (8000, 16000):
            raise ValueError(
                f"PESQ is defined at 8000 and 16000 Hz, not at {sample_rate}"
            )
        if importlib.util.find_spec(packages[name]) is None:
            raise ImportError(
                f"{name} needs the package {packages[name]}: pip install "
                "'speechbrain-flashformer[eval]'"
            )
