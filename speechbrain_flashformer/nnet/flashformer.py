"""FlashFormer: a mask network that attends at a low rate and remembers long.

A U over time: frames are downsampled two by two (an FSMN block at each rate),
attention runs on the tokens at the lowest rate, and the way up restores the
frames with skips. Nearly all arithmetic happens where a token is
``token_stride`` frames.

Axes: B batch, N encoder channels, L frames, T tokens, C channels, S speakers.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from speechbrain_flashformer.nnet.attention import (
    check_backend,
    check_window,
    stream_mask,
)
from speechbrain_flashformer.nnet.fsmn import GatedFSMN
from speechbrain_flashformer.nnet.layers import (
    FlashFormerLayer,
    Positions,
    TransposedLinear,
)
from speechbrain_flashformer.nnet.norm import CumulativeNorm, GlobalNorm
from speechbrain_flashformer.nnet.rotary import RotaryAngles

# Most tokens of a stream that run at once, half a second at 125 a second: what
# the layers hold is bounded however long a block is.
MOST_TOKENS = 64


class FlashFormer(nn.Module):
    """Mask network for SpeechBrain separation recipes.

    Drop-in for SepFormer's ``Dual_Path_Model``: encoder output in, one
    non-negative mask per speaker out.

    Arguments
    ---------
    in_channels : int
        N, channels of the encoder.
    num_spks : int
        S, masks to estimate; 1 for enhancement.
    d_model : int
        Width of the tokens.
    num_layers : int
        FlashFormer layers at the token rate.
    nhead : int
        Attention heads; d_model / nhead must be a whole even number.
    d_ffn : int
        Inner width of the feed-forward parts.
    d_frame : int
        Width at the frame rate; it grows to d_model, by the same factor at
        each downsampling. Not used when token_stride is 1.
    token_stride : int
        Frames per token, a power of two. 1 is attention over every frame.
    window : tuple of int, optional
        Tokens that attention sees to the (left, right); -1 is unbounded, None
        is both unbounded.
    lookback : int
        FSMN taps on the past, at every rate.
    lookahead : int
        FSMN taps on the future.
    dilations : sequence of int
        Dilations of the FSMN at the token rate; at the others it is 1.
    dropout : float
        On the residual branches at the token rate (never on the attention
        weights, for which CPU kernels have no dropout).
    attention_backend : str
        As in ``attention.attend``.
    checkpointing : bool
        Recompute each layer in the backward pass to save memory.
    causal : bool
        Nothing is heard beyond the token that a frame is in: the right side of
        the window and lookahead are 0, the input norm is over the past.
    future_tokens : int
        Tokens beyond its own that a causal network hears before it answers.
    norm_span : int, optional
        Frames that the input norm of a causal network remembers; by default
        those of 500 tokens.

    Example
    -------
    >>> masknet = FlashFormer(in_channels=32, d_model=64, num_layers=1)
    >>> masknet(torch.rand(1, 32, 101)).shape
    torch.Size([2, 1, 32, 101])
    """

    def __init__(
        self,
        in_channels=256,
        num_spks=2,
        d_model=256,
        num_layers=6,
        nhead=4,
        d_ffn=512,
        d_frame=64,
        token_stride=8,
        window=(250, 250),
        lookback=20,
        lookahead=20,
        dilations=(1, 2),
        dropout=0.0,
        attention_backend="auto",
        checkpointing=False,
        causal=False,
        future_tokens=0,
        norm_span=None,
    ):
        super().__init__()
        check_backend(attention_backend)
        window = (-1, -1) if window is None else window
        check_window(window)
        if future_tokens < 0 or (future_tokens and not causal):
            raise ValueError(
                "future_tokens is 0 or more, and 0 unless causal, got "
                f"{future_tokens}"
            )
        if causal:
            window, lookahead = (window[0], 0), 0
        if norm_span is None:
            norm_span = 500 * max(token_stride, 1)
        counts = {
            "in_channels": in_channels,
            "num_spks": num_spks,
            "d_model": d_model,
            "num_layers": num_layers,
            "nhead": nhead,
            "d_ffn": d_ffn,
            "d_frame": d_frame,
            "norm_span": norm_span,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be 1 or more, got {count}")
        if d_model % nhead:
            raise ValueError(
                f"d_model {d_model} is not divisible by nhead {nhead}"
            )
        steps = max(token_stride, 1).bit_length() - 1
        if token_stride != 2**steps:
            raise ValueError(
                f"token_stride must be a power of two, got {token_stride}"
            )
        self.in_channels, self.num_spks = in_channels, num_spks
        self.token_stride = token_stride
        self.rotary = RotaryAngles(d_model // nhead)
        self.checkpointing = checkpointing
        self.causal, self.future_tokens = causal, future_tokens

        # Widths at each rate, from frames to tokens; those between in
        # multiples of 16, which kernels like.
        growth = (d_model / d_frame) ** (1 / max(steps, 1))
        between = (d_frame * growth**i for i in range(1, steps))
        widths = [16 * max(1, round(width / 16)) for width in between]
        widths = [*([d_frame] if steps else []), *widths, d_model]
        self.frame_widths, self.ratio = widths[:-1], 2

        def _frame_block(width):
            return GatedFSMN(width, width, lookback, lookahead)

        pairs = list(zip(widths, widths[1:]))
        if causal:
            self.norm_in = CumulativeNorm(in_channels, norm_span)
        else:
            self.norm_in = GlobalNorm(in_channels)
        self.project = nn.Linear(in_channels, widths[0])
        self.down = nn.ModuleList(_frame_block(width) for width in widths[:-1])
        self.merge = nn.ModuleList(nn.Linear(2 * a, b) for a, b in pairs)
        self.layers = nn.ModuleList(
            FlashFormerLayer(
                d_model,
                nhead,
                d_ffn,
                window,
                lookback,
                lookahead,
                dilations,
                dropout,
                attention_backend,
            )
            for _ in range(num_layers)
        )
        self.split = nn.ModuleList(nn.Linear(b, 2 * a) for a, b in pairs)
        self.up = nn.ModuleList(_frame_block(width) for width in widths[:-1])
        self.norm_out = nn.LayerNorm(widths[0])
        self.masks = TransposedLinear(widths[0], num_spks * in_channels)
        # What a streaming context must agree with.
        shapes = [tuple(p.shape) for p in self.parameters()]
        others = (window, token_stride, future_tokens, nhead, list(dilations))
        others += (norm_span,)
        self.signature = str((shapes, *others))

    def forward(self, mix_w, lengths=None, statistics=None):
        """Estimate the masks.

        Arguments
        ---------
        mix_w : torch.Tensor
            Encoder output, [B, N, L], L >= 1.
        lengths : torch.Tensor, optional
            Valid part of each row relative to L, in (0, 1], [B]. Padded
            frames then never change the others; their masks mean nothing.
        statistics : tuple of torch.Tensor, optional
            Mean and mean square [B] of the encoder output over the recordings
            that the rows are parts of; each row's own by default.

        Returns
        -------
        torch.Tensor
            Masks, [S, B, N, L], non-negative.

        Raises
        ------
        ValueError
            When mix_w is not [B, in_channels, L] with L >= 1, lengths does
            not fit it, or a causal network is given statistics.
        """
        self._check(mix_w)
        if not mix_w.numel():
            raise ValueError(
                f"FlashFormer takes [batch, {self.in_channels}, frames], one "
                f"or more of each, got {tuple(mix_w.shape)}"
            )
        L = mix_w.shape[2]
        frames = L if lengths is None else self._valid_frames(mix_w, lengths)
        delay = self.future_tokens * self.token_stride
        if self.causal:
            if statistics is not None:
                raise ValueError("a causal network takes no statistics")
            # Silence follows the end, as at the end of a stream.
            mask = frame_mask(frames, mix_w.transpose(1, 2))
            if mask is not None:
                mix_w = mix_w * mask.transpose(1, 2)
            mix_w = F.pad(mix_w, (0, -L % self.token_stride + delay))
            frames = mix_w.shape[2]
        masks = self.step(mix_w, frames, statistics)
        return masks[..., delay : delay + L]

    def step(self, mix_w, frames=None, statistics=None, context=None):
        """The way through the U, of whole recordings or of a stream.

        Arguments
        ---------
        mix_w : torch.Tensor
            [B, N, L]; of a stream L is a multiple of token_stride.
        frames : int or torch.Tensor, optional
            Valid frames, of all rows or of each [B]; all by default.
        statistics : tuple of torch.Tensor, optional
            As in ``forward``.
        context : dict, optional
            Of a stream, as in ``forward_streaming``. Its ``tokens`` may be a
            tensor [1], as in an exported graph.

        Returns
        -------
        torch.Tensor
            Masks [S, B, N, L], filled up to whole tokens. They lag by
            future_tokens: the first ones mean nothing.
        """
        x = mix_w.transpose(1, 2)
        if self.causal:
            x = self.norm_in(x, context and context["norm"])
        else:
            x = self.norm_in(x, frame_mask(frames, x), statistics)
        x = self.project(x)
        # An exported graph is for all lengths.
        if torch.compiler.is_exporting() or x.shape[1] % self.token_stride:
            x = F.pad(x, (0, 0, 0, -x.shape[1] % self.token_stride))
        x, frames, skips = self.descend(x, frames, context)
        x = self.attend(x, frames, context)
        return self.ascend(x, skips, context)

    def descend(self, x, frames, context=None):
        """Downsample frames [B, L, C] to tokens.

        Returns
        -------
        tuple
            Tokens [B, T, C]; how many of them are valid; and for each rate
            the frames that the way up adds, with their mask.
        """
        skips = []
        for i, (block, merge) in enumerate(zip(self.down, self.merge)):
            mask = frame_mask(frames, x)
            x = block(x, mask, context and context["down"][i])
            skips.append((self._delayed(x, i, context), mask))
            if mask is not None:
                x = x * mask
            x = merge(x.unflatten(1, (-1, self.ratio)).flatten(2))
            if frames is not None:
                frames = (frames + self.ratio - 1) // self.ratio
        return x, frames, skips

    def attend(self, x, frames, context=None):
        """Run all layers on tokens [B, T, C]."""
        positions, mask = self.place(x, frames, context)
        for i, layer in enumerate(self.layers):
            past = context and context["layers"][i]
            x = self.run_layer(layer, x, positions, mask, past)
        if context is not None:
            context["tokens"] = context["tokens"] + x.shape[1]
        return x

    def place(self, x, frames, context=None):
        """What the layers know of the tokens' places, and their mask."""
        n, seen = x.shape[1], 0 if context is None else context["tokens"]
        angles = self.rotary(n, seen)
        if context is not None:
            return Positions(
                angles, visible=stream_mask(n, self._left, seen, x)
            ), None
        rows = isinstance(frames, torch.Tensor) and frames.ndim
        lengths = frames if rows else None
        return Positions(angles, lengths), frame_mask(frames, x)

    def run_layer(self, layer, *arguments):
        """One layer; in training its inner values may be computed again."""
        if self.checkpointing and self.training:
            return checkpoint(layer, *arguments, use_reentrant=False)
        return layer(*arguments)

    def ascend(self, x, skips, context=None):
        """Upsample tokens [B, T, C] to the masks [S, B, N, L]."""
        late = self._late(x, context)
        for i in reversed(range(len(self.up))):
            skip, mask = skips[i]
            x = self.split[i](x).unflatten(2, (self.ratio, -1)).flatten(1, 2)
            if late is not None:
                late = mask = late.repeat_interleave(self.ratio, 1)
            x = self.up[i](x + skip, mask, context and context["up"][i])
        return self._masks(x)

    def _delayed(self, x, i, context):
        """Frames [B, L, C] as the way up meets them, future_tokens later."""
        if context is None:
            late = self.future_tokens * self.token_stride // 2**i
            return F.pad(x, (0, 0, late, 0))[:, : x.shape[1]] if late else x
        skip = torch.cat([context["skips"][i], x], 1)
        context["skips"][i] = skip[:, x.shape[1] :]
        return skip[:, : x.shape[1]]

    def _late(self, x, context):
        """0 at tokens that only fill the delay, [1, T, 1], or None.

        The memories on the way up begin with the first frame of the stream.
        """
        end = 0 if context is None else context["tokens"]
        begin = end - x.shape[1] if context is not None else 0
        if not self.future_tokens or (
            not isinstance(begin, torch.Tensor) and begin >= self.future_tokens
        ):
            return None
        place = torch.arange(x.shape[1], device=x.device) + begin
        return (place >= self.future_tokens).to(x.dtype)[None, :, None]

    def _masks(self, x):
        """The masks [S, B, N, L] that the last features x [B, L, C] say."""
        masks = self.masks(self.norm_out(x)).transpose(1, 2).relu()
        size = (self.num_spks, self.in_channels)
        return masks.unflatten(1, size).transpose(0, 1)

    # --- streaming ----------------------------------------------------------

    def make_streaming_context(self, batch_size=1):
        """The state of new streams, for ``forward_streaming``.

        A dict of tensors, numbers, lists and dicts of these, of fixed size but
        for the frames of a token that is not complete: it can be copied
        (``copy.deepcopy``) and saved (``torch.save``).

        Arguments
        ---------
        batch_size : int
            B, streams side by side.

        Raises
        ------
        ValueError
            When the network is not causal, its window is unbounded, or there
            is no stream.

        Example
        -------
        >>> masknet = FlashFormer(16, d_model=32, num_layers=1, causal=True)
        >>> context = masknet.make_streaming_context()
        >>> masknet.forward_streaming(torch.rand(1, 16, 10), context).shape
        torch.Size([2, 1, 16, 8])
        """
        if not self.can_stream:
            raise ValueError(
                "streaming needs causal: true and a window with a left side of "
                "0 or more"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        frames = self.norm_in.weight.new_zeros(batch_size, 0, self.in_channels)
        # Frames of each rate that wait for their future.
        late = self.future_tokens * self.token_stride
        skips = [
            frames.new_zeros(batch_size, late // 2**i, width)
            for i, width in enumerate(self.frame_widths)
        ]

        def _contexts(layers):
            return [x.make_streaming_context(frames) for x in layers]

        return {
            "network": self.signature,
            "batch_size": batch_size,
            "frames": frames.transpose(1, 2),  # of a token not complete yet
            "norm": self.norm_in.make_streaming_context(frames),
            "down": _contexts(self.down),
            "layers": _contexts(self.layers),
            "tokens": 0,  # so far
            "skips": skips,
            "up": _contexts(self.up),
        }

    @torch.no_grad()
    def forward_streaming(self, mix_w, context):
        """Masks of the frames that are ready: ``forward``, piece by piece.

        A stream ends with frames of zeros, until its last ones are ready. What
        is not finite is heard for as long as it is in the past of the norm, of
        the memories or of the attention (``StreamingSeparator`` silences it).

        Arguments
        ---------
        mix_w : torch.Tensor
            The next frames of the encoder, [B, N, n]; n may be 0.
        context : dict
            From ``make_streaming_context``; changed. It follows the network
            to another device.

        Returns
        -------
        torch.Tensor
            Masks of the next m frames, [S, B, N, m]. They lag by less than
            ``(1 + future_tokens) * token_stride`` frames.

        Raises
        ------
        ValueError
            When mix_w or the context does not fit.
        """
        self._check(mix_w)
        self._check_context(mix_w, context)
        frames = torch.cat([context["frames"], mix_w], 2)
        ready = frames.shape[2] - frames.shape[2] % self.token_stride
        context["frames"] = frames[:, :, ready:].clone()
        masks = [mix_w.new_zeros(self.num_spks, *mix_w.shape[:2], 0)]
        most = MOST_TOKENS * self.token_stride
        for start in range(0, ready, most):
            stop = min(start + most, ready)
            early = max(0, self.future_tokens - context["tokens"])
            piece = self.step(frames[:, :, start:stop], context=context)
            masks.append(piece[..., early * self.token_stride :])
        return masks[1] if len(masks) == 2 else torch.cat(masks, 3)

    @property
    def can_stream(self):
        """Whether ``forward_streaming`` can run: causal, a bounded window."""
        return self.causal and self._left >= 0

    @property
    def _left(self):
        return min(layer.attention.window[0] for layer in self.layers)

    # --- checks -------------------------------------------------------------

    def _check(self, mix_w):
        if mix_w.ndim != 3 or mix_w.shape[1] != self.in_channels:
            raise ValueError(
                f"FlashFormer takes [batch, {self.in_channels}, frames], got "
                f"{tuple(mix_w.shape)}"
            )

    def _check_context(self, mix_w, context):
        if context["network"] != self.signature:
            raise ValueError("this context was made by another network")
        if mix_w.shape[0] != context["batch_size"]:
            raise ValueError(
                f"the context is of {context['batch_size']} streams, got "
                f"{mix_w.shape[0]}"
            )
        weight = self.norm_in.weight
        for what in ("dtype", "device"):
            own, given = getattr(weight, what), getattr(mix_w, what)
            if own != given:
                raise ValueError(f"the network is {own}, got {given}")
        if context["frames"].dtype != weight.dtype:
            raise ValueError(
                f"the network is {weight.dtype}, its context "
                f"{context['frames'].dtype}"
            )
        if context["frames"].device != weight.device:
            context.update(move_context(context, weight.device))

    def _valid_frames(self, mix_w, lengths):
        """Frames that count in each row, integers [B]."""
        if lengths.shape != mix_w.shape[:1]:
            raise ValueError(
                f"lengths must be [{mix_w.shape[0]}], one per row, got "
                f"{tuple(lengths.shape)}"
            )
        frames = (lengths.to(mix_w.device) * mix_w.shape[2]).round().long()
        return frames.clamp(1, mix_w.shape[2])

    @property
    def receptive_field(self):
        """Frames to the (left, right) that an output depends on; -1: all.

        Beyond them only the statistics of the input norm matter.
        """
        sides = []
        for side in (0, 1):
            # One FSMN block per rate on the way down and one on the way up.
            frames = sum(
                2 * block.receptive_field[side] * 2**i
                for i, block in enumerate(self.down)
            )
            windows = [layer.attention.window[side] for layer in self.layers]
            tokens = sum(windows) + (self.future_tokens if side else 0)
            tokens += sum(
                layer.fsmn.receptive_field[side] for layer in self.layers
            )
            # A frame sees all frames of its own token.
            frames += (tokens + 1) * self.token_stride - 1
            sides.append(-1 if min(windows) < 0 else frames)
        return tuple(sides)


def move_context(context, device):
    """A copy of a stream's context with all of its tensors on a device."""
    return tree_map_only(torch.Tensor, lambda x: x.to(device), context)


def frame_mask(frames, x):
    """1 at valid frames and 0 at padded ones, [B, L, 1]; None if all count.

    frames is one number for all rows of x [B, L, C], a tensor [B], or None.
    """
    if frames is None:
        return None
    # Under torch.jit.trace a number is a tensor too, without axes.
    if isinstance(frames, torch.Tensor) and frames.ndim:
        place = torch.arange(x.shape[1], device=x.device)
        mask = place < frames[:, None]
    elif not torch.compiler.is_exporting() and frames == x.shape[1]:
        return None
    else:
        mask = torch.arange(x.shape[1], device=x.device)[None] < frames
    return mask.unsqueeze(2).to(x.dtype)
