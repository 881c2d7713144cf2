"""Encoder and decoder initialized as a Fourier transform and its inverse.

SpeechBrain initializes its encoder and decoder at random. These have weights of
the same names and shapes, but initially the decoder inverts the encoder: masks
of 1 return the mixture, except for half a filter at both ends. The filters
remain trainable (arXiv:1910.10400 compares trained and fixed filterbanks).

Axes: B batch, N encoder channels, K samples of a filter, L frames.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from speechbrain_flashformer.nnet import plain


def fourier_filters(channels, kernel_size):
    """Windowed rows of a Fourier transform, and their negatives.

    Each filter comes with its negative, because the ReLU of the encoder removes
    half of a signal: the difference of the two outputs is linear. Encoder and
    decoder both apply the square root of a Hann window, so that frames with a
    stride of K / 2 sum to the signal.

    Arguments
    ---------
    channels : int
        N, a multiple of 4 and at least 2 K. There are N / 4 frequencies, the
        centers of equal bands from 0 to half the sampling rate. Each has a
        cosine, a sine and the negatives of both.
    kernel_size : int
        K, samples per filter, even.

    Returns
    -------
    torch.Tensor
        [N, 1, K], scaled for use in both the encoder and the decoder.

    Raises
    ------
    ValueError
        If N or K does not meet these conditions.

    Example
    -------
    >>> filters = fourier_filters(64, 16).squeeze(1)
    >>> frame = torch.rand(16) - 0.5
    >>> back = (filters @ frame).relu() @ filters
    >>> torch.allclose(back, frame * torch.hann_window(16), atol=1e-6)
    True
    """
    if kernel_size % 2:
        raise ValueError(
            "kernel_size: filters that overlap by half have an even number of "
            f"samples, got {kernel_size}"
        )
    if channels % 4 or channels < 2 * kernel_size:
        raise ValueError(
            f"N_encoder_out: with kernel_size {kernel_size} the Fourier "
            f"transform takes a multiple of 4, at least {2 * kernel_size}; got "
            f"{channels}"
        )
    count = channels // 4
    frequencies = (torch.arange(count) + 0.5) / (2 * count)  # / rate
    time = torch.arange(kernel_size) - (kernel_size - 1) / 2
    angles = 2 * math.pi * frequencies[:, None] * time
    half = torch.cat([angles.cos(), angles.sin()]) / math.sqrt(count)
    half = half * torch.hann_window(kernel_size).sqrt()
    return torch.cat([half, -half]).unsqueeze(1)


class _Analysis(nn.Conv1d):
    """A Conv1d whose reset restores the Fourier initialization."""

    def reset_parameters(self):
        """Initialize; called by the constructor, and by recipes on reset."""
        with torch.no_grad():
            filters = fourier_filters(self.out_channels, *self.kernel_size)
            self.weight.copy_(filters)


class Encoder(plain.Encoder):
    """SpeechBrain's encoder, initialized as a Fourier transform.

    Arguments
    ---------
    kernel_size : int
        Samples per filter; the stride is half of it.
    out_channels : int
        As ``channels`` of ``fourier_filters``.

    Example
    -------
    >>> encoder = Encoder(kernel_size=16, out_channels=64)
    >>> decoder = Decoder(64, 1, kernel_size=16, stride=8, bias=False)
    >>> mixture = torch.rand(1, 800) - 0.5
    >>> mix_w = encoder(mixture)  # [B, N, L]
    >>> mix_w.shape
    torch.Size([1, 64, 99])
    >>> back = decoder(mix_w)
    >>> torch.allclose(back[:, 8:-8], mixture[:, 8:-8], atol=1e-6)
    True
    """

    def __init__(self, kernel_size, out_channels):
        super().__init__(kernel_size=kernel_size, out_channels=out_channels)
        self.conv1d = _Analysis(
            1,
            out_channels,
            kernel_size,
            stride=kernel_size // 2,
            bias=False,
        )


class Decoder(plain.Decoder):
    """SpeechBrain's decoder, initialized as the inverse of ``Encoder``.

    Arguments are those of ``torch.nn.ConvTranspose1d``; ``in_channels`` as
    ``channels`` of ``fourier_filters``. It inverts the encoder only if the
    stride is half the kernel size. In this case it runs as a matrix product and
    a sum, which on CPU is ten times as fast as torch's kernel.

    Example
    -------
    >>> Decoder(64, 1, kernel_size=16, stride=8, bias=False).weight.shape
    torch.Size([64, 1, 16])
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        halved = nn.ConvTranspose1d(
            self.in_channels, 1, *self.kernel_size, self.kernel_size[0] // 2
        )
        names = ("out_channels", "kernel_size", "stride", "padding", "dilation")
        names += ("output_padding", "groups")
        self.halves = all(
            getattr(self, name) == getattr(halved, name) for name in names
        )

    def forward(self, x):
        """Decode frames [B, N, L] to samples [B, T]."""
        if not self.halves or x.ndim != 3:
            return super().forward(x)
        frames = torch.matmul(x.transpose(1, 2), self.weight.squeeze(1))
        early, late = frames.chunk(2, 2)
        samples = F.pad(early, (0, 0, 0, 1)) + F.pad(late, (0, 0, 1, 0))
        samples = samples.flatten(1)
        return samples if self.bias is None else samples + self.bias

    def reset_parameters(self):
        """Initialize; called by the constructor, and by recipes on reset."""
        with torch.no_grad():
            filters = fourier_filters(self.in_channels, *self.kernel_size)
            self.weight.copy_(filters)
            if self.bias is not None:
                self.bias.zero_()
