"""Where the tokens are, and which of them count: once for all layers.

Axes: B batch, L frames, T tokens, C channels.
"""

from typing import NamedTuple

import torch
import torch.nn as nn

from speechbrain_flashformer.nnet.attention import Rows
from speechbrain_flashformer.nnet.rotary import RotaryAngles
from speechbrain_flashformer.nnet.window import stream_mask


class Positions(NamedTuple):
    """What attention knows of the places of tokens, once for all layers.

    Attributes
    ----------
    angles : tuple of torch.Tensor
        From ``rotary.RotaryAngles``.
    rows : attention.Rows, optional
        The tokens that count; all by default.
    visible : torch.Tensor, optional
        Of the next n tokens of a stream, from ``window.stream_mask``.
    """

    angles: tuple
    rows: Rows | None = None
    visible: torch.Tensor | None = None


class Places(nn.Module):
    """Makes the ``Positions`` of a network's layers.

    Arguments
    ---------
    head_width : int
        Of the attention.
    token_stride : int
        Frames per token.
    left : int
        Tokens that a stream's attention sees to the left.
    """

    def __init__(self, head_width, token_stride=1, left=-1):
        super().__init__()
        self.rotary = RotaryAngles(head_width)
        self.token_stride, self.left = token_stride, left

    def forward(self, x, lengths=None, seen=None):
        """Positions of tokens.

        Arguments
        ---------
        x : torch.Tensor
            The tokens, [B, T, C].
        lengths : torch.Tensor, optional
            Frames that count in each row, [B].
        seen : int or torch.Tensor, optional
            Tokens of the stream before these.
        """
        T, rows = x.shape[1], None
        if seen is not None:
            visible = stream_mask(T, self.left, seen, x)
            return Positions(self.rotary(T, seen), visible=visible)
        if lengths is not None:
            tokens = (lengths + self.token_stride - 1) // self.token_stride
            rows = Rows.of(tokens, T, x.device)
        return Positions(self.rotary(T), rows)


def check_frames(mix_w, lengths, channels):
    """Lengths [B] from 1 to L, or None, if they and [B, N, L] are such."""
    shape = tuple(mix_w.shape)
    if len(shape) != 3 or shape[1] != channels or 0 in shape:
        raise ValueError(
            f"FlashFormer takes [batch, {channels}, frames], one or more of "
            f"each, got {shape}"
        )
    if lengths is None:
        return None
    if lengths.shape != mix_w.shape[:1] or lengths.is_floating_point():
        raise ValueError(
            f"lengths must be [{shape[0]}], whole numbers of frames, got "
            f"{lengths.dtype} {tuple(lengths.shape)}"
        )
    return lengths.clamp(1, shape[2])


def length_mask(lengths, size, device):
    """True below each length [B], [B, size, 1]; None if all count."""
    if lengths is None:
        return None
    places = torch.arange(size, device=lengths.device)
    return (places < lengths[:, None]).unsqueeze(2).to(device)


def begun_mask(x, seen, late):
    """False at the first ``late`` tokens of a stream, [1, T, 1], or None.

    x [B, T, C] are those after the ``seen`` ones. The memories on the way up
    begin with the first frame of the stream, not with what fills the delay.
    """
    begin = 0 if seen is None else seen
    if not late or (not isinstance(begin, torch.Tensor) and begin >= late):
        return None
    place = torch.arange(x.shape[1], device=x.device) + begin
    return (place >= late)[None, :, None]


def receptive_field(masknet):
    """Frames to the (left, right) that an output depends on; -1: all.

    Of a ``FlashFormer``. Beyond them only the statistics of the input norm
    matter.
    """
    sides = []
    for side, tokens in enumerate((0, masknet.future_tokens)):
        windows = [layer.attention.window[side] for layer in masknet.layers]
        tokens += sum(windows)
        tokens += sum(x.fsmn.receptive_field[side] for x in masknet.layers)
        # A frame sees all frames of its own token.
        frames = (tokens + 1) * masknet.token_stride - 1
        # One FSMN block per rate on the way down and one on the way up.
        for i, block in enumerate(masknet.down):
            frames += 2 * block.receptive_field[side] * 2**i
        sides.append(-1 if min(windows) < 0 else frames)
    return tuple(sides)
