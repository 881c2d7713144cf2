"""The way of a recording: reader, down, separator, up, writer.

Each stage has ``feed``, which takes the next block and gives what is ready,
and ``flush``, which gives the rest. Memory does not grow with the recording.

Axes: C channels, S speakers, n samples; mixtures [C, n], sources [C, S, n].
"""

import torch

from speechbrain_flashformer.inference.audio import Resampler
from speechbrain_flashformer.inference.chunks import ChunkPlan
from speechbrain_flashformer.nnet.separator import (
    encoder_frame,
    encoder_statistics,
    separate,
    takes,
    unwrapped,
)


def flow(blocks, stages):
    """Feed blocks to the first stage, and what it gives to the next.

    Arguments
    ---------
    blocks : iterable of torch.Tensor
        A recording in order.
    stages : list
        Each with ``feed`` and ``flush``.

    Yields
    ------
    torch.Tensor
        What comes out of the last stage: once for each block, and the rest of
        each stage at the end.

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
        yield _through(stages, block)
    for number, stage in enumerate(stages if begun else []):
        yield _through(stages[number + 1 :], stage.flush())


def _through(stages, block):
    for stage in stages:
        block = stage.feed(block)
    return block


def separate_blocks(blocks, rate, model_rate, separator, consistent=False):
    """Separate blocks at one rate by a separator at another.

    Arguments
    ---------
    blocks : iterable of torch.Tensor
        The mixture in order, each [C, n].
    rate, model_rate : int
        Of the blocks and of the separator, Hz.
    separator : ChunkSeparator or StreamSeparator
        A stage from [C, n] to [C, S, n].
    consistent : bool
        Make the sources sum to the mixture.

    Yields
    ------
    torch.Tensor
        [C, S, n], as long in all as the blocks were.
    """
    stages = [separator]
    if rate != model_rate:
        up = Resampler(model_rate, rate)
        stages = [Resampler(rate, model_rate), separator, up]
    heard, given = _Heard(blocks, consistent), 0
    for sources in flow(heard, stages):
        sources = sources[..., : heard.samples - given]
        given += sources.shape[-1]
        if consistent and sources.shape[-1]:
            residual = heard.take(sources.shape[-1]) - sources.sum(1)
            sources = sources + residual.unsqueeze(1) / sources.shape[1]
        yield sources


class _Heard:
    """Counts blocks [C, n] and, if asked, keeps them until they are taken."""

    def __init__(self, blocks, keep):
        self.blocks, self.keep = blocks, keep
        self.samples, self.kept = 0, []

    def __iter__(self):
        for block in self.blocks:
            self.samples += block.shape[1]
            if self.keep:
                self.kept.append(block)
            yield block

    def take(self, samples):
        """The first samples not taken yet, [C, samples]."""
        kept = torch.cat(self.kept, 1)
        self.kept = [kept[:, samples:]]
        return kept[:, :samples]


class StreamSeparator:
    """A stage that separates as a stream.

    Arguments
    ---------
    make_stream : callable
        Channels -> a ``StreamingSeparator`` for as many signals.
    """

    def __init__(self, make_stream):
        self.make_stream, self.stream = make_stream, None

    def feed(self, block):
        """The next samples [C, n] to those that are ready, [C, S, m]."""
        self.stream = self.stream or self.make_stream(len(block))
        return self.stream.feed(block).cpu().transpose(1, 2)

    def flush(self):
        """The rest, [C, S, m]."""
        return self.stream.flush().cpu().transpose(1, 2)


class ChunkNetwork:
    """Encoder, masknet and decoder for chunks, [B, T] -> [B, S, T] on the CPU.

    Arguments
    ---------
    networks : list of torch.nn.Module
        The three of them, on one device.
    autocast : callable
        Gives the context that they run in.
    statistics : tuple of torch.Tensor, optional
        As in ``separator.separate``, of the C channels of a recording.
    """

    def __init__(self, networks, autocast, statistics=None):
        self.networks, self.autocast = networks, autocast
        self.statistics = statistics

    @torch.no_grad()
    def __call__(self, chunks):
        """Separate chunks; those of a recording's channels are neighbours."""
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
    """What the norm needs of a whole recording, in blocks [C, n].

    Raises
    ------
    ValueError
        When the masknet has no such norm.
    """
    encoder, masknet, _ = networks
    problem = None
    if not takes(masknet, "statistics"):
        problem = f"{type(unwrapped(masknet)).__name__} has none"
    elif getattr(unwrapped(masknet), "causal", False):
        problem = "a causal one's is over the past"
    if problem:
        raise ValueError(
            f"norm 'recording' is one of FlashFormer's, {problem}: take 'chunk'"
        )
    if rate != model_rate:
        blocks = flow(blocks, [Resampler(rate, model_rate)])
    with torch.no_grad():
        return encoder_statistics(blocks, encoder)


def plan_chunks(options, networks, sample_rate, num_spks):
    """Chunks in samples, as many at once as fit the memory.

    Arguments
    ---------
    options : SeparationOptions
        Lengths in seconds, and the memory.
    networks : list of torch.nn.Module
        Encoder, masknet and decoder.
    sample_rate, num_spks : int
        Of the model.

    Returns
    -------
    ChunkPlan
    """
    encoder, masknet = (unwrapped(network) for network in networks[:2])
    weight, (_, stride) = next(encoder.parameters()), encoder_frame(encoder)
    chunk = round(options.chunk * sample_rate)
    batch = 1
    # On a CPU one chunk fills all cores.
    if weight.device.type != "cpu":
        # Masks, their products and a few tensors at the frame rate.
        per_frame = 4 * weight.shape[0] * (2 * num_spks + 4)
        megabytes = chunk / stride * per_frame / 1e6
        batch = max(1, int(options.memory / megabytes))
    return ChunkPlan(
        chunk,
        round(options.overlap * sample_rate),
        stride * getattr(masknet, "token_stride", 1),
        batch,
    )
