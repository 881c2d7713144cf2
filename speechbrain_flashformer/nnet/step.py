"""One streaming step as a function of an explicit state.

Axes: B streams side by side, n and m samples, N encoder channels, L frames,
S speakers.
"""

import warnings
from functools import cached_property

import torch
import torch.nn as nn
import torch.nn.functional as F

from speechbrain_flashformer.nnet.separator import encoder_frame

# Samples of this magnitude or more are replaced by 0: their squares would soon
# overflow.
TOO_LOUD = 1e10


def silence_broken(block):
    """Replace broken samples by 0.

    Arguments
    ---------
    block : torch.Tensor
        Samples, of any shape.

    Returns
    -------
    torch.Tensor
        The block, with 0 where a sample is not finite or not below
        ``TOO_LOUD``.

    Example
    -------
    >>> silence_broken(torch.tensor([0.5, torch.nan, 1e20]))
    tensor([0.5000, 0.0000, 0.0000])
    """
    return torch.where(block.abs() < TOO_LOUD, block, 0)


class StreamingStep(nn.Module):
    """Encode, mask and decode the next whole tokens of a stream.

    For export, ``forward`` takes and returns its state as tensors of fixed
    size. The initial state is zero, except that ``samples`` holds the first
    samples of the stream. With a lookahead, the first ``delay`` samples of the
    output are undefined.

    Arguments
    ---------
    encoder, masknet, decoder : torch.nn.Module
        As in ``separator.separate``; the masknet is a causal ``FlashFormer``.

    Attributes
    ----------
    kernel, stride : int
        Kernel size and stride of the encoder, in samples.
    overlap, token, delay : int
        Kernel minus stride; samples per token; lookahead in samples.

    Example
    -------
    >>> from speechbrain_flashformer import build
    >>> parts = build("streaming", num_layers=1).eval().children()
    >>> step = StreamingStep(*parts)
    >>> state = step.make_state(3)
    >>> sources, *new = step(torch.randn(3, 128), *state.values())
    >>> sources.shape, len(new) == len(state)
    (torch.Size([3, 128, 2]), True)
    """

    def __init__(self, encoder, masknet, decoder):
        super().__init__()
        self.encoder, self.masknet = encoder, masknet
        self.decoder = decoder
        self.kernel, self.stride = encoder_frame(encoder)
        self.overlap = self.kernel - self.stride
        self.token = masknet.token_stride * self.stride
        self.delay = masknet.future_tokens * self.token

    def make_streaming_context(self, batch_size):
        """Create the context of new streams, for ``run``.

        Arguments
        ---------
        batch_size : int
            B.

        Returns
        -------
        dict
            Context of the masknet, and tensors [B, ...].

        Raises
        ------
        ValueError
            If the masknet cannot stream, or batch_size is below 1.
        """
        masknet = self.masknet
        sizes = {
            "frames": (masknet.in_channels, self.delay // self.stride),
            "tail": (masknet.num_spks, self.overlap),
        }
        like = next(self.encoder.parameters()).detach()
        context = {"network": masknet.make_streaming_context(batch_size)}
        for name, size in sizes.items():
            context[name] = like.new_zeros(batch_size, *size)
        return context

    def run(self, mix_w, context):
        """Separate the next frames.

        Arguments
        ---------
        mix_w : torch.Tensor
            Encoder output, [B, N, L], whole tokens.
        context : dict
            From ``make_streaming_context``; updated in place.

        Returns
        -------
        torch.Tensor
            Sources, [B, m, S], with m = L * stride.
        """
        masks = self.masknet.step(mix_w, context=context["network"])
        size = mix_w.shape[2]
        if self.delay:
            mix_w = torch.cat([context["frames"], mix_w], 2)
            context["frames"] = mix_w[:, :, size:].clone()
            mix_w = mix_w[:, :, :size]
        sources = self.decoder((mix_w * masks).flatten(0, 1))
        sources = sources.unflatten(0, (len(masks), -1)).transpose(0, 1)
        done = size * self.stride
        sources = sources + F.pad(context["tail"], (0, done))
        context["tail"] = sources[..., done:].clone()
        return sources[..., :done].transpose(1, 2)

    def make_state(self, batch_size):
        """Create the state of new streams, for ``forward``.

        Arguments
        ---------
        batch_size : int
            B.

        Returns
        -------
        dict
            Name -> tensor, all zeros.

        Raises
        ------
        ValueError
            If the masknet cannot stream, or batch_size is below 1.
        """
        context = self.make_streaming_context(batch_size)
        like = context["tail"]
        samples = like.new_zeros(batch_size, self.overlap)
        tokens = like.new_zeros(1, dtype=torch.long)
        state = {"samples": samples, **flat_state(context), "tokens": tokens}
        # Empty tensors are left out.
        return {k: tensor for k, tensor in state.items() if tensor.numel()}

    @cached_property
    def names(self):
        """Names of the tensors of the state, in order."""
        return list(self.make_state(1))

    def forward(self, mixture, *state):
        """Separate the next samples.

        Arguments
        ---------
        mixture : torch.Tensor
            [B, n], n a multiple of ``token``.
        *state : torch.Tensor
            In the order of ``names``.

        Returns
        -------
        tuple of torch.Tensor
            Sources [B, n, S], followed by the new state.
        """
        given = dict(zip(self.names, state))
        context = self.make_streaming_context(mixture.shape[0])
        context["network"]["tokens"] = given["tokens"]
        fill_state(context, given)
        samples = torch.cat([given["samples"], mixture], 1)
        sources = self.run(self.encoder(silence_broken(samples)), context)
        new = {
            **flat_state(context),
            "samples": samples[:, mixture.shape[1] :],
            "tokens": context["network"]["tokens"],
        }
        return sources, *(new[name] for name in self.names)


class CompiledSteps:
    """Streaming steps, traced once for each block size that occurs.

    A step has hundreds of small operations, and calling these from Python takes
    a good part of its time. All streams of a model can share the traces.

    Arguments
    ---------
    step : StreamingStep
        The step, on any device.
    most_tokens : int
        Longest block that is traced, in tokens. Longer blocks run untraced,
        because Python's share of their time is small.

    Example
    -------
    >>> from speechbrain_flashformer import build
    >>> parts = build("streaming", num_layers=1).eval().children()
    >>> step = StreamingStep(*parts)
    >>> state = step.make_state(1)
    >>> sources, *new = CompiledSteps(step)(torch.randn(1, 64), *state.values())
    >>> sources.shape
    torch.Size([1, 64, 2])
    """

    def __init__(self, step, most_tokens=8):
        self.step, self.longest = step, most_tokens * step.token
        self.traces = {}

    def __call__(self, mixture, *state):
        """Separate the next samples; see ``StreamingStep.forward``."""
        if mixture.shape[1] > self.longest:
            return self.step(mixture, *state)
        key = *mixture.shape, mixture.dtype, mixture.device
        if key not in self.traces:
            self.traces[key] = self._trace(*mixture.shape)
        return self.traces[key](mixture, *state)

    def _trace(self, batch_size, samples):
        state = self.step.make_state(batch_size)
        example = state["samples"].new_zeros(batch_size, samples)
        with torch.no_grad(), warnings.catch_warnings():
            # torch warns that sizes become constants, which is intended here.
            warnings.simplefilter("ignore")
            return torch.jit.trace(
                self.step, (example, *state.values()), check_trace=False
            )


def flat_state(context, name=""):
    """Collect the tensors of nested dicts and lists.

    Arguments
    ---------
    context : dict, list or torch.Tensor
        Nested; other values are ignored.
    name : str
        Prefix of the names.

    Returns
    -------
    dict
        Name -> tensor; a name joins the keys of a path by underscores.

    Example
    -------
    >>> list(flat_state({"up": [{"past": torch.zeros(1)}], "tokens": 0}))
    ['up_0_past']
    """
    if isinstance(context, torch.Tensor):
        return {name: context}
    flat = {}
    for key, part in _parts(context):
        flat |= flat_state(part, f"{name}_{key}" if name else str(key))
    return flat


def fill_state(context, flat, name=""):
    """Write tensors back into the places where ``flat_state`` found them.

    Arguments
    ---------
    context : dict or list
        Updated in place.
    flat : dict
        Name -> tensor; a missing name leaves its tensor unchanged.
    name : str
        Prefix of the names.

    Example
    -------
    >>> context = {"up": [{"past": torch.zeros(1)}]}
    >>> fill_state(context, {"up_0_past": torch.ones(1)})
    >>> context
    {'up': [{'past': tensor([1.])}]}
    """
    for key, part in _parts(context):
        place = f"{name}_{key}" if name else str(key)
        if isinstance(part, (dict, list)):
            fill_state(part, flat, place)
        elif place in flat:
            context[key] = flat[place]


def _parts(context):
    """Keys and values of a dict or list; empty for any other type."""
    if isinstance(context, dict):
        return list(context.items())
    return list(enumerate(context)) if isinstance(context, list) else []
