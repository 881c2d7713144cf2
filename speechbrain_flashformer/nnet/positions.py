"""Positions and masks of tokens, computed once for all layers.

Axes: B batch, L frames, T tokens, C channels.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from speechbrain_flashformer.nnet.attention import Rows
from speechbrain_flashformer.nnet.rotary import RotaryAngles
from speechbrain_flashformer.nnet.window import stream_mask


class Positions(NamedTuple):
    """Token positions, as the attention of all layers takes them.

    Attributes
    ----------
    angles : tuple of torch.Tensor
        Cosines and sines, from ``rotary.RotaryAngles``.
    rows : attention.Rows, optional
        Valid tokens of a padded batch; by default all tokens are valid.
    visible : torch.Tensor, optional
        Additive attention mask of a stream's next tokens, from
        ``window.stream_mask``.
    """

    angles: tuple
    rows: Rows | None = None
    visible: torch.Tensor | None = None

    def excerpt(self, tokens):
        """Return the positions of a slice of the tokens, all valid."""
        return Positions(tuple(angle[tokens] for angle in self.angles))


class Places(nn.Module):
    """Computes the ``Positions`` that the layers of a network share.

    Arguments
    ---------
    head_width : int
        Channels of one attention head, even.
    token_stride : int
        Frames per token.
    left : int
        Tokens that attention sees to the left in a stream.

    Example
    -------
    >>> positions = Places(8, token_stride=4)(torch.randn(2, 5, 16))
    >>> positions.angles[0].shape
    torch.Size([5, 1, 8])
    """

    def __init__(self, head_width, token_stride=1, left=-1):
        super().__init__()
        self.rotary = RotaryAngles(head_width)
        self.token_stride, self.left = token_stride, left

    def forward(self, x, lengths=None, seen=None):
        """Compute the positions of tokens.

        Arguments
        ---------
        x : torch.Tensor
            The tokens, [B, T, C].
        lengths : torch.Tensor, optional
            Valid frames of each row, integers [B].
        seen : int or torch.Tensor, optional
            Tokens of the stream before x; None outside of streaming. A tensor
            [1] in an exported graph.

        Returns
        -------
        Positions
            Positions of the T tokens.
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
    """Check encoder output and its lengths; clamp the lengths to [1, L].

    Arguments
    ---------
    mix_w : torch.Tensor
        Encoder output, [B, N, L].
    lengths : torch.Tensor or None
        Valid frames of each row, integers [B].
    channels : int
        The N that the network was built for.

    Returns
    -------
    torch.Tensor or None
        The clamped lengths, [B].

    Raises
    ------
    ValueError
        If a shape or type does not match.
    """
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


def append_silence(mix_w, lengths, size):
    """Replace padded frames by silence, and append ``size`` frames of it.

    Arguments
    ---------
    mix_w : torch.Tensor
        Encoder output, [B, N, L].
    lengths : torch.Tensor or None
        Valid frames of each row, integers [B].
    size : int
        Frames to append: a causal network needs whole tokens and its lookahead
        after the last frame, and a stream ends the same way.

    Returns
    -------
    torch.Tensor
        [B, N, L + size].

    Example
    -------
    >>> append_silence(torch.ones(1, 1, 3), torch.tensor([2]), 1)
    tensor([[[1., 1., 0., 0.]]])
    """
    mask = length_mask(lengths, mix_w.shape[2], mix_w.device)
    return F.pad(mix_w if mask is None else mix_w * mask.mT, (0, size))


def length_mask(lengths, size, device):
    """Mask of valid frames.

    Arguments
    ---------
    lengths : torch.Tensor or None
        Valid frames of each row, [B].
    size : int
        L, frames with padding.
    device : torch.device
        Device of the result.

    Returns
    -------
    torch.Tensor or None
        Booleans, [B, L, 1], True at valid frames; None for lengths None.

    Example
    -------
    >>> length_mask(torch.tensor([1, 3]), 3, "cpu").squeeze(2).tolist()
    [[True, False, False], [True, True, True]]
    """
    if lengths is None:
        return None
    places = torch.arange(size, device=lengths.device)
    return (places < lengths[:, None]).unsqueeze(2).to(device)


def begun_mask(x, seen, late):
    """Mask the first tokens of a stream, which only fill the delay.

    The memories of the decoder must start with the first frame of the stream,
    and not with the zeros of ``layers.Delay``.

    Arguments
    ---------
    x : torch.Tensor
        Tokens, [B, T, C].
    seen : int or torch.Tensor or None
        Tokens of the stream before x; None is 0.
    late : int
        Lookahead in tokens.

    Returns
    -------
    torch.Tensor or None
        Booleans, [1, T, 1], False at the first ``late`` tokens of the stream;
        None if x has none of them.

    Example
    -------
    >>> begun_mask(torch.zeros(1, 3, 8), seen=1, late=2).flatten().tolist()
    [False, True, True]
    """
    seen = 0 if seen is None else seen
    if not late or (not isinstance(seen, torch.Tensor) and seen >= late):
        return None
    place = torch.arange(x.shape[1], device=x.device) + seen
    return (place >= late)[None, :, None]


def receptive_field(masknet):
    """Frames to the (left, right) that a mask depends on.

    Frames outside of the field act on the mask only through the statistics of
    the input norm.

    Arguments
    ---------
    masknet : FlashFormer
        The network.

    Returns
    -------
    tuple of int
        Frames to the left and right; -1 means unbounded.
    """
    sides = []
    for side, tokens in enumerate((0, masknet.future_tokens)):
        windows = [layer.attention.window[side] for layer in masknet.layers]
        tokens += sum(windows)
        tokens += sum(x.fsmn.receptive_field[side] for x in masknet.layers)
        # A frame depends on all frames of its own token.
        frames = (tokens + 1) * masknet.token_stride - 1
        # One FSMN block per rate in the encoder, and one in the decoder.
        for i, block in enumerate(masknet.down):
            frames += 2 * block.receptive_field[side] * 2**i
        sides.append(-1 if min(windows) < 0 else frames)
    return tuple(sides)
