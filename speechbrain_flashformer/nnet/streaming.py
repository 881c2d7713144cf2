"""Separate a stream block by block, with the result of the whole signal.

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

# Maximum number of tokens per step, half a second at 125 tokens per second. It
# bounds the memory for any block length.
MOST_TOKENS = 64


def lookahead_tokens(lookahead_ms, sample_rate, kernel_stride, token_stride):
    """Convert a lookahead from milliseconds to tokens (``future_tokens``).

    Arguments
    ---------
    lookahead_ms : float
        Lookahead after the current token, in milliseconds; a multiple of the
        duration of a token. It adds to the latency.
    sample_rate : int
        Hz.
    kernel_stride : int
        Samples per frame: the stride of the encoder.
    token_stride : int
        Frames per token.

    Returns
    -------
    int
        Lookahead in tokens.

    Raises
    ------
    ValueError
        If the lookahead is negative or not a whole number of tokens.

    Example
    -------
    >>> lookahead_tokens(24, 8000, kernel_stride=16, token_stride=4)
    3
    """
    token_ms = 1000 * kernel_stride * token_stride / sample_rate
    tokens = round(lookahead_ms / token_ms)
    # The tolerance admits rounded decimals, such as 5.33 for 16/3 ms.
    if tokens < 0 or abs(tokens * token_ms - lookahead_ms) > 0.01:
        below = max(0, int(lookahead_ms // token_ms))
        raise ValueError(
            f"lookahead_ms is {lookahead_ms:g}, but a token is {token_ms:g} "
            f"ms: take {below * token_ms:g} or {(below + 1) * token_ms:g}"
        )
    return tokens


class StreamingSeparator:
    """Separates samples as they arrive, and returns each as soon as it can.

    The output equals that of ``separator.separate`` for the whole signal, up to
    rounding and for any division into blocks. Samples that are not finite, or
    not below ``TOO_LOUD``, are replaced by 0, so that they cannot disturb later
    output.

    Arguments
    ---------
    encoder, masknet, decoder : torch.nn.Module
        As in ``separator.separate``; the masknet is a causal ``FlashFormer``.
    batch_size : int
        B, streams that run side by side.
    run : callable, optional
        Runs the step in place of ``StreamingStep.forward``, with the same
        arguments: ``CompiledSteps``, or a session of another runtime.

    Attributes
    ----------
    latency : int
        Maximum number of samples, counted from a sample itself, that must
        arrive before its output is returned: ``((1 + future_tokens) *
        token_stride - 1) * stride + kernel``.
    state : dict
        The state of the streams: nested dicts and lists of tensors and numbers,
        of bounded size. It can be copied, saved and restored. It moves to the
        device of the modules if they are moved.

    Raises
    ------
    ValueError
        If the masknet cannot stream, batch_size is below 1, or the decoder has
        a bias, which overlapping frames would add twice.

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
            "samples": context["tail"].new_zeros(batch_size, 0),  # pending
            "fed": 0,  # samples in
            "given": 0,  # samples out
            "early": self.step.delay,  # samples before the stream starts
            "flushed": False,
        }

    def feed(self, block):
        """Process the next samples and return the sources that are ready.

        Arguments
        ---------
        block : torch.Tensor
            [B, n], of any floating-point type, on any device; n may be 0.

        Returns
        -------
        torch.Tensor
            Sources, [B, m, S]; m may be 0.

        Raises
        ------
        ValueError
            If the block has another shape or type, the state comes from
            another model, or the modules are on several devices.
        RuntimeError
            After ``flush``.
        """
        self._check_state()
        if not isinstance(block, torch.Tensor):
            raise ValueError(
                f"a block must be a torch.Tensor, got {type(block).__name__}"
            )
        if block.ndim != 2 or block.shape[0] != self.batch_size:
            raise ValueError(
                f"a block must be [{self.batch_size}, samples], got "
                f"{tuple(block.shape)}"
            )
        if not block.is_floating_point():
            raise ValueError(
                f"a block must be floating point, got {block.dtype}"
            )
        state, step = self.state, self.step
        # inference_mode is about 10 % faster than no_grad.
        with torch.inference_mode():
            block = silence_broken(block).to(state["samples"])
            state["fed"] += block.shape[1]
            samples = torch.cat([state["samples"], block], 1)
            parts = [block.new_zeros(len(block), 0, step.masknet.num_spks)]
            # Process whole tokens; the rest waits for more samples.
            while samples.shape[1] >= step.token + step.overlap:
                tokens = (samples.shape[1] - step.overlap) // step.token
                size = min(tokens, MOST_TOKENS) * step.token
                given = samples[:, : size + step.overlap]
                parts.append(self._drop_early(self._advance(given)))
                samples = samples[:, size:]
            state["samples"] = samples.clone()
            sources = torch.cat(parts, 1)
            state["given"] += sources.shape[1]
        # A tensor created in inference mode could not be used in training.
        return sources.clone()

    def flush(self):
        """End the stream and return its remaining sources.

        Returns
        -------
        torch.Tensor
            Sources, [B, m, S]; in total the stream returns as many samples as
            it was fed.

        Raises
        ------
        ValueError
            If the state comes from another model, or the modules are on
            several devices.
        RuntimeError
            After an earlier ``flush``.
        """
        self._check_state()
        state, step = self.state, self.step
        state["flushed"] = True
        fed, samples = state["fed"], state["samples"]
        with torch.inference_mode():
            # Pad the samples with silence to a whole frame. Then append zero
            # frames to a whole token, and for the lookahead.
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
            rest = self._drop_early(torch.cat(parts, 1))
        return rest[:, : fed - state["given"]].clone()

    def _advance(self, samples):
        """Separate whole tokens; samples start with ``overlap`` old ones."""
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

    def _drop_early(self, sources):
        """Drop the sources [B, m, S] from before the start of the stream."""
        early = min(self.state["early"], sources.shape[1])
        self.state["early"] -= early
        return sources[:, early:]

    def _check_state(self):
        state, step = self.state, self.step
        if not isinstance(state, dict) or "flushed" not in state:
            raise ValueError("this is not the state of a StreamingSeparator")
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
