"""Permutation-invariant separation losses that ignore padding.

All losses are called as ``loss(targets, predictions, lengths)``. They return
one value per mixture in dB; lower is better.

Axes: B batch, T samples, S speakers.

Source: permutation-invariant training (Yu et al., arXiv:1607.00325).
"""

import torch

from speechbrain_flashformer.training.metrics import (
    EPS,
    assignment,
    best_order,
    check_shapes,
    padding_mask,
    reorder,
)

# A source is silent if it has at most this share of the energy of all sources.
SILENT = 1e-6


def fixes_level(loss):
    """Whether a loss depends on the level of the estimates.

    Arguments
    ---------
    loss : callable
        A loss like those in this module.

    Returns
    -------
    bool
        False if louder estimates have the same loss.

    Example
    -------
    >>> fixes_level(pit_snr_loss), fixes_level(pit_si_snr_loss)
    (True, False)
    """
    time = torch.linspace(-9, 9, 200)[None, :, None]
    target, estimate = time.cos(), time.cos() + 0.3 * (3 * time).cos()
    plain, louder = (
        loss(target, x, torch.ones(1)) for x in (estimate, 2 * estimate)
    )
    return bool((louder - plain).abs() > 0.1)


def is_defined_for_silence(loss):
    """Whether a loss is defined for a silent source.

    If it is, a quieter estimate of that source has a lower loss.

    Arguments
    ---------
    loss : callable
        A loss like those in this module.

    Returns
    -------
    bool
        Whether it is defined.

    Example
    -------
    >>> is_defined_for_silence(pit_mixed_loss)
    True
    >>> is_defined_for_silence(pit_si_snr_loss)
    False
    """
    time = torch.linspace(-9, 9, 200)[None, :, None]
    sound, other = time.cos(), (3 * time).cos()
    targets = torch.cat([sound, 0 * sound], 2)
    quiet, loud = (
        loss(targets, torch.cat([sound, x * other], 2), torch.ones(1))
        for x in (0.1, 0.3)
    )
    return bool(loud - quiet > 0.1)


def pit_snr_loss(targets, predictions, lengths=None, limit_db=30.0):
    """Negative signal-to-noise ratio with a soft limit; defined for silence.

    ``10 log10(|s - e|^2 / |s|^2 + 10^(-limit_db / 10))`` for each source s and
    its estimate e. Beyond the limit the gradient is small. For a silent source,
    ``|s|^2`` is replaced by the energy of all sources, so that a silent
    estimate reaches the limit too. Unlike SI-SNR, this loss fixes the level and
    the polarity of the estimates.

    Source: Wisdom et al., "What's All the FUSS About Free Universal Sound
    Separation Data?" (arXiv:2011.00803, eq. 1 and 2), with the energy of the
    sources in place of that of the mixture.

    Arguments
    ---------
    targets : torch.Tensor
        Clean sources, [B, T, S]; a silent one is 0.
    predictions : torch.Tensor
        Estimates in any order, [B, T, S].
    lengths : torch.Tensor, optional
        Relative lengths, [B].
    limit_db : float
        Soft limit of the ratio, in dB.

    Returns
    -------
    torch.Tensor
        dB, [B], -limit_db or more.

    Raises
    ------
    ValueError
        If targets and predictions have different shapes.

    Example
    -------
    >>> speech, silence = torch.randn(1, 1000, 1), torch.zeros(1, 1000, 1)
    >>> targets = torch.cat([speech, silence], 2)
    >>> pit_snr_loss(targets, targets.flip(2))
    tensor([-30.])
    """
    check_shapes(targets, predictions)
    mask = padding_mask(targets, lengths)
    targets, predictions = targets.float() * mask, predictions.float() * mask
    energy = targets.square().sum(1)
    whole = energy.sum(1, keepdim=True)
    reference = torch.where(energy > SILENT * whole, energy, whole)
    reference = reference.clamp(min=EPS)
    floor = 10 ** (-limit_db / 10)
    with torch.no_grad():
        # |s - e|^2 of all pairs from one matrix product. Only the errors of the
        # best order, below, need a gradient.
        products = targets.mT @ predictions
        outputs = predictions.square().sum(1)
        errors = energy[:, :, None] + outputs[:, None] - 2 * products
        ratios = errors.clamp(min=0) / reference[:, :, None] + floor
        order = assignment(-ratios.log())
    errors = (targets - reorder(predictions, order)).square().sum(1)
    return 10 * torch.log10(errors / reference + floor).mean(1)


def pit_si_snr_loss(targets, predictions, lengths=None):
    """Negative SI-SNR, which ignores the level and polarity of estimates.

    SpeechBrain's ``get_si_snr_with_pitwrapper`` counts padding as signal; this
    loss does not. SI-SNR is undefined for a silent source: use
    ``pit_snr_loss``.

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
    torch.Tensor
        Negative SI-SNR in dB, [B].

    Raises
    ------
    ValueError
        If targets and predictions have different shapes.

    Example
    -------
    >>> pit_si_snr_loss(torch.randn(3, 50, 2), torch.randn(3, 50, 2)).shape
    torch.Size([3])
    """
    return -best_order(targets, predictions, lengths)[0].mean(1)


def pit_mixed_loss(targets, predictions, lengths=None):
    """``pit_snr_loss`` for mixtures with a silent source, else SI-SNR.

    SI-SNR is undefined for a silent source. SNR is defined, and it fixes the
    level of the estimates in these mixtures.

    Arguments
    ---------
    targets : torch.Tensor
        Clean sources, [B, T, S]; a silent one is 0.
    predictions : torch.Tensor
        Estimates in any order, [B, T, S].
    lengths : torch.Tensor, optional
        Relative lengths, [B].

    Returns
    -------
    torch.Tensor
        dB, [B].

    Raises
    ------
    ValueError
        If targets and predictions have different shapes.

    Example
    -------
    >>> targets = torch.randn(2, 1000, 2)
    >>> targets[1, :, 0] = 0
    >>> pit_mixed_loss(targets, targets)[1]
    tensor(-30.)
    """
    heard = targets.float() * padding_mask(targets, lengths)
    energy = heard.square().sum(1)
    silent = (energy <= SILENT * energy.sum(1, keepdim=True)).any(1)
    loss = predictions.new_zeros(len(targets), dtype=torch.float32)
    for which, part in ((silent, pit_snr_loss), (~silent, pit_si_snr_loss)):
        if which.any():
            some = lengths if lengths is None else lengths[which]
            value = part(targets[which], predictions[which], some)
            loss = loss.masked_scatter(which, value)
    return loss
