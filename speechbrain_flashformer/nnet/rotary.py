"""Rotary positions, exact on every device however long the recording.

Source: "RoFormer" (Su et al., arXiv:2104.09864).

Axes: B batch, T tokens, H heads, D head width.
"""

import math

import torch
import torch.nn as nn

# Phases are whole multiples of 2^-40 of a turn. An hour of audio has 450,000
# positions, too many for a phase in float32; float64 is not on every device.
# Whole numbers are exact, and those that wrap around 64 bits lose whole turns.
TURN = 2**40


class RotaryAngles(nn.Module):
    """Angles that ``rotate`` turns queries and keys by (RoFormer, eq. 15).

    Arguments
    ---------
    head_width : int
        D, even.
    base : float
        The longest wavelength is about ``2 pi base`` tokens.

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
        """Cosines and sines of the next positions.

        Arguments
        ---------
        length : int
            Number of tokens, T.
        offset : int or torch.Tensor
            Position of the first token; a tensor [1] in an exported graph.

        Returns
        -------
        tuple of torch.Tensor
            Cosines and sines, float32, each [T, 1, D]; the sines that the
            second half of a head is multiplied by are negative.
        """
        place = torch.arange(length, device=self.steps.device) + offset
        phases = (place[:, None, None] * self.steps) & (TURN - 1)
        angles = phases.float() * (math.tau / TURN)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], 2), torch.cat([-sin, sin], 2)


def rotate(x, angles):
    """Turn the pairs (i, i + D / 2) of each head by their position's angle.

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
