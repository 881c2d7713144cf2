"""FlashFormer: a mask network that attends at a low rate and remembers long.

A U over time: frames are downsampled two by two (an FSMN block at each rate),
attention runs on the tokens at the lowest rate, and frames are upsampled again
with skips. Nearly all arithmetic is at the rate of tokens.

Axes: B batch, N encoder channels, L frames, T tokens, C channels, S speakers.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from speechbrain_flashformer.nnet.attention import check_window
from speechbrain_flashformer.nnet.fsmn import GatedFSMN
from speechbrain_flashformer.nnet.layers import (
    Delay,
    FlashFormerLayer,
    TransposedLinear,
    check_counts,
    rate_widths,
)
from speechbrain_flashformer.nnet.norm import CumulativeNorm, GlobalNorm
from speechbrain_flashformer.nnet.pieces import in_pieces, pieces
from speechbrain_flashformer.nnet.positions import (
    Places,
    begun_mask,
    check_frames,
    length_mask,
    receptive_field,
)


class FlashFormer(nn.Module):
    """Mask network for SpeechBrain separation recipes.

    Drop-in for SepFormer's ``Dual_Path_Model``: encoder output in, one
    non-negative mask per speaker out. The defaults are those of base.

    Arguments
    ---------
    in_channels, num_spks : int
        N, channels of the encoder; S, masks to estimate (1 for enhancement).
    d_model, num_layers : int
        Width and number of the layers at the token rate.
    nhead : int
        Attention heads; d_model / nhead must be a whole even number.
    d_ffn, d_frame : int
        Inner width of the feed-forward parts; width at the frame rate.
    token_stride : int
        Frames per token, a power of two. 1 is attention over every frame.
    window : tuple of int, optional
        Tokens that attention sees to the (left, right); -1 is unbounded, None
        is both unbounded.
    lookback, lookahead : int
        FSMN taps on the past and on the future, at every rate.
    dilations : sequence of int
        Dilations of the FSMN at the token rate; at the others it is 1.
    dropout : float
        On the residual branches at the token rate.
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
    >>> masknet = FlashFormer(in_channels=32, d_model=48, num_layers=1)
    >>> masknet(torch.rand(1, 32, 101)).shape
    torch.Size([2, 1, 32, 101])
    """

    def __init__(
        self,
        in_channels=256,
        num_spks=2,
        d_model=384,
        num_layers=8,
        nhead=6,
        d_ffn=768,
        d_frame=96,
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
        window = (-1, -1) if window is None else window
        check_window(window)
        if causal:
            window, lookahead = (window[0], 0), 0
        if future_tokens < 0 or (future_tokens and not causal):
            raise ValueError(
                "future_tokens is 0 or more, and 0 unless causal, got "
                f"{future_tokens}"
            )
        if norm_span is None:
            norm_span = 500 * max(token_stride, 1)
        counts = {"num_spks": num_spks, "norm_span": norm_span, "d_ffn": d_ffn}
        check_counts(**counts, in_channels=in_channels, num_layers=num_layers)
        self.in_channels, self.num_spks = in_channels, num_spks
        self.token_stride, self.ratio = token_stride, 2
        self.causal, self.future_tokens = causal, future_tokens
        self.checkpointing = checkpointing

        *frames, _ = widths = rate_widths(d_frame, d_model, token_stride)
        pairs, taps = list(zip(widths, widths[1:])), (lookback, lookahead)
        sizes = d_model, nhead, d_ffn, window, *taps, dilations, dropout
        if causal:
            self.norm_in = CumulativeNorm(in_channels, norm_span)
        else:
            self.norm_in = GlobalNorm(in_channels)
        self.project = nn.Linear(in_channels, widths[0])
        self.down = nn.ModuleList(GatedFSMN(c, c, *taps) for c in frames)
        self.delay = nn.ModuleList(
            Delay(c, future_tokens * token_stride // 2**i)
            for i, c in enumerate(frames)
        )
        self.merge = nn.ModuleList(nn.Linear(2 * a, b) for a, b in pairs)
        self.layers = nn.ModuleList(
            FlashFormerLayer(*sizes, attention_backend)
            for _ in range(num_layers)
        )
        self.place = Places(d_model // nhead, token_stride, window[0])
        self.split = nn.ModuleList(nn.Linear(b, 2 * a) for a, b in pairs)
        self.up = nn.ModuleList(GatedFSMN(c, c, *taps) for c in frames)
        self.norm_out = nn.LayerNorm(widths[0])
        self.masks = TransposedLinear(widths[0], num_spks * in_channels)
        # In the place of a streaming context, when there is none.
        none = [None] * max(num_layers, len(frames))
        self.no_past = dict.fromkeys(("down", "skips", "layers", "up"), none)
        self.no_past |= {"norm": None, "tokens": None}
        # What a streaming context must agree with.
        shapes = [tuple(p.shape) for p in self.parameters()]
        others = (window, token_stride, future_tokens, nhead, list(dilations))
        self.signature = str((shapes, *others, norm_span))

    def forward(self, mix_w, lengths=None, statistics=None, decode=None):
        """Estimate the masks.

        Arguments
        ---------
        mix_w : torch.Tensor
            Encoder output, [B, N, L], L >= 1.
        lengths : torch.Tensor, optional
            Frames that count in each row, whole numbers [B]. The others never
            change them; their masks mean nothing.
        statistics : tuple of torch.Tensor, optional
            Mean and mean square [B] of the encoder output over the recordings
            that the rows are parts of; each row's own by default.
        decode : callable, optional
            Takes the masks piece by piece, ``decode(masks, frames)`` with a
            slice of frames, as all of a long recording need much memory.

        Returns
        -------
        torch.Tensor
            Masks, [S, B, N, L], non-negative; None with decode. Raises a
            ValueError when something does not fit, or a causal network is
            given statistics.
        """
        lengths = check_frames(mix_w, lengths, self.in_channels)
        L = mix_w.shape[2]
        late = self.future_tokens * self.token_stride
        if self.causal:
            if statistics is not None:
                raise ValueError("a causal network takes no statistics")
            # Silence follows the end, as at the end of a stream.
            mask = length_mask(lengths, L, mix_w.device)
            mix_w = mix_w if mask is None else mix_w * mask.mT
            mix_w = F.pad(mix_w, (0, -L % self.token_stride + late))
            lengths = None
        x = self.features(mix_w, lengths, statistics)[:, late : late + L]
        if decode is None:
            return self.head(x)
        for frames in pieces(L):
            decode(self.head(x[:, frames]), frames)
        return None

    def step(self, mix_w, context):
        """Masks [S, B, N, L] of ``features``."""
        return self.head(self.features(mix_w, context=context))

    def features(self, mix_w, lengths=None, statistics=None, context=None):
        """The way through the U, of whole recordings or of a stream.

        Arguments are those of ``forward``, but that a causal network takes
        whole tokens, and the context of a stream, which is changed. The
        frames [B, L, C] of masks lag by future_tokens.
        """
        past = self.no_past if context is None else context
        mask = length_mask(lengths, mix_w.shape[2], mix_w.device)
        y = mix_w.mT
        given = past["norm"] or statistics or self.norm_in.reference(y, mask)
        x = in_pieces(
            lambda part: self.project(self.norm_in(y[:, part], given)),
            y.shape[1],
        )
        # An exported graph, for all lengths, has whole tokens from the start.
        if torch.compiler.is_exporting() and context is None:
            fill = (0, 0, 0, -x.shape[1] % self.token_stride)
            mask = F.pad(x.new_ones(1, x.shape[1], 1, dtype=torch.bool), fill)
            x = F.pad(x, fill)
        skips = []
        for i, merge in enumerate(self.merge):
            x = self.down[i](x, mask, past["down"][i])
            skips.append((self.delay[i](x, past["skips"][i]), mask))
            if mask is not None:
                x, mask = x * mask, mask[:, :: self.ratio]
            if not torch.compiler.is_exporting() and x.shape[1] % self.ratio:
                x = F.pad(x, (0, 0, 0, -x.shape[1] % self.ratio))
            x = merge(x.unflatten(1, (-1, self.ratio)).flatten(2))
        x = self.attend(x, mask, lengths, past)
        x = self.ascend(x, skips, past)
        if context is not None:
            passed = mix_w.shape[2] // self.token_stride
            context["tokens"] = past["tokens"] + passed
        return x

    def attend(self, x, mask, lengths, past):
        """All layers on tokens [B, T, C]; mask is theirs, lengths of frames."""
        positions = self.place(x, lengths, past["tokens"])
        for layer, context in zip(self.layers, past["layers"]):
            x = self.run_layer(layer, x, positions, mask, context)
        return x

    def ascend(self, x, skips, past):
        """Tokens [B, T, C] to frames [B, L, C]."""
        begun = begun_mask(x, past["tokens"], self.future_tokens)
        for i, split in reversed(list(enumerate(self.split))):
            x = split(x).unflatten(2, (self.ratio, -1)).flatten(1, 2)
            skip, mask = skips.pop()  # and its memory goes
            if not torch.compiler.is_exporting():
                x = x[:, : skip.shape[1]]
            if begun is not None:
                begun = mask = begun.repeat_interleave(self.ratio, 1)
            x, skip = x + skip, None
            x = self.up[i](x, mask, past["up"][i])
        return x

    def head(self, x):
        """Frames [B, L, C] to masks [S, B, N, L]."""
        masks = self.masks(self.norm_out(x)).mT.relu()
        return masks.unflatten(1, (self.num_spks, -1)).transpose(0, 1)

    def run_layer(self, layer, *arguments):
        """One layer; in training its inner values may be computed again."""
        if self.checkpointing and self.training:
            return checkpoint(layer, *arguments, use_reentrant=False)
        return layer(*arguments)

    def make_streaming_context(self, batch_size=1):
        """What new streams remember for ``step``; a ValueError if none can."""
        if not self.can_stream:
            raise ValueError(
                "streaming needs causal: true and a window with a left side of "
                "0 or more"
            )
        check_counts(batch_size=batch_size)
        like = self.norm_in.weight.new_zeros(batch_size, 0)

        def _contexts(layers):
            return [layer.make_streaming_context(like) for layer in layers]

        return {
            "network": self.signature,
            "tokens": 0,  # so far
            "norm": self.norm_in.make_streaming_context(like),
            "down": _contexts(self.down),
            "skips": _contexts(self.delay),
            "layers": _contexts(self.layers),
            "up": _contexts(self.up),
        }

    @property
    def can_stream(self):
        """Whether it can stream: causal, with a bounded window."""
        return self.causal and self.place.left >= 0

    @property
    def receptive_field(self):
        """Frames to the (left, right) that an output depends on; -1: all."""
        return receptive_field(self)
