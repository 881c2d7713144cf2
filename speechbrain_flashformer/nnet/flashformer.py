"""FlashFormer: a mask network with attention at a low frame rate.

A U over time: frames are downsampled by 2 per stage, with one FSMN block at
each rate; attention runs on tokens, at the lowest rate; frames are upsampled
with skip connections. Most arithmetic is at the token rate (base: 84 %).

Axes: B batch, N encoder channels, L frames, T tokens, C channels, S speakers.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from speechbrain_flashformer.nnet import layers, positions, sizes
from speechbrain_flashformer.nnet.attention import check_window
from speechbrain_flashformer.nnet.fsmn import GatedFSMN
from speechbrain_flashformer.nnet.norm import CumulativeNorm, GlobalNorm
from speechbrain_flashformer.nnet.pieces import in_pieces, pieces


class FlashFormer(nn.Module):
    """Mask network for SpeechBrain separation recipes.

    Drop-in for SepFormer's ``Dual_Path_Model``: takes encoder output, returns
    one non-negative mask per speaker. The defaults are the base size.

    Arguments
    ---------
    in_channels, num_spks : int
        N, encoder channels; S, masks to estimate (1 for enhancement).
    d_model, num_layers : int
        Width and number of the layers at the token rate.
    nhead : int
        Attention heads; d_model / nhead must be an even integer.
    d_ffn, d_frame : int
        Inner width of feed-forwards; width of frames (token_stride above 1).
    token_stride : int
        Frames per token, a power of two. With 1, attention covers every frame.
    window : tuple of int, optional
        Tokens seen to the (left, right); -1 is unbounded, None is (-1, -1).
    lookback, lookahead : int
        FSMN taps on past and on future frames, at every rate.
    dilations : sequence of int
        Dilations of the FSMN at the token rate; other rates use 1.
    dropout : float
        Dropout on the residual branches at the token rate.
    attention_backend : str
        As in ``attention.attend``.
    checkpointing : bool
        Recompute each layer in the backward pass, which saves memory.
    causal : bool
        Masks depend on no input after their token plus future_tokens: lookahead
        and the right side of the window are 0, the input norm covers the past.
    future_tokens : int
        Lookahead of a causal network, in tokens after the current one.
    norm_span : int, optional
        Frames of a causal network's input norm; by default those of 500 tokens.

    Raises
    ------
    ValueError
        If a setting is out of its range, or d_model does not suit nhead.

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
        sizes.check_lookahead(future_tokens, causal)
        if norm_span is None:
            norm_span = 500 * max(token_stride, 1)
        sizes.check_counts(num_spks=num_spks, norm_span=norm_span, d_ffn=d_ffn)
        sizes.check_counts(in_channels=in_channels, num_layers=num_layers)
        self.norm_in = GlobalNorm(in_channels)
        if causal:
            window, lookahead = (window[0], 0), 0
            self.norm_in = CumulativeNorm(in_channels, norm_span)
        self.in_channels, self.num_spks = in_channels, num_spks
        self.token_stride, self.ratio = token_stride, 2
        self.causal, self.future_tokens = causal, future_tokens
        self.checkpointing = checkpointing

        *frames, _ = widths = sizes.rate_widths(d_frame, d_model, token_stride)
        pairs, taps = list(zip(widths, widths[1:])), (lookback, lookahead)
        shape = d_model, nhead, d_ffn, window, *taps, dilations, dropout
        self.project = nn.Linear(in_channels, widths[0])
        self.down = nn.ModuleList(GatedFSMN(c, c, *taps) for c in frames)
        late = future_tokens * token_stride
        delays = (layers.Delay(c, late // 2**i) for i, c in enumerate(frames))
        self.delay = nn.ModuleList(delays)
        self.merge = nn.ModuleList(nn.Linear(2 * a, b) for a, b in pairs)
        self.layers = nn.ModuleList(
            layers.FlashFormerLayer(*shape, attention_backend)
            for _ in range(num_layers)
        )
        self.place = positions.Places(d_model // nhead, token_stride, window[0])
        self.split = nn.ModuleList(nn.Linear(b, 2 * a) for a, b in pairs)
        self.up = nn.ModuleList(GatedFSMN(c, c, *taps) for c in frames)
        self.norm_out = nn.LayerNorm(widths[0])
        self.masks = layers.TransposedLinear(widths[0], num_spks * in_channels)
        # Replaces the context when whole recordings are processed.
        none = [None] * max(num_layers, len(frames))
        self.no_past = dict.fromkeys(("down", "skips", "layers", "up"), none)
        self.no_past |= {"norm": None, "tokens": None}
        # A streaming context is valid only for a network with this signature.
        shapes = [tuple(p.shape) for p in self.parameters()]
        others = (window, token_stride, future_tokens, nhead, list(dilations))
        self.signature = str((shapes, *others, norm_span))

    def forward(self, mix_w, lengths=None, statistics=None, decode=None):
        """Estimate the masks of whole recordings.

        Arguments
        ---------
        mix_w : torch.Tensor
            Encoder output, [B, N, L], L >= 1.
        lengths : torch.Tensor, optional
            Valid frames of each row, integers [B]; by default all. Padding
            does not change the masks of valid frames; its own are undefined.
        statistics : tuple of torch.Tensor, optional
            Mean and mean square [B] of the encoder output over the recordings
            that the rows are excerpts of; by default those of each row.
        decode : callable, optional
            Called with successive pieces as ``decode(masks, frames)``, where
            frames is a slice. Saves the memory of all masks.

        Returns
        -------
        torch.Tensor
            Masks, [S, B, N, L], non-negative; None with decode.

        Raises
        ------
        ValueError
            If an input does not fit, or a causal network gets statistics.
        """
        lengths = positions.check_frames(mix_w, lengths, self.in_channels)
        L, late = mix_w.shape[2], self.future_tokens * self.token_stride
        if self.causal:
            if statistics is not None:
                raise ValueError("a causal network takes no statistics")
            fill = -L % self.token_stride + late
            mix_w = positions.append_silence(mix_w, lengths, fill)
            lengths = None
        x = self.features(mix_w, lengths, statistics)[:, late : late + L]
        if decode is None:
            return self.head(x)
        for frames in pieces(L):
            decode(self.head(x[:, frames]), frames)
        return None

    def step(self, mix_w, context):
        """Estimate the masks of the next tokens of streams.

        Arguments
        ---------
        mix_w : torch.Tensor
            Encoder output, [B, N, L], whole tokens.
        context : dict
            From ``make_streaming_context``; updated in place.

        Returns
        -------
        torch.Tensor
            Masks, [S, B, N, L], delayed by future_tokens.
        """
        return self.head(self.features(mix_w, context=context))

    def features(self, mix_w, lengths=None, statistics=None, context=None):
        """Run the U; return features [B, L, C], the input of ``head``.

        Arguments are those of ``forward`` and ``step``. A causal network
        takes whole tokens; its features are delayed by future_tokens.
        """
        past = self.no_past if context is None else context
        y, L, norm = mix_w.mT, mix_w.shape[2], self.norm_in
        mask = positions.length_mask(lengths, L, mix_w.device)
        given = past["norm"] or statistics or norm.reference(y, mask)
        x = in_pieces(lambda part: self.project(norm(y[:, part], given)), L)
        # An exported graph may not branch on L: it pads to whole tokens here.
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
            context["tokens"] = past["tokens"] + L // self.token_stride
        return x

    def attend(self, x, mask, lengths, past):
        """Run all layers on tokens [B, T, C]; lengths [B] are in frames."""
        places = self.place(x, lengths, past["tokens"])
        for layer, context in zip(self.layers, past["layers"]):
            x = self.run_layer(layer, x, places, mask, context)
        return x

    def ascend(self, x, skips, past):
        """Upsample tokens [B, T, C] to frames [B, L, C]; empties skips."""
        begun = positions.begun_mask(x, past["tokens"], self.future_tokens)
        for i, split in reversed(list(enumerate(self.split))):
            x = split(x).unflatten(2, (self.ratio, -1)).flatten(1, 2)
            skip, mask = skips.pop()  # frees its memory early
            if not torch.compiler.is_exporting():
                x = x[:, : skip.shape[1]]
            if begun is not None:
                begun = mask = begun.repeat_interleave(self.ratio, 1)
            x, skip = x + skip, None
            x = self.up[i](x, mask, past["up"][i])
        return x

    def head(self, x):
        """Map features [B, L, C] to masks [S, B, N, L]."""
        masks = self.masks(self.norm_out(x)).mT.relu()
        return masks.unflatten(1, (self.num_spks, -1)).transpose(0, 1)

    def run_layer(self, layer, *arguments):
        """Run one layer, with activation checkpointing if it is enabled."""
        recompute = self.checkpointing and self.training
        return layers.run_layer(layer, *arguments, recompute=recompute)

    def make_streaming_context(self, batch_size=1):
        """Create the state of new streams, for ``step``.

        Arguments
        ---------
        batch_size : int
            B, streams that are processed side by side.

        Returns
        -------
        dict
            Contexts of all layers, and the number of tokens so far.

        Raises
        ------
        ValueError
            If the network cannot stream, or batch_size is below 1.
        """
        if not self.can_stream:
            raise ValueError(
                "streaming needs causal: true and a window with a left side of "
                "0 or more"
            )
        sizes.check_counts(batch_size=batch_size)
        like = self.norm_in.weight.new_zeros(batch_size, 0)
        return {
            "network": self.signature,
            "tokens": 0,  # processed so far
            "norm": self.norm_in.make_streaming_context(like),
            "down": [m.make_streaming_context(like) for m in self.down],
            "skips": [m.make_streaming_context(like) for m in self.delay],
            "layers": [m.make_streaming_context(like) for m in self.layers],
            "up": [m.make_streaming_context(like) for m in self.up],
        }

    @property
    def can_stream(self):
        """Whether the network can stream: causal, with a bounded window."""
        return self.causal and self.place.left >= 0

    @property
    def receptive_field(self):
        """Frames to the (left, right) that a mask depends on; -1: unbounded."""
        return positions.receptive_field(self)
