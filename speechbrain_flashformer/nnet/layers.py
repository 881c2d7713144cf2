"""One layer at the token rate: attention, memory, feed-forward.

Axes: B batch, T tokens, L frames, C channels, H heads, D head width.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from speechbrain_flashformer.nnet.attention import (
    attend,
    check_backend,
    check_window,
)
from speechbrain_flashformer.nnet.fsmn import GatedFSMN
from speechbrain_flashformer.nnet.pieces import PIECE, in_pieces
from speechbrain_flashformer.nnet.rotary import rotate
from speechbrain_flashformer.nnet.sizes import check_counts
from speechbrain_flashformer.nnet.window import products


def run_layer(layer, *arguments, recompute):
    """Run a layer; with recompute, again in the backward pass."""
    if recompute:
        return checkpoint(layer, *arguments, use_reentrant=False)
    return layer(*arguments)


class Delay(nn.Module):
    """Delay frames; zeros come first.

    Arguments
    ---------
    channels : int
        C.
    frames : int
        Length of the delay; 0 passes the input through.

    Example
    -------
    >>> Delay(1, 2)(torch.arange(1.0, 5).view(1, 4, 1)).flatten().tolist()
    [0.0, 0.0, 1.0, 2.0]
    """

    def __init__(self, channels, frames):
        super().__init__()
        self.channels, self.frames = channels, frames

    def make_streaming_context(self, like):
        """Create the context of new streams, as in ``FSMN``."""
        return {"past": like.new_zeros(len(like), self.frames, self.channels)}

    def forward(self, x, context=None):
        """Delay x [B, L, C]; a context is updated in place."""
        if not self.frames:
            return x
        if context is None:
            return F.pad(x, (0, 0, self.frames, 0))[:, : x.shape[1]]
        known = torch.cat([context["past"], x], 1)
        context["past"] = known[:, x.shape[1] :]
        return known[:, : x.shape[1]]


class LayerScale(nn.Module):
    """A learned weight per channel on a residual branch.

    The weight is not folded into a Linear: SpeechBrain recipes call
    ``reset_parameters`` on every module, which would reset a small initial
    value there. Source: CaiT (arXiv:2103.17239, eq. 1).

    Arguments
    ---------
    channels : int
        C.
    start : float
        Initial value of the weights.

    Example
    -------
    >>> LayerScale(4, 0.5)(torch.ones(4)).tolist()
    [0.5, 0.5, 0.5, 0.5]
    """

    def __init__(self, channels, start):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), float(start)))

    def forward(self, x):
        """Scale the last axis of x, the channels."""
        return x * self.weight


class TransposedLinear(nn.Linear):
    """A Linear whose output [B, L, C] has the memory layout [B, C, L].

    The decoder needs this layout. Copying the output of a plain Linear into it
    costs more than the matrix product.

    Example
    -------
    >>> TransposedLinear(4, 6)(torch.randn(2, 50, 4)).stride()
    (300, 1, 50)
    """

    def forward(self, x):
        """Map x [B, L, in_features] to [B, L, C], with C = out_features."""
        weight = self.weight.expand(x.shape[0], -1, -1)
        out = torch.baddbmm(self.bias[:, None], weight, x.transpose(1, 2))
        return out.transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions.

    Arguments
    ---------
    d_model : int
        C, divisible by nhead; C / nhead must be even.
    nhead : int
        H, attention heads.
    window : tuple of int
        Tokens seen to the (left, right); -1 means unbounded.
    backend : str
        As in ``attention.attend``.

    Raises
    ------
    ValueError
        If nhead does not divide d_model, or window or backend is invalid.

    Example
    -------
    >>> from speechbrain_flashformer.nnet.positions import Places
    >>> layer, x = Attention(16, 2), torch.randn(2, 50, 16)
    >>> layer(x, Places(8)(x)).shape
    torch.Size([2, 50, 16])
    """

    # Weight -> how many matrices it stacks; Muon updates each one separately.
    stacked = {"qkv": 3}

    def __init__(self, d_model, nhead, window=(-1, -1), backend="auto"):
        super().__init__()
        check_counts(d_model=d_model, nhead=nhead)
        if d_model % nhead:
            raise ValueError(
                f"d_model {d_model} is not divisible by nhead {nhead}"
            )
        check_backend(backend)
        check_window(window)
        self.d_model, self.nhead = d_model, nhead
        self.window = tuple(window)
        self.backend = backend
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model)

    def make_streaming_context(self, like):
        """Create the context of new streams, as in ``FSMN``."""
        # [B, H, T, D]: runtimes would copy any other layout in every step.
        width = self.d_model // self.nhead
        shape = len(like), self.nhead, self.window[0], width
        return {"keys": like.new_zeros(shape), "values": like.new_zeros(shape)}

    def forward(self, x, positions, context=None):
        """Attend over time.

        Arguments
        ---------
        x : torch.Tensor
            [B, T, C].
        positions : Positions
            From ``positions.Places``.
        context : dict, optional
            Keys and values of a stream's past, updated in place. ``backend``
            does not apply then: the step runs as two matrix products.

        Returns
        -------
        torch.Tensor
            [B, T, C].
        """
        q, k, v = self._project(x, positions.angles)
        if context is None:
            out = attend(q, k, v, self.window, self.backend, positions.rows)
            return self.out(out.flatten(2))
        k = torch.cat([context["keys"], k.transpose(1, 2)], 2)
        v = torch.cat([context["values"], v.transpose(1, 2)], 2)
        context["keys"] = k[:, :, x.shape[1] :]
        context["values"] = v[:, :, x.shape[1] :]
        # For so few queries, a fused kernel is no faster, and onnxruntime would
        # transpose all keys for it.
        out = products(q.transpose(1, 2), k, v, positions.visible)
        return self.out(out.transpose(1, 2).flatten(2))

    def _project(self, x, angles):
        heads = self.qkv(x).unflatten(2, (3 * self.nhead, -1))
        both, v = heads.split([2 * self.nhead, self.nhead], dim=2)
        q, k = rotate(both, angles).chunk(2, dim=2)
        return q, k, v


