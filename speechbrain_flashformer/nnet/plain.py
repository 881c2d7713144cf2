"""Encoder and decoder of SpeechBrain's ``dual_path``, without SpeechBrain.

Weights, their names and the results are the same. Importing SpeechBrain takes
longer than separating a short recording.

Axes: B batch, T samples, N encoder channels, L frames.
"""

import torch.nn as nn


class Encoder(nn.Module):
    """One convolution and a ReLU, [B, T] -> [B, N, L].

    Arguments
    ---------
    kernel_size : int
        Samples per filter; the stride is half of it.
    out_channels : int
        N.
    in_channels : int
        1; present for compatibility with SpeechBrain.

    Example
    -------
    >>> import torch
    >>> Encoder(kernel_size=16, out_channels=64)(torch.rand(2, 800)).shape
    torch.Size([2, 64, 99])
    """

    def __init__(self, kernel_size=2, out_channels=64, in_channels=1):
        super().__init__()
        self.conv1d = nn.Conv1d(
            in_channels,
            out_channels,
            kernel_size,
            stride=kernel_size // 2,
            bias=False,
        )

    def forward(self, x):
        """Encode mixtures [B, T] to frames [B, N, L]."""
        return self.conv1d(x.unsqueeze(1)).relu()


class Decoder(nn.ConvTranspose1d):
    """One transposed convolution, [B, N, L] -> [B, T].

    Arguments are those of ``torch.nn.ConvTranspose1d``; out_channels is 1.

    Example
    -------
    >>> import torch
    >>> decoder = Decoder(64, 1, kernel_size=16, stride=8, bias=False)
    >>> decoder(torch.rand(2, 64, 99)).shape
    torch.Size([2, 800])
    """

    def forward(self, x):
        """Decode frames [B, N, L] to samples [B, T]."""
        return super().forward(x).squeeze(1)
