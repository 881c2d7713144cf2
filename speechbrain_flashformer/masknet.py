"""FlashFormer: a mask network that thinks at a low rate and remembers long.

Frames are merged two by two on the way down (an FSMN block at each rate),
attention runs on the tokens at the lowest rate, and the way up restores the
frames with skips: a U over time. Nearly all arithmetic happens where a token
is ``token_stride`` frames.

Axes: B batch, N encoder channels, L frames, T tokens, C channels, S speakers.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from speechbrain_flashformer.attention import (
    attend,
    attend_masked,
    check_backend,
    check_window,
    stream_mask,
)
from speechbrain_flashformer.fsmn import GatedFSMN
from speechbrain_flashformer.norm import CumulativeNorm, GlobalNorm
from speechbrain_flashformer.rotary import RotaryAngles, rotate

# Tokens that the input norm of a causal network remembers: 4 s at 125 a second.
NORM_TOKENS = 500
# Tokens that a stream runs at once: half a second at 125 a second. What the
# layers hold is bounded however long a block is.
PIECE = 64


class LayerScale(nn.Module):
    """A learned weight per channel on a residual branch.

    A bare parameter: recipes that reset every layer after construction call
    ``reset_parameters`` on each module, and would undo a small start written
    into a Linear. Source: CaiT (arXiv:2103.17239, eq. 1).
    """

    def __init__(self, channels, start):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), float(start)))

    def forward(self, x):
        """Scale the last axis of x, the channels."""
        return x * self.weight


class TransposedLinear(nn.Linear):
    """A Linear whose output [B, L, C] lies in memory as [B, C, L].

    So the decoder takes it; that of a Linear would have to be copied for it,
    which costs more than the product.
    """

    def forward(self, x):
        """Map the last axis of x [B, L, D]."""
        weight = self.weight.expand(x.shape[0], -1, -1)
        out = torch.baddbmm(self.bias[:, None], weight, x.transpose(1, 2))
        return out.transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions, [B, T, C] both ways.

    Arguments
    ---------
    d_model : int
        C, divisible by nhead, with an even C / nhead.
    nhead : int
        Attention heads.
    window : tuple of int
        Tokens seen to the (left, right); -1 is unbounded.
    backend : str
        As in ``attention.attend``.

    Example
    -------
    >>> layer = Attention(16, 2)
    >>> layer(torch.randn(2, 50, 16), RotaryAngles(8)(50)).shape
    torch.Size([2, 50, 16])
    """

    # Weights that are several matrices: an optimizer may take them apart.
    stacked = {"qkv": 3}

    def __init__(self, d_model, nhead, window=(-1, -1), backend="auto"):
        super().__init__()
        self.d_model, self.nhead = d_model, nhead
        self.window = tuple(window)
        self.backend = backend
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x, angles, lengths=None):
        """Attend over x [B, T, C]; lengths [B] are tokens that count."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.nhead, -1)).unbind(2)
        out = attend(
            rotate(q, angles),
            rotate(k, angles),
            v,
            window=self.window,
            backend=self.backend,
            lengths=lengths,
        )
        return self.out(out.flatten(2))

    def make_past(self, like):
        """What ``forward_streaming`` begins with; like is any [B, n, C]."""
        width = self.d_model // self.nhead
        shape = (like.shape[0], self.window[0], self.nhead, width)
        return [like.new_zeros(shape), like.new_zeros(shape)]

    def forward_streaming(self, x, angles, mask, past):
        """Attend from the next tokens x [B, n, C]; changes past.

        mask is from ``stream_mask``. torch's own kernel does it, whatever the
        backend: the others are no faster for so few queries.
        """
        n = x.shape[1]
        qkv = self.qkv(x).unflatten(2, (3, self.nhead, -1))
        q, k = rotate(qkv[:, :, :2].flatten(2, 3), angles).chunk(2, dim=2)
        k = torch.cat([past[0], k], 1)
        v = torch.cat([past[1], qkv[:, :, 2]], 1)
        past[:] = k[:, n:], v[:, n:]
        return self.out(attend_masked(q, k, v, mask).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU feed-forward (arXiv:2002.05202, eq. 6), [B, T, C] both ways."""

    stacked = {"expand": 2}

    def __init__(self, d_model, d_ffn):
        super().__init__()
        self.expand = nn.Linear(d_model, 2 * d_ffn)
        self.out = nn.Linear(d_ffn, d_model)

    def forward(self, x):
        """Run on x [B, T, C]."""
        gate, value = self.expand(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class FlashFormerLayer(nn.Module):
    """One module at the token rate: attention, gated FSMN, feed-forward.

    Arguments are those of ``FlashFormer``.

    Example
    -------
    >>> layer = FlashFormerLayer(16, nhead=2, d_ffn=32)
    >>> layer(torch.randn(2, 50, 16), RotaryAngles(8)(50)).shape
    torch.Size([2, 50, 16])
    """

    def __init__(
        self,
        d_model,
        nhead,
        d_ffn,
        window=(-1, -1),
        lookback=20,
        lookahead=20,
        dilations=(1,),
        dropout=0.0,
        backend="auto",
    ):
        super().__init__()
        self.norm_attention = nn.LayerNorm(d_model)
        self.attention = Attention(d_model, nhead, window, backend)
        self.scale_attention = LayerScale(d_model, 0.5)
        self.fsmn = GatedFSMN(
            d_model, d_model, lookback, lookahead, dilations, dropout
        )
        self.norm_ffn = nn.LayerNorm(d_model)
        self.ffn = FeedForward(d_model, d_ffn)
        self.scale_ffn = LayerScale(d_model, 0.5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, angles, lengths=None, keep=None):
        """Run on x [B, T, C]; see ``Attention`` and ``GatedFSMN``."""
        update = self.attention(self.norm_attention(x), angles, lengths)
        x = x + self.dropout(self.scale_attention(update))
        x = self.fsmn(x, keep)
        update = self.ffn(self.norm_ffn(x))
        return x + self.dropout(self.scale_ffn(update))

    def make_past(self, like):
        """What ``forward_streaming`` begins with; like is any [B, n, C]."""
        return {
            "attention": self.attention.make_past(like),
            "fsmn": self.fsmn.make_past(like),
        }

    def forward_streaming(self, x, angles, mask, past):
        """Run on the next tokens x [B, n, C]; changes past."""
        update = self.attention.forward_streaming(
            self.norm_attention(x), angles, mask, past["attention"]
        )
        x = x + self.scale_attention(update)
        x = self.fsmn.forward_streaming(x, past["fsmn"])
        return x + self.scale_ffn(self.ffn(self.norm_ffn(x)))


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
        FlashFormer modules at the token rate.
    nhead : int
        Attention heads; d_model / nhead must be a whole even number.
    d_ffn : int
        Inner width of the feed-forward parts.
    d_frame : int
        Width at the frame rate; it grows to d_model, by the same factor at
        each merge. Not used when token_stride is 1.
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
        Recompute each module in the backward pass to save memory.
    causal : bool
        Nothing is heard beyond the token that a frame is in: the right side of
        the window and lookahead are 0, the input norm is over the past.
    future_tokens : int
        Tokens beyond its own that a causal network hears before it answers.

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
        counts = {
            "in_channels": in_channels,
            "num_spks": num_spks,
            "d_model": d_model,
            "num_layers": num_layers,
            "nhead": nhead,
            "d_ffn": d_ffn,
            "d_frame": d_frame,
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
        self.frame_widths = widths[:-1]

        def _frame_block(width):
            return GatedFSMN(width, width, lookback, lookahead)

        pairs = list(zip(widths, widths[1:]))
        if causal:
            span = NORM_TOKENS * token_stride
            self.norm_in = CumulativeNorm(in_channels, span)
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
        _, N, L = mix_w.shape
        frames = L if lengths is None else self._valid_frames(mix_w, lengths)
        if self.causal:
            if statistics is not None:
                raise ValueError("a causal network takes no statistics")
            # Silence follows the end, as at the end of a stream.
            keep = _keep(frames, mix_w.transpose(1, 2))
            if keep is not None:
                mix_w = mix_w * keep.transpose(1, 2)
            more = self.future_tokens * self.token_stride
            mix_w = F.pad(mix_w, (0, -L % self.token_stride + more))
            frames, lengths = mix_w.shape[2], None
            x = self.norm_in(mix_w.transpose(1, 2))
        else:
            x = mix_w.transpose(1, 2)
            x = self.norm_in(x, _keep(frames, x), statistics)
        x = self.project(x)  # [B, L, C]
        # An exported graph is for all lengths.
        if torch.compiler.is_exporting() or x.shape[1] % self.token_stride:
            x = F.pad(x, (0, 0, 0, -x.shape[1] % self.token_stride))

        skips = []
        for block, merge in zip(self.down, self.merge):
            keep = _keep(frames, x)
            x = block(x, keep)
            skips.append((x, keep))
            if keep is not None:
                x = x * keep
            x = merge(x.unflatten(1, (-1, 2)).flatten(2))  # [B, L / 2, C]
            frames = (frames + 1) // 2

        keep = _keep(frames, x)
        angles = self.rotary(x.shape[1])
        arguments = (angles, None if lengths is None else frames, keep)
        for layer in self.layers:
            if self.checkpointing and self.training:
                x = checkpoint(layer, x, *arguments, use_reentrant=False)
            else:
                x = layer(x, *arguments)

        x = x[:, self.future_tokens :]
        for block, split in zip(reversed(self.up), reversed(self.split)):
            skip, keep = skips.pop()
            x = split(x).unflatten(2, (2, -1)).flatten(1, 2)  # [B, 2T, C]
            if keep is not None:
                keep = keep[:, : x.shape[1]]
            x = block(x + skip[:, : x.shape[1]], keep)

        return self._masks(x[:, :L])

    def _masks(self, x):
        """The masks [S, B, N, L] that the last features x [B, L, C] say."""
        masks = self.masks(self.norm_out(x)).transpose(1, 2).relu()
        size = (self.num_spks, self.in_channels)
        return masks.unflatten(1, size).transpose(0, 1)

    # --- streaming ----------------------------------------------------------

    def make_streaming_context(self, batch_size=1):
        """The state of new streams, for ``forward_streaming``.

        A dict of tensors, numbers and lists of these, of fixed size but for
        the frames of a token that is not complete: it can be copied
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
        if not self.streams:
            raise ValueError(
                "streaming needs causal: true and a window with a left side of "
                "0 or more"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        frames = self.norm_in.weight.new_zeros(batch_size, 0, self.in_channels)
        # Frames of each rate that wait for their future.
        skips = [
            frames.new_zeros(
                batch_size,
                self.future_tokens * self.token_stride // 2**i,
                width,
            )
            for i, width in enumerate(self.frame_widths)
        ]
        return {
            "network": self.signature,
            "batch_size": batch_size,
            "frames": frames.transpose(1, 2),  # of a token not complete yet
            "norm": self.norm_in.make_past(frames),
            "down": [block.make_past(frames) for block in self.down],
            "layers": [layer.make_past(frames) for layer in self.layers],
            "tokens": 0,  # so far
            "skips": skips,
            "up": [block.make_past(frames) for block in self.up],
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
            context.update(move_state(context, weight.device))
        frames = torch.cat([context["frames"], mix_w], 2)
        ready = frames.shape[2] - frames.shape[2] % self.token_stride
        context["frames"] = frames[:, :, ready:].clone()
        masks = [mix_w.new_zeros(self.num_spks, *mix_w.shape[:2], 0)]
        for start in range(0, ready, PIECE * self.token_stride):
            stop = min(start + PIECE * self.token_stride, ready)
            early = max(0, self.future_tokens - context["tokens"])
            piece = self.step(frames[:, :, start:stop], context)
            masks.append(piece[..., early * self.token_stride :])
        return masks[1] if len(masks) == 2 else torch.cat(masks, 3)

    def step(self, mix_w, context):
        """One step of a stream, without checks: whole tokens in and out.

        Arguments
        ---------
        mix_w : torch.Tensor
            [B, N, n], n a multiple of token_stride.
        context : dict
            As in ``forward_streaming``. Its ``tokens`` may be a tensor [1],
            as in an exported graph.

        Returns
        -------
        torch.Tensor
            Masks [S, B, N, n], which lag by future_tokens: the first ones of
            a stream mean nothing.
        """
        n, seen = mix_w.shape[2] // self.token_stride, context["tokens"]
        x = mix_w.transpose(1, 2)
        x, context["norm"] = self.norm_in.forward_streaming(x, context["norm"])
        x = self.project(x)
        skips, late = context["skips"], []
        for i, (block, merge) in enumerate(zip(self.down, self.merge)):
            x = block.forward_streaming(x, context["down"][i])
            skip = torch.cat([skips[i], x], 1)
            late.append(skip[:, : x.shape[1]])
            skips[i] = skip[:, x.shape[1] :]
            x = merge(x.unflatten(1, (-1, 2)).flatten(2))

        angles = self.rotary(n, seen)
        mask = stream_mask(n, self._left, seen, x)
        for layer, past in zip(self.layers, context["layers"]):
            x = layer.forward_streaming(x, angles, mask, past)
        context["tokens"] = seen + n

        # The memories on the way up begin with the first frame that is no
        # filling of the delay.
        keep = None
        if self.future_tokens and (
            isinstance(seen, torch.Tensor) or seen < self.future_tokens
        ):
            place = torch.arange(n, device=x.device) + seen
            keep = (place >= self.future_tokens).to(x.dtype)[None, :, None]
        for i in reversed(range(len(self.up))):
            x = self.split[i](x).unflatten(2, (2, -1)).flatten(1, 2)
            if keep is not None:
                keep = keep.repeat_interleave(2, 1)
            past = context["up"][i]
            x = self.up[i].forward_streaming(x + late[i], past, keep)
        return self._masks(x)

    @property
    def streams(self):
        """Whether ``forward_streaming`` can run: causal, a bounded window."""
        return self.causal and self._left >= 0

    @property
    def _left(self):
        return min(layer.attention.window[0] for layer in self.layers)

    def _check(self, mix_w):
        if mix_w.ndim != 3 or mix_w.shape[1] != self.in_channels:
            raise ValueError(
                f"FlashFormer takes [batch, {self.in_channels}, frames], got "
                f"{tuple(mix_w.shape)}"
            )

    @property
    def reach(self):
        """Frames to the (left, right) that an output depends on; -1: all.

        Beyond them only the statistics of the input norm matter.
        """
        sides = []
        for side in (0, 1):
            # One FSMN block per rate on the way down and one on the way up.
            frames = sum(
                2 * block.reach[side] * 2**i
                for i, block in enumerate(self.down)
            )
            tokens = self.future_tokens if side else 0
            for layer in self.layers:
                tokens += layer.attention.window[side] + layer.fsmn.reach[side]
            # A frame sees all frames of its own token.
            frames += (tokens + 1) * self.token_stride - 1
            windows = [layer.attention.window[side] for layer in self.layers]
            sides.append(-1 if min(windows) < 0 else frames)
        return tuple(sides)

    def _valid_frames(self, mix_w, lengths):
        """Frames that count in each row, integers [B]."""
        if lengths.shape != mix_w.shape[:1]:
            raise ValueError(
                f"lengths must be [{mix_w.shape[0]}], one per row, got "
                f"{tuple(lengths.shape)}"
            )
        frames = (lengths.to(mix_w.device) * mix_w.shape[2]).round().long()
        return frames.clamp(1, mix_w.shape[2])


def move_state(state, device):
    """A copy of a stream's state with all of its tensors on a device."""
    return tree_map_only(torch.Tensor, lambda x: x.to(device), state)


def _keep(frames, x):
    """1 at valid frames and 0 at padded ones, [B, L, 1]; None if all count.

    frames is one number for all rows of x [B, L, C], or a tensor [B].
    """
    place = torch.arange(x.shape[1], device=x.device)
    # Under torch.jit.trace a number is a tensor too, without axes.
    if isinstance(frames, torch.Tensor) and frames.ndim:
        keep = place < frames[:, None]
    elif not torch.compiler.is_exporting() and frames == x.shape[1]:
        return None
    else:
        keep = place[None] < frames
    return keep.unsqueeze(2).to(x.dtype)
