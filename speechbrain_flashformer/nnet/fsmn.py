"""FSMN memory: long context from a few taps per channel, without recurrence.

A feedforward sequential memory network computes, for every channel, a weighted
sum of past and future frames. It is a depthwise FIR filter. Its receptive field
is set by the lookback, the lookahead and the dilation; its cost is linear in
time.

Sources: "Feedforward Sequential Memory Networks" (Zhang et al.,
arXiv:1512.08301); strides and skips as in "Deep-FSMN" (Zhang et al.,
arXiv:1803.05030, eq. 5); the gate as in MossFormer2 (Zhao et al.,
arXiv:2312.11825).

Axes: B batch, T frames, C channels.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from speechbrain_flashformer.nnet.pieces import in_pieces


def depthwise_filter(x, weight, pad):
    """Filter each channel along time.

    Arguments
    ---------
    x : torch.Tensor
        [B, T, C].
    weight : torch.Tensor
        [C, 1, 1, taps].
    pad : int
        Zeros at each end of x, in frames.

    Returns
    -------
    torch.Tensor
        [B, T + 2 pad - taps + 1, C].

    Example
    -------
    >>> x, weight = torch.ones(1, 4, 1), torch.ones(1, 1, 1, 3)
    >>> depthwise_filter(x, weight, pad=1).flatten().tolist()
    [2.0, 3.0, 3.0, 2.0]
    """
    # Viewed as an image [B, C, 1, T], a contiguous x already has the layout of
    # the fast depthwise kernels (channels last). On CPU they are 10 to 20 times
    # faster than conv1d on [B, C, T]. Any other strides of x would select the
    # slow kernels.
    image = x.contiguous().transpose(1, 2).unsqueeze(2)
    out = F.conv2d(image, weight, padding=(0, pad), groups=weight.shape[0])
    return out.squeeze(2).transpose(1, 2)


class _CpuFilter(torch.autograd.Function):
    """``depthwise_filter`` with a fast gradient of the weight.

    On CPU this gradient is fast if time is the height of the image and the
    batch its width. Both passes run in float32, because the bfloat16 kernel
    hangs with 16 channels or fewer (torch 2.11).
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x, weight, pad):
        """Filter; save the inputs for the backward pass."""
        ctx.save_for_backward(x, weight)
        ctx.pad = pad
        return depthwise_filter(x, weight, pad)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx, grad):
        """Compute the gradients of x and weight."""
        x, weight = ctx.saved_tensors
        channels, _, _, taps = weight.shape
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            # The mirrored filter; the padding restores the length of x.
            mirrored = weight.flip(3)
            grad_x = depthwise_filter(grad, mirrored, taps - 1 - ctx.pad)
        if ctx.needs_input_grad[1]:
            # [B, T, C] -> [1, C, T, B], channels last. Copied even if B is 1:
            # a view differs only in the stride of an axis of size 1, but the
            # kernel is then wrong at some lengths (torch 2.11).
            images = (
                y.transpose(0, 1)
                .clone(memory_format=torch.contiguous_format)[None]
                .permute(0, 3, 1, 2)
                for y in (grad, x)
            )
            grad_weight = torch.ops.aten.convolution_backward(
                *images,
                weight.transpose(2, 3),
                None,
                (1, 1),
                (ctx.pad, 0),
                (1, 1),
                False,
                (0, 0),
                channels,
                (False, True, False),
            )[1].transpose(2, 3)
        return grad_x, grad_weight, None


