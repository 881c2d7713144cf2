"""One step of a stream, as a function of its state.

Axes: B streams side by side, n and m samples, N encoder channels, L frames,
S speakers.
"""

import warnings
from functools import cached_property

import torch
import torch.nn as nn
import torch.nn.functional as F

from speechbrain_flashformer.nnet.separator import encoder_frame

# Squares of samples beyond this would not be finite for long.
TOO_LOUD = 1e10


def silence_broken(block):
    """A block with 0 for what is not finite, or beyond ``TOO_LOUD``."""
    return torch.where(block.abs() < TOO_LOUD, block, 0)


class StreamingStep(nn.Module):
    """Encode, mask, decode the next whole tokens of a stream.

    As a module its state is tensors of fixed size, in and out, for export. It
    begins with zeros, but for ``samples``, which are the first of the stream.
    With a look-ahead the first ``delay`` samples that come out mean nothing.

    Arguments
    ---------
    encoder, masknet, decoder : torch.nn.Module
        As in ``separator.separate``; the masknet a causal ``FlashFormer``.

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
        """What new streams remember, for ``run``."""
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
        """Sources [B, m, S] of frames [B, N, L]; the context is changed."""
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
        """The state of new streams: tensors by name, all zeros."""
        context = self.make_streaming_context(batch_size)
        like = context["tail"]
        samples = like.new_zeros(batch_size, self.overlap)
        tokens = like.new_zeros(1, dtype=torch.long)
        state = {"samples": samples, **flat_state(context), "tokens": tokens}
        # What holds nothing needs no name.
        return {k: tensor for k, tensor in state.items() if tensor.numel()}

    @cached_property
    def names(self):
        """Those of the state, in order."""
        return list(self.make_state(1))

    def forward(self, mixture, *state):
        """Sources [B, n, S] of mixtures [B, n], and the new state."""
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
    """Steps of a network's streams, traced for each size of block they meet.

    A step has hundreds of small operations, and calling them from Python takes
    a good part of its time. All streams of a model can share the traces.

    Arguments
    ---------
    step : StreamingStep
        On any device.
    most_tokens : int
        Longest block that is traced, in tokens; on longer ones Python's share
        is small.

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
        """Sources [B, n, S] of mixtures [B, n], and the new state."""
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
            # Sizes become constants, as they should.
            warnings.simplefilter("ignore")
            return torch.jit.trace(
                self.step, (example, *state.values()), check_trace=False
            )


def flat_state(context, name=""):
    """The tensors of nested dicts and lists, by the names on the way."""
    if isinstance(context, torch.Tensor):
        return {name: context}
    flat = {}
    for key, part in _parts(context):
        flat |= flat_state(part, f"{name}_{key}" if name else str(key))
    return flat


def fill_state(context, flat, name=""):
    """Put tensors back where ``flat_state`` found them."""
    for key, part in _parts(context):
        place = f"{name}_{key}" if name else str(key)
        if isinstance(part, (dict, list)):
            fill_state(part, flat, place)
        elif place in flat:
            context[key] = flat[place]


def _parts(context):
    """Keys and parts of a dict or a list; of anything else none."""
    if isinstance(context, dict):
        return list(context.items())
    return list(enumerate(context)) if isinstance(context, list) else []
