"""One step of a stream as a compiled function, for blocks of one size."""

import warnings

import torch


class CompiledSteps:
    """Steps of a network's streams, traced for each size of block they meet.

    A step has hundreds of small operations, and on a small CPU Python takes
    longer to call them than they take: a trace halves the time of a block.
    Streams of one model share it.

    Arguments
    ---------
    step : StreamingStep
        Of any device; a trace is for the one that it was made on.
    most_tokens : int
        Longest block that is traced, in tokens; on longer ones Python's share
        is small.

    Example
    -------
    >>> from speechbrain.lobes.models.dual_path import Decoder, Encoder
    >>> from speechbrain_flashformer import FlashFormer
    >>> from speechbrain_flashformer.nnet.streaming import StreamingStep
    >>> encoder = Encoder(kernel_size=16, out_channels=32)
    >>> masknet = FlashFormer(32, d_model=48, num_layers=1, causal=True)
    >>> decoder = Decoder(32, 1, kernel_size=16, stride=8, bias=False)
    >>> step = StreamingStep(encoder, masknet.eval(), decoder)
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
        shape = tuple(mixture.shape)
        if shape not in self.traces:
            self.traces[shape] = self._trace(*shape)
        return self.traces[shape](mixture, *state)

    def _trace(self, batch_size, samples):
        state = self.step.make_state(batch_size)
        example = state["samples"].new_zeros(batch_size, samples)
        with torch.no_grad(), warnings.catch_warnings():
            # Sizes become constants, as they should.
            warnings.simplefilter("ignore")
            return torch.jit.trace(
                self.step, (example, *state.values()), check_trace=False
            )
