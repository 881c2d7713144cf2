"""Separate a stream block by block, exactly as the whole would be.

Axes: B streams side by side, n and m samples, N encoder channels, L frames,
S speakers.
"""

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from speechbrain_flashformer.nnet.step import (
    StreamingStep,
    fill_state,
    flat_state,
    silence_broken,
)

# Most tokens that run at once, half a second at 125 a second: memory is
# bounded however long a block is.
MOST_TOKENS = 64


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

    What comes out is, to rounding, what ``separator.separate`` gives for the
    whole signal, however it is cut into blocks. Samples that are not finite,
    or beyond ``TOO_LOUD``, are taken as 0, so that they are over when their
    block is.

    Arguments
    ---------
    encoder, masknet, decoder : torch.nn.Module
        As in ``separator.separate``; the masknet a causal ``FlashFormer``.
    batch_size : int
        B.
    run : callable, optional
        What runs the step, called as ``StreamingStep`` is: ``CompiledSteps``,
        or a session of another runtime.

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
    >>> from speechbrain_flashformer import build
    >>> parts = build("streaming", num_layers=1).eval().children()
    >>> stream = StreamingSeparator(*parts)
    >>> out = [stream.feed(block) for block in torch.randn(1, 999).split(50, 1)]
    >>> torch.cat([*out, stream.flush()], 1).shape
    torch.Size([1, 999, 2])
    """

    def __init__(self, encoder, masknet, decoder, batch_size=1, run=None):
        if getattr(decoder, "bias", None) is not None:
            raise ValueError("streaming needs a decoder without bias")
        if not hasattr(masknet, "make_streaming_context"):
            raise ValueError(
                "streaming needs a causal FlashFormer as masknet, got "
                f"{type(masknet).__name__}"
            )
        self.step = StreamingStep(encoder, masknet, decoder)
        self.batch_size, self.run = batch_size, run
        self.latency = self.step.delay + self.step.token + self.step.overlap
        context = self.step.make_streaming_context(batch_size)
        self.state = {
            **context,
            "frame": [self.step.kernel, self.step.stride],
            "samples": context["tail"].new_zeros(batch_size, 0),  # to come
            "fed": 0,
            "given": 0,
            "early": self.step.delay,  # samples that mean nothing yet
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
        if block.ndim != 2 or block.shape[0] != self.batch_size:
            raise ValueError(
                f"a block is [{self.batch_size}, samples], got "
                f"{tuple(block.shape)}"
            )
        if not block.is_floating_point():
            raise ValueError(f"a block is floating point, got {block.dtype}")
        state, step = self.state, self.step
        # About a tenth faster than no_grad.
        with torch.inference_mode():
            block = silence_broken(block).to(state["samples"])
            state["fed"] += block.shape[1]
            samples = torch.cat([state["samples"], block], 1)
            parts = [block.new_zeros(len(block), 0, step.masknet.num_spks)]
            # Whole tokens; what is left waits for its own.
            while samples.shape[1] >= step.token + step.overlap:
                tokens = (samples.shape[1] - step.overlap) // step.token
                size = min(tokens, MOST_TOKENS) * step.token
                given = samples[:, : size + step.overlap]
                parts.append(self._meant(self._advance(given)))
                samples = samples[:, size:]
            state["samples"] = samples.clone()
            sources = torch.cat(parts, 1)
            state["given"] += sources.shape[1]
        # What is made in that mode cannot be used in training.
        return sources.clone()

    def flush(self):
        """End the stream; the rest of its samples, [B, m, S]."""
        self._check_state()
        state, step = self.state, self.step
        state["flushed"] = True
        fed, samples = state["fed"], state["samples"]
        with torch.inference_mode():
            # Silence: to the end of a frame, and no frames after it, to the
            # end of a token and for its future.
            frames = 1 - (-max(fed - step.kernel, 0) // step.stride)
            frames -= (fed - samples.shape[1]) // step.stride
            size = step.kernel + (frames - 1) * step.stride
            mix_w = state["frames"][:, :, :0]
            if frames:
                missing = size - samples.shape[1]
                mix_w = step.encoder(F.pad(samples, (0, missing)))
            more = -frames % step.masknet.token_stride
            mix_w = F.pad(mix_w, (0, more + step.delay // step.stride))
            parts = [step.run(mix_w, state)] if mix_w.shape[2] else []
            parts.append(state["tail"].transpose(1, 2))
            rest = self._meant(torch.cat(parts, 1))
        return rest[:, : fed - state["given"]].clone()

    def _advance(self, samples):
        """Sources of whole tokens; the samples begin with an overlap."""
        state, step = self.state, self.step
        if self.run is None:
            return step.run(step.encoder(samples), state)
        first, mixture = samples.tensor_split([step.overlap], 1)
        network = state["network"]
        tokens = torch.tensor([network["tokens"]], device=samples.device)
        flat = {**flat_state(state), "samples": first, "tokens": tokens}
        given = (flat[name] for name in step.names)
        sources, *new = self.run(mixture, *given)
        new = dict(zip(step.names, new))
        fill_state(state, new)
        network["tokens"] = int(new["tokens"])
        return sources

    def _meant(self, sources):
        """Sources [B, m, S] without those of before the stream began."""
        early = min(self.state["early"], sources.shape[1])
        self.state["early"] -= early
        return sources[:, early:]

    def _check_state(self):
        state, step = self.state, self.step
        if not isinstance(state, dict) or "flushed" not in state:
            raise ValueError("this is no state of a StreamingSeparator")
        if state["flushed"]:
            raise RuntimeError("the stream was flushed: make a new one")
        weight, samples = next(step.encoder.parameters()), state["samples"]
        modules = (step.encoder, step.masknet, step.decoder)
        devices = {next(m.parameters()).device for m in modules}
        if len(devices) > 1:
            raise ValueError(
                "encoder, masknet and decoder are on several devices: "
                + ", ".join(sorted(map(str, devices)))
            )
        made_by = state["network"]["network"], state["frame"]
        if made_by != (step.masknet.signature, [step.kernel, step.stride]):
            raise ValueError("this state was made by another model")
        for what, old, new in (
            ("streams", len(samples), self.batch_size),
            ("type", samples.dtype, weight.dtype),
        ):
            if old != new:
                raise ValueError(
                    f"this state was made by another model: {what} {old} in "
                    f"place of {new}"
                )
        if samples.device != weight.device:
            state.update(
                tree_map_only(
                    torch.Tensor, lambda x: x.to(weight.device), state
                )
            )