class FeedForward(nn.Module):
    """SwiGLU feed-forward (arXiv:2002.05202, eq. 6).

    Arguments
    ---------
    d_model : int
        C.
    d_ffn : int
        Inner width.

    Example
    -------
    >>> FeedForward(16, 32)(torch.randn(2, 50, 16)).shape
    torch.Size([2, 50, 16])
    """

    stacked = {"expand": 2}

    def __init__(self, d_model, d_ffn):
        super().__init__()
        self.expand = nn.Linear(d_model, 2 * d_ffn)
        self.out = nn.Linear(d_ffn, d_model)

    def forward(self, x):
        """Map x [B, T, C] to [B, T, C]."""
        gate, value = self.expand(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class FlashFormerLayer(nn.Module):
    """One layer at the token rate: attention, gated FSMN, feed-forward.

    Arguments are those of ``FlashFormer``; backend is its attention_backend.

    Example
    -------
    >>> from speechbrain_flashformer.nnet.positions import Places
    >>> layer = FlashFormerLayer(16, nhead=2, d_ffn=32)
    >>> x = torch.randn(2, 50, 16)
    >>> layer(x, Places(8)(x)).shape
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

    def make_streaming_context(self, like):
        """Create the context of new streams, as in ``FSMN``."""
        return {
            "attention": self.attention.make_streaming_context(like),
            "fsmn": self.fsmn.make_streaming_context(like),
        }

    def forward(self, x, positions, mask=None, context=None):
        """Run the layer.

        Arguments
        ---------
        x : torch.Tensor
            [B, T, C].
        positions : Positions
            From ``positions.Places``.
        mask : torch.Tensor, optional
            [B, T, 1], 0 at padded tokens.
        context : dict, optional
            From ``make_streaming_context``; updated in place.

        Returns
        -------
        torch.Tensor
            [B, T, C].
        """
        past = context or {"attention": None, "fsmn": None}
        x = self._attend(x, positions, past["attention"])
        x = self.fsmn(x, mask, past["fsmn"])
        return in_pieces(lambda tokens: self._feed(x[:, tokens]), x.shape[1])

    def _attend(self, x, positions, context):
        # A piece needs only the keys within the window. A window wider than a
        # piece would recompute the same keys many times.
        window = self.attention.window
        near = min(window) >= 0 and sum(window) <= PIECE // 4
        if context is not None or not near or positions.rows is not None:
            return self._attend_piece(x, positions, context)
        return in_pieces(
            lambda tokens: self._attend_piece(
                x[:, tokens], positions.excerpt(tokens)
            ),
            x.shape[1],
            window,
        )

    def _attend_piece(self, x, positions, context=None):
        update = self.attention(self.norm_attention(x), positions, context)
        return x + self.dropout(self.scale_attention(update))

    def _feed(self, x):
        return x + self.dropout(self.scale_ffn(self.ffn(self.norm_ffn(x))))
