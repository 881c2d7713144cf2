"""The processing chain: reader, resampler, separator, turns, resampler, writer.

Each stage has ``feed``, which takes the next block and returns the output that
is ready, and ``flush``, which returns the rest. Memory use does not grow with
the length of the recording.

Axes: B chunks, C channels, S speakers, n, m and T samples; mixtures [C, n],
sources [C, S, n].
"""

import torch

from speechbrain_flashformer.inference.audio import Resampler
from speechbrain_flashformer.inference.chunks import ChunkPlan, ChunkSeparator
from speechbrain_flashformer.inference.turns import TurnOrder
from speechbrain_flashformer.nnet.separator import (
    encoder_frame,
    encoder_statistics,
    separate,
    takes,
    unwrapped,
)


def flow(blocks, stages):
    """Feed blocks through a chain of stages.

    Arguments
    ---------
    blocks : iterable of torch.Tensor
        The blocks of a recording in order.
    stages : list
        Objects with ``feed`` and ``flush``; each takes the output of the one
        before.

    Yields
    ------
    torch.Tensor
        Output of the last stage: once for each block, and at the end once for
        each stage that is flushed. Nothing if there are no blocks.

    Example
    -------
    >>> blocks = torch.randn(1, 16000).split(999, 1)
    >>> out = flow(blocks, [Resampler(16000, 8000), Resampler(8000, 16000)])
    >>> sum(block.shape[1] for block in out)
    16000
    """
    begun = False
    for block in blocks:
        begun = True
        yield _feed_all(stages, block)
    for number, stage in enumerate(stages if begun else []):
        yield _feed_all(stages[number + 1 :], stage.flush())


def _feed_all(stages, block):
    for stage in stages:
        block = stage.feed(block)
    return block


def separate_blocks(blocks, rate, model_rate, stages, consistent=False):
    """Separate blocks, and resample where the rates differ.

    Arguments
    ---------
    blocks : iterable of torch.Tensor
        The mixture in order, each [C, n].
    rate, model_rate : int
        Sampling rates of the blocks and of the stages, Hz.
    stages : list
        The first takes [C, n], such as a ChunkSeparator or StreamSeparator,
        and the others sources, such as a TurnOrder; all return [C, S, m].
    consistent : bool
        Whether the sources sum to the mixture: adds the residual (mixture
        minus sum of sources) to the sources in equal parts.

    Yields
    ------
    torch.Tensor
        Sources [C, S, m] at ``rate``; as many samples in total as the blocks
        have.

    Raises
    ------
    ValueError
        When the rates have too small a common divisor to resample.

    Example
    -------
    >>> class Twice:  # "separates" into two copies
    ...     def feed(self, block):
    ...         return torch.stack([block, block], 1)
    ...     def flush(self):
    ...         return torch.zeros(1, 2, 0)
    >>> blocks = torch.randn(1, 44100).split(999, 1)
    >>> sources = list(separate_blocks(blocks, 44100, 8000, [Twice()]))
    >>> torch.cat(sources, 2).shape
    torch.Size([1, 2, 44100])
    """
    if rate != model_rate:
        up = Resampler(model_rate, rate)
        stages = [Resampler(rate, model_rate), *stages, up]
    mixture, given = _MixtureBuffer(blocks, consistent), 0
    for sources in flow(mixture, stages):
        # Resampling there and back can add samples at the end.
        sources = sources[..., : mixture.samples - given]
        given += sources.shape[-1]
        if consistent and sources.shape[-1]:
            residual = mixture.take(sources.shape[-1]) - sources.sum(1)
            sources = sources + residual.unsqueeze(1) / sources.shape[1]
        yield sources


class _MixtureBuffer:
    """Counts the samples of blocks [C, n]; can store them until taken."""

    def __init__(self, blocks, store):
        self.blocks, self.store = blocks, store
        self.samples, self.stored = 0, []

    def __iter__(self):
        for block in self.blocks:
            self.samples += block.shape[1]
            if self.store:
                self.stored.append(block)
            yield block

    def take(self, samples):
        """Remove and return the oldest stored samples, [C, samples]."""
        stored = torch.cat(self.stored, 1)
        self.stored = [stored[:, samples:]]
        return stored[:, :samples]


class StreamSeparator:
    """A stage that separates with a streaming network.

    Arguments
    ---------
    make_stream : callable
        Takes a number of signals and returns a ``StreamingSeparator`` for
        them.

    Example
    -------
    >>> from speechbrain_flashformer import build
    >>> from speechbrain_flashformer.nnet.streaming import StreamingSeparator
    >>> parts = list(build("streaming", num_layers=1).eval().children())
    >>> stage = StreamSeparator(lambda n: StreamingSeparator(*parts, n))
    >>> blocks = torch.randn(1, 999).split(100, 1)
    >>> torch.cat(list(flow(blocks, [stage])), 2).shape
    torch.Size([1, 2, 999])
    """

    def __init__(self, make_stream):
        self.make_stream, self.stream = make_stream, None

    def feed(self, block):
        """Take samples [C, n], return the sources that are ready, [C, S, m].

        Arguments
        ---------
        block : torch.Tensor
            The next samples, [C, n].

        Returns
        -------
        torch.Tensor
            [C, S, m] on the CPU; m may be 0.
        """
        self.stream = self.stream or self.make_stream(len(block))
        return self.stream.feed(block).cpu().transpose(1, 2)

    def flush(self):
        """Return the rest, [C, S, m].

        Returns
        -------
        torch.Tensor
            [C, S, m] on the CPU.
        """
        return self.stream.flush().cpu().transpose(1, 2)


