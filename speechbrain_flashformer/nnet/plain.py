"""SpeechBrain's encoder and decoder of ``dual_path``, without SpeechBrain.

The same weights under the same names and the same results: its import takes
longer than separating a short recording.

Axes: B batch, T samples, N encoder channels, L frames.
"""

import torch.nn as nn


class Encoder(nn.Module):
    """One convolution and a ReLU, [B, T] -> [B, N, L].

    Arguments
    ---------
    kernel_size : int
        Samples of a filter; frames are half of it apart.
    out_channels : int
        N.
    in_channels : int
        1, as SpeechBrain's has it.

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
        """Encode mixtures [B, T]."""
        return self.conv1d(x.unsqueeze(1)).relu()


class Decoder(nn.ConvTranspose1d):
    """One transposed convolution, [B, N, L] -> [B, T].

    Example
    -------
    >>> import torch
    >>> decoder = Decoder(64, 1, kernel_size=16, stride=8, bias=False)
    >>> decoder(torch.rand(2, 64, 99)).shape
    torch.Size([2, 800])
    """

    def forward(self, x):
        """Decode frames [B, N, L]."""
        return super().forward(x).squeeze(1)