class FSMN(nn.Module):
    """Memory over time: one filter per channel, added to its input.

    ``y[t] = x[t] + sum_i a[i] * x[t + i * dilation]`` for i from -lookback to
    lookahead. With lookahead = 0 the filter is causal.

    Arguments
    ---------
    channels : int
        C.
    lookback : int
        Taps on past frames.
    lookahead : int
        Taps on future frames; 0 is causal.
    dilation : int
        Distance between taps, in frames.

    Raises
    ------
    ValueError
        If a number of taps is negative, or the dilation is below 1.

    Example
    -------
    >>> FSMN(8, lookback=20, lookahead=0)(torch.randn(2, 50, 8)).shape
    torch.Size([2, 50, 8])
    """

    def __init__(self, channels, lookback=20, lookahead=20, dilation=1):
        super().__init__()
        if min(lookback, lookahead) < 0 or dilation < 1:
            raise ValueError(
                "FSMN needs lookback >= 0, lookahead >= 0 and dilation >= 1, "
                f"got {lookback}, {lookahead}, {dilation}"
            )
        self.lookback, self.lookahead = lookback, lookahead
        self.dilation = dilation
        taps = lookback + 1 + lookahead
        self.weight = nn.Parameter(torch.empty(channels, 1, 1, taps))
        # A filter that returns x, for the first term of the sum.
        identity = (torch.arange(taps) == lookback).float()
        self.register_buffer("identity", identity, persistent=False)
        self.reset_parameters()

    def reset_parameters(self):
        """Initialize the taps uniformly in [-b, b], b = 1 / sqrt(taps)."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)

    def make_streaming_context(self, like):
        """Create the context of new streams, whose past is silence.

        Arguments
        ---------
        like : torch.Tensor
            [B, ...]; gives the batch size, the dtype and the device.

        Returns
        -------
        dict
            Tensors of the past, [B, ...]; ``forward`` updates them.
        """
        shape = len(like), self.lookback * self.dilation, len(self.weight)
        return {"past": like.new_zeros(shape)}

    def forward(self, x, mask=None, context=None):
        """Filter along time.

        Arguments
        ---------
        x : torch.Tensor
            [B, T, C].
        mask : torch.Tensor, optional
            [B, T, 1], 0 at padded frames; they do not enter the memory.
        context : dict, optional
            From ``make_streaming_context``, updated in place; x holds the next
            frames of the streams. Only with lookahead = 0.

        Returns
        -------
        torch.Tensor
            [B, T, C].
        """
        if mask is not None:
            x = x * mask
        if context is None:
            return self._filter_whole(x)
        known = torch.cat([context["past"], x], 1)
        context["past"] = known[:, x.shape[1] :]
        # For the few frames of a block, a product and a sum take a third of
        # the time of a convolution. The view of torch's unfold costs nothing,
        # but onnxruntime gathers it value by value. Whole frames gather faster.
        weight, span = self.weight.flatten(1), 1 + self.lookback * self.dilation
        if torch.compiler.is_exporting():
            starts = torch.arange(x.shape[1], device=x.device)[:, None]
            steps = torch.arange(0, span, self.dilation, device=x.device)
            frames = starts + steps
            taps = known.index_select(1, frames.flatten())
            taps = taps.unflatten(1, frames.shape)  # [B, T, taps, C]
            return x + (taps * weight.T).sum(2)
        taps = known.unfold(1, span, 1)[..., :: self.dilation]
        return x + (taps * weight).sum(3)

    def _filter_whole(self, x):
        B, T, _ = x.shape
        # Every dilation-th frame belongs to one of ``dilation`` signals.
        # Filtering these without dilation is 5 to 10 times faster than a
        # dilated kernel.
        phases = x
        # An exported graph may not branch on T.
        exporting = torch.compiler.is_exporting()
        if exporting or T % self.dilation:
            phases = F.pad(x, (0, 0, 0, -T % self.dilation))
        phases = phases.unflatten(1, (-1, self.dilation))
        phases = phases.transpose(1, 2).flatten(0, 1)  # [B dilation, ...]
        pad, sides = self.lookback, (self.lookback, self.lookahead)
        if pad != self.lookahead:
            # Pad explicitly: with symmetric padding wider than half the filter,
            # the gradient of the weight takes 20 times as long.
            phases, pad = F.pad(phases, (0, 0, *sides)), 0
        inputs, filtered = (phases, self.weight, pad), depthwise_filter
        on_cpu = x.device.type == "cpu" and not exporting
        if on_cpu:
            wide = torch.promote_types(x.dtype, torch.float32)
            # One filter computes both terms of the sum. In half precision the
            # sum of weights would lose digits of the small one.
            weight = self.weight.to(wide) + self.identity
            inputs = phases.to(wide), weight, pad
            # torch.jit cannot trace a custom autograd function.
            if not torch.jit.is_tracing():
                filtered = _CpuFilter.apply
        memory = filtered(*inputs).to(x.dtype)
        memory = memory.unflatten(0, (B, -1)).transpose(1, 2).flatten(1, 2)
        return memory[:, :T] if on_cpu else x + memory[:, :T]


class GatedFSMN(nn.Module):
    """A residual block with an FSMN memory and a gate.

    ``x + out(silu(u) * memory(v))`` with ``u, v = expand(norm(x))``. The memory
    is a chain of FSMNs, one per dilation.

    Arguments
    ---------
    d_model : int
        C, channels in and out.
    d_memory : int
        Channels of each branch.
    lookback : int
        Taps on past frames.
    lookahead : int
        Taps on future frames; 0 is causal.
    dilations : sequence of int
        Distance between taps in frames, one FSMN per entry.
    dropout : float
        Dropout on the residual branch.

    Example
    -------
    >>> block = GatedFSMN(16, 32, dilations=(1, 2))
    >>> block(torch.randn(2, 50, 16)).shape
    torch.Size([2, 50, 16])
    """

    stacked = {"expand": 2}

    def __init__(
        self,
        d_model,
        d_memory,
        lookback=20,
        lookahead=20,
        dilations=(1,),
        dropout=0.0,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.expand = nn.Linear(d_model, 2 * d_memory)
        self.memory = nn.ModuleList(
            FSMN(d_memory, lookback, lookahead, dilation)
            for dilation in dilations
        )
        self.receptive_field = (
            lookback * sum(dilations),
            lookahead * sum(dilations),
        )
        self.out = nn.Linear(d_memory, d_model)
        self.dropout = nn.Dropout(dropout)

    def make_streaming_context(self, like):
        """Create the contexts of new streams, one per FSMN, as in ``FSMN``."""
        return [fsmn.make_streaming_context(like) for fsmn in self.memory]

    def forward(self, x, mask=None, context=None):
        """Run the block; arguments as in ``FSMN.forward``.

        Returns
        -------
        torch.Tensor
            [B, T, C].
        """
        if context is not None:
            return self._run(x, mask, context)
        return in_pieces(
            lambda frames: self._run(
                x[:, frames], None if mask is None else mask[:, frames]
            ),
            x.shape[1],
            self.receptive_field,
        )

    def _run(self, x, mask, context=None):
        gate, memory = self.expand(self.norm(x)).chunk(2, dim=-1)
        for i, fsmn in enumerate(self.memory):
            past = None if context is None else context[i]
            memory = fsmn(memory, mask, past)
        return x + self.dropout(self.out(F.silu(gate) * memory))
