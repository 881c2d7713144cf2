"""Rotary position embedding, exact on every device for any length.

Source: "RoFormer" (Su et al., arXiv:2104.09864).

Axes: B batch, T tokens, H heads, D head width.
"""

import math

import torch
import torch.nn as nn

# Phases are integers in units of 2^-40 turns. An hour of audio has 450,000
# positions, too many for a float32 phase, and some devices lack float64.
# Integer phases are exact: overflow of 64 bits only drops whole turns.
TURN = 2**40


class RotaryAngles(nn.Module):
    """Angles by which ``rotate`` turns queries and keys (RoFormer, eq. 15).

    Arguments
    ---------
    head_width : int
        D, even.
    base : float
        The longest wavelength is about ``2 pi base`` tokens.

    Raises
    ------
    ValueError
        If head_width is odd.

    Example
    -------
    >>> RotaryAngles(16)(10)[0].shape
    torch.Size([10, 1, 16])
    """

    def __init__(self, head_width, base=10000.0):
        super().__init__()
        if head_width % 2:
            raise ValueError(
                f"rotary positions need an even head width, got {head_width}"
            )
        steps = [
            round(TURN / math.tau * base ** (-i / head_width))
            for i in range(0, head_width, 2)
        ]
        self.register_buffer("steps", torch.tensor(steps), persistent=False)

    def forward(self, length, offset=0):
        """Compute the cosines and sines of consecutive positions.

        Arguments
        ---------
        length : int
            T, number of tokens.
        offset : int or torch.Tensor
            Position of the first token; a tensor [1] in an exported graph.

        Returns
        -------
        tuple of torch.Tensor
            Cosines and sines, float32, each [T, 1, D]. The first half of the
            sines is negated, as ``rotate`` needs it.
        """
        place = torch.arange(length, device=self.steps.device) + offset
        phases = (place[:, None, None] * self.steps) & (TURN - 1)
        angles = phases.float() * (math.tau / TURN)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], 2), torch.cat([-sin, sin], 2)


def rotate(x, angles):
    """Rotate the pairs (i, i + D / 2) of each head by the position's angle.

    Arguments
    ---------
    x : torch.Tensor
        Queries or keys, [B, T, H, D].
    angles : tuple of torch.Tensor
        From ``RotaryAngles``.

    Returns
    -------
    torch.Tensor
        [B, T, H, D], in the dtype of x.

    Example
    -------
    >>> x = torch.randn(2, 10, 4, 16)
    >>> turned = rotate(x, RotaryAngles(16)(10))
    >>> torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    True
    """
    cos, sin = (angle.to(x.dtype) for angle in angles)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