class ChunkNetwork:
    """Separates chunks [B, T] into sources [B, S, T] on the CPU.

    Arguments
    ---------
    networks : list of torch.nn.Module
        Encoder, masknet and decoder, on one device.
    autocast : callable
        Returns the context manager that they run in.
    statistics : tuple of torch.Tensor, optional
        Statistics of the C channels of the recording, as in
        ``separator.separate``. B is then a multiple of C, and the rows of a
        chunk are its channels in order.

    Raises
    ------
    ValueError
        When called, if an output is not finite.
    """

    def __init__(self, networks, autocast, statistics=None):
        self.networks, self.autocast = networks, autocast
        self.statistics = statistics

    @torch.no_grad()
    def __call__(self, chunks):
        """Separate chunks [B, T] into [B, S, T]."""
        given = self.statistics
        if given is not None:
            times = len(chunks) // len(given[0])
            given = tuple(value.repeat(times) for value in given)
        chunks = chunks.to(next(self.networks[0].parameters()).device)
        with self.autocast():
            sources = separate(chunks, *self.networks, statistics=given)
        sources = sources.float().cpu()
        if not sources.isfinite().all():
            raise ValueError(
                "the model gives no finite numbers for this recording: is it "
                "far too loud, or the precision too narrow?"
            )
        return sources.transpose(1, 2)


def recording_statistics(blocks, rate, model_rate, networks):
    """Statistics of a whole recording for the input norm.

    Arguments
    ---------
    blocks : iterable of torch.Tensor
        The recording in order, each [C, n].
    rate, model_rate : int
        Sampling rates of the blocks and of the model, Hz.
    networks : list of torch.nn.Module
        Encoder, masknet and decoder.

    Returns
    -------
    tuple of torch.Tensor
        Mean and mean square, [C] each, as from ``encoder_statistics``.

    Raises
    ------
    ValueError
        When the masknet does not take statistics, or is causal.
    """
    encoder, masknet, _ = networks
    problem = None
    if not takes(masknet, "statistics"):
        problem = f"{type(unwrapped(masknet)).__name__} takes no statistics"
    elif getattr(unwrapped(masknet), "causal", False):
        problem = "the norm of a causal model is over the past"
    if problem:
        raise ValueError(
            f"norm 'recording' cannot be used, {problem}: take 'chunk'"
        )
    if rate != model_rate:
        blocks = flow(blocks, [Resampler(rate, model_rate)])
    with torch.no_grad():
        return encoder_statistics(blocks, encoder)


def chunk_stages(network, options, sample_rate, num_spks):
    """Make the stages that separate a recording in chunks.

    Arguments
    ---------
    network : ChunkNetwork
        Separates chunks.
    options : SeparationOptions
        ``turns``, and those of ``plan_chunks``.
    sample_rate, num_spks : int
        Sampling rate (Hz) and number of speakers of the model.

    Returns
    -------
    list
        Stages from [C, n] to [C, S, m].

    Example
    -------
    >>> from speechbrain_flashformer import build
    >>> from speechbrain_flashformer.inference.options import SeparationOptions
    >>> parts = list(build("tiny", num_layers=1).children())
    >>> network = ChunkNetwork(parts, torch.no_grad)
    >>> len(chunk_stages(network, SeparationOptions(), 8000, 2))
    2
    """
    plan = plan_chunks(options, network.networks, sample_rate, num_spks)
    stages = [ChunkSeparator(network, sample_rate, plan, num_spks)]
    if options.turns == "voice":
        stages.append(TurnOrder(num_spks, sample_rate))
    return stages


def plan_chunks(options, networks, sample_rate, num_spks):
    """Convert chunk lengths to samples, and choose the batch size.

    Arguments
    ---------
    options : SeparationOptions
        ``chunk`` and ``overlap`` in seconds, ``memory`` in megabytes.
    networks : list of torch.nn.Module
        Encoder, masknet and decoder.
    sample_rate, num_spks : int
        Sampling rate (Hz) and number of speakers of the model.

    Returns
    -------
    ChunkPlan
        With as many chunks per call as fit into the memory; one on a CPU.

    Example
    -------
    >>> from speechbrain_flashformer import build
    >>> from speechbrain_flashformer.inference.options import SeparationOptions
    >>> parts = list(build("tiny", num_layers=1).children())
    >>> plan_chunks(SeparationOptions(), parts, 8000, 2).overlap
    20000
    """
    encoder, masknet = (unwrapped(network) for network in networks[:2])
    weight, (_, stride) = next(encoder.parameters()), encoder_frame(encoder)
    chunk = round(options.chunk * sample_rate)
    batch = 1
    # On a CPU one chunk already uses all cores.
    if weight.device.type != "cpu":
        # Estimate: the masks, their products with the encoder output, and a
        # few more tensors at the frame rate.
        per_frame = 4 * weight.shape[0] * (2 * num_spks + 4)
        megabytes = chunk / stride * per_frame / 1e6
        batch = max(1, int(options.memory / megabytes))
    return ChunkPlan(
        chunk,
        round(options.overlap * sample_rate),
        stride * getattr(masknet, "token_stride", 1),
        batch,
    )
