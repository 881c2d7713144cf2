"""Separate a stream block by block, exactly as the whole would be.

Axes: B streams side by side, n and m samples, S speakers.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from speechbrain_flashformer.nnet.flashformer import move_context
from speechbrain_flashformer.nnet.separator import encoder_frame

# Squares of samples beyond this would not be finite for long.
TOO_LOUD = 1e10
# Samples of a block that run at once, so that memory is bounded.
LONGEST = 2**15


def silence_broken(block):
    """A block with 0 for what is not finite, or beyond ``TOO_LOUD``."""
    return torch.where(block.abs() < TOO_LOUD, block, 0)


def lookahead_tokens(lookahead_ms, sample_rate, kernel_stride, token_stride):
    """The ``future_tokens`` of a network that hears so much ahead.

    Arguments
    ---------
    lookahead_ms : float
        Milliseconds beyond the token that a sample is in, which the latency
        grows by: a multiple of a token.
    sample_rate : int
        Hz.
    kernel_stride : int
        Samples from one frame of the encoder to the next.
    token_stride : int
        Frames per token.

    Returns
    -------
    int
        Tokens.

    Raises
    ------
    ValueError
        When that is no whole number of tokens, of 0 or more.

    Example
    -------
    >>> lookahead_tokens(24, 8000, kernel_stride=16, token_stride=4)
    3
    """
    token_ms = 1000 * kernel_stride * token_stride / sample_rate
    tokens = round(lookahead_ms / token_ms)
    # Written in decimals, thirds of a millisecond are near misses.
    if tokens < 0 or abs(tokens * token_ms - lookahead_ms) > 0.01:
        below = max(0, int(lookahead_ms // token_ms))
        raise ValueError(
            f"lookahead_ms is {lookahead_ms:g}, but a token is {token_ms:g} "
            f"ms: take {below * token_ms:g} or {(below + 1) * token_ms:g}"
        )
    return tokens


class StreamingSeparator:
    """Samples in, separated samples out, as soon as they are known.

    What comes out is, to rounding, what ``separate.separate`` gives for the
    whole signal, however it is cut into blocks. Samples that are not finite,
    or beyond ``TOO_LOUD``, are taken as 0, so that they are over when their
    block is.

    Arguments
    ---------
    encoder, masknet, decoder : torch.nn.Module
        As in ``separate.separate``; the masknet a causal ``FlashFormer``.
    batch_size : int
        B.

    Attributes
    ----------
    latency : int
        Samples that must have come in, from its own on, before a sample comes
        out, at most: ``((1 + future_tokens) * token_stride - 1) * stride +
        kernel``.
    state : dict
        All that the stream remembers: tensors, numbers and lists of these, of
        bounded size. It can be copied, saved, and put back, and follows the
        modules to another device.

    Raises
    ------
    ValueError
        When the masknet cannot stream, the decoder has a bias, which
        overlapping frames would add twice, or batch_size is not 1 or more.

    Example
    -------
    >>> from speechbrain.lobes.models.dual_path import Decoder, Encoder
    >>> from speechbrain_flashformer import FlashFormer
    >>> encoder = Encoder(kernel_size=16, out_channels=32)
    >>> masknet = FlashFormer(32, d_model=64, num_layers=1, causal=True)
    >>> decoder = Decoder(32, 1, kernel_size=16, stride=8, bias=False)
    >>> stream = StreamingSeparator(encoder, masknet.eval(), decoder)
    >>> out = [stream.feed(block) for block in torch.randn(1, 999).split(50, 1)]
    >>> torch.cat([*out, stream.flush()], 1).shape
    torch.Size([1, 999, 2])
    """

    def __init__(self, encoder, masknet, decoder, batch_size=1):
        if getattr(decoder, "bias", None) is not None:
            raise ValueError("streaming needs a decoder without bias")
        if not hasattr(masknet, "forward_streaming"):
            raise ValueError(
                "streaming needs a causal FlashFormer as masknet, got "
                f"{type(masknet).__name__}"
            )
        self.encoder, self.masknet = encoder, masknet
        self.decoder, self.batch_size = decoder, batch_size
        self.kernel, self.stride = encoder_frame(encoder)
        tokens = (1 + masknet.future_tokens) * masknet.token_stride
        self.latency = (tokens - 1) * self.stride + self.kernel
        weight = next(encoder.parameters()).detach()
        rows = masknet.num_spks * batch_size
        self.state = {
            "network": masknet.make_streaming_context(batch_size),
            "frame": [self.kernel, self.stride],
            "samples": weight.new_zeros(batch_size, 0),  # of the next frames
            "frames": weight.new_zeros(batch_size, masknet.in_channels, 0),
            "tail": weight.new_zeros(rows, self.kernel - self.stride),
            "fed": 0,
            "given": 0,
            "flushed": False,
        }

    def feed(self, block):
        """Take the next samples, give those that are ready.

        Arguments
        ---------
        block : torch.Tensor
            [B, n], floating point of any precision and on any device; n may
            be 0.

        Returns
        -------
        torch.Tensor
            [B, m, S].

        Raises
        ------
        ValueError
            When the block is of another shape or type, the state that was put
            back is of another model, or the modules are not on one device.
        RuntimeError
            After ``flush``.
        """
        self._check_state()
        if not isinstance(block, torch.Tensor):
            raise ValueError(
                f"a block is a torch.Tensor, got {type(block).__name__}"
            )
        batch_size = self.batch_size
        if block.ndim != 2 or block.shape[0] != batch_size:
            raise ValueError(
                f"a block is [{batch_size}, samples], got {tuple(block.shape)}"
            )
        if not block.is_floating_point():
            raise ValueError(f"a block is floating point, got {block.dtype}")
        # About a tenth faster than no_grad.
        with torch.inference_mode():
            block = silence_broken(block).to(self.state["samples"])
            self.state["fed"] += block.shape[1]
            parts = [self._run(part) for part in block.split(LONGEST, 1)]
            sources = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        # What is made in that mode cannot be used in training.
        return sources.clone()

    def flush(self):
        """End the stream; the rest of its samples, [B, m, S]."""
        self._check_state()
        state = self.state
        state["flushed"] = True
        with torch.inference_mode():
            fed, first = state["fed"], state["given"]
            # Silence, to the end of a frame and of a token and for its future.
            frames = 1 - (-max(fed - self.kernel, 0) // self.stride)
            samples = self.kernel + (frames - 1) * self.stride
            parts = [self._run(_zeros(state["samples"], samples - fed, 1))]
            more = self.masknet.future_tokens * self.masknet.token_stride
            more += -frames % self.masknet.token_stride
            parts.append(self._decode(_zeros(state["frames"], more, 2)))
            tail = (
                state["tail"]
                .unflatten(0, (-1, self.batch_size))
                .permute(1, 2, 0)
            )
            rest = torch.cat([*parts, tail], 1)[:, : fed - first]
        return rest.clone()

    def _check_state(self):
        state = self.state
        if not isinstance(state, dict) or "flushed" not in state:
            raise ValueError("this is no state of a StreamingSeparator")
        if state["flushed"]:
            raise RuntimeError("the stream was flushed: make a new one")
        if state["frame"] != [self.kernel, self.stride]:
            raise ValueError("this state was made by another model")
        weight, samples = next(self.encoder.parameters()), state["samples"]
        modules = (self.encoder, self.masknet, self.decoder)
        devices = {next(m.parameters()).device for m in modules}
        if len(devices) > 1:
            raise ValueError(
                "encoder, masknet and decoder are on several devices: "
                + ", ".join(sorted(map(str, devices)))
            )
        for what, old, new in (
            ("streams", state["network"]["batch_size"], self.batch_size),
            ("type", samples.dtype, weight.dtype),
        ):
            if old != new:
                raise ValueError(
                    f"this state was made by another model: {what} {old} in "
                    f"place of {new}"
                )
        if samples.device != weight.device:
            state.update(move_context(state, weight.device))

    def _run(self, block):
        """Samples [B, n] to sources [B, m, S]."""
        state = self.state
        samples = torch.cat([state["samples"], block], 1)
        count = max(0, 1 + (samples.shape[1] - self.kernel) // self.stride)
        state["samples"] = samples[:, count * self.stride :].clone()
        if not count:
            return self._decode(_zeros(state["frames"], 0, 2))
        heard = samples[:, : self.kernel + (count - 1) * self.stride]
        return self._decode(self.encoder(heard))

    def _decode(self, mix_w):
        """Frames [B, N, n] to sources [B, m, S]."""
        state = self.state
        masks = self.masknet.forward_streaming(mix_w, state["network"])
        S, B, _, ready = masks.shape
        mix_w = torch.cat([state["frames"], mix_w], 2)
        state["frames"] = mix_w[:, :, ready:].clone()
        if not ready:
            return mix_w.new_zeros(B, 0, S)
        sources = self.decoder((mix_w[:, :, :ready] * masks).flatten(0, 1))
        done = ready * self.stride
        sources, tail = _join(sources, state["tail"], done)
        state["tail"] = tail.clone()
        state["given"] += done
        return sources.unflatten(0, (S, B)).permute(1, 2, 0)


class StreamingStep(nn.Module):
    """``StreamingSeparator`` for blocks of whole tokens, as a function.

    Its state is tensors of fixed size, in and out. It begins with zeros, but
    for ``samples``, which are the first of the stream. With a look-ahead the
    first ``delay`` samples that come out mean nothing.

    Arguments are those of ``StreamingSeparator``.

    Example
    -------
    >>> from speechbrain.lobes.models.dual_path import Decoder, Encoder
    >>> from speechbrain_flashformer import FlashFormer
    >>> encoder = Encoder(kernel_size=16, out_channels=32)
    >>> masknet = FlashFormer(32, d_model=64, num_layers=1, causal=True)
    >>> decoder = Decoder(32, 1, kernel_size=16, stride=8, bias=False)
    >>> step = StreamingStep(encoder, masknet.eval(), decoder)
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
        self.token = masknet.token_stride * self.stride
        self.delay = masknet.future_tokens * self.token

    def make_state(self, batch_size):
        """The state of new streams: tensors by name, all zeros."""
        masknet, overlap = self.masknet, self.kernel - self.stride
        weight = next(self.encoder.parameters()).detach()
        frames = masknet.future_tokens * masknet.token_stride
        state = {
            "samples": (overlap,),
            "frames": (masknet.in_channels, frames),
            "tail": (masknet.num_spks, overlap),
        }
        state = {k: weight.new_zeros(batch_size, *v) for k, v in state.items()}
        context = masknet.make_streaming_context(batch_size)
        state["tokens"] = weight.new_zeros(1, dtype=torch.long)
        state |= _flat({part: context[part] for part in PARTS})
        # What holds nothing needs no name.
        return {k: tensor for k, tensor in state.items() if tensor.numel()}

    def forward(self, mixture, *state):
        """Sources [B, n, S] of mixtures [B, n], and the new state."""
        names = self.make_state(1)
        given = dict(zip(names, state))
        context = self.masknet.make_streaming_context(mixture.shape[0])
        context["tokens"] = given["tokens"]
        _fill(context, given)
        samples = torch.cat([given["samples"], mixture], 1)
        mix_w = self.encoder(silence_broken(samples))
        masks = self.masknet.step(mix_w, context=context)
        n = mix_w.shape[2]
        if self.delay:
            mix_w = torch.cat([given["frames"], mix_w], 2)
        sources = self.decoder((mix_w[:, :, :n] * masks).flatten(0, 1))
        sources = sources.unflatten(0, (self.masknet.num_spks, -1))
        sources, tail = _join(
            sources.transpose(0, 1), given["tail"], n * self.stride
        )
        new = {
            **_flat({part: context[part] for part in PARTS}),
            "samples": samples[:, n * self.stride :],
            "frames": mix_w[:, :, n:],
            "tail": tail,
            "tokens": context["tokens"],
        }
        return sources.transpose(1, 2), *(new[name] for name in names)


# Of a streaming context, what changes from step to step.
PARTS = ("norm", "down", "layers", "skips", "up")


def _flat(tree, name=""):
    """The tensors of nested dicts and lists, by the names on the way."""
    if isinstance(tree, torch.Tensor):
        return {name: tree}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat = {}
    for key, part in pairs:
        flat |= _flat(part, f"{name}_{key}" if name else str(key))
    return flat


def _fill(tree, flat, name=""):
    """Put tensors back where ``_flat`` found them."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, part in list(pairs):
        place = f"{name}_{key}" if name else str(key)
        if isinstance(part, (dict, list)):
            _fill(part, flat, place)
        elif place in flat:
            tree[key] = flat[place]


def _join(sources, tail, done):
    """Add the last frames' overlap; the samples that are done, and the rest."""
    more = sources.shape[-1] - tail.shape[-1]
    sources = sources + F.pad(tail, (0, more))
    return sources[..., :done], sources[..., done:]


def _zeros(like, size, dim):
    """Zeros in the shape of a tensor but for one dimension."""
    shape = list(like.shape)
    shape[dim] = size
    return like.new_zeros(shape)
