"""Separate long recordings chunk by chunk, with a consistent speaker order.

Chunks overlap. Both chunks estimate the samples of the overlap; comparing the
estimates gives the permutation of speakers between the chunks. Where that is
ambiguous, as in a pause, a voice profile of each speaker decides, which is
collected over the whole recording. Memory use does not grow with the length of
the recording.

Axes: B rows of a batch, C channels of the recording, S speakers, T, n and m
samples.
"""

import torch

from speechbrain_flashformer.inference.speakers import SpeakerOrder

# Length in seconds of the cross-fade in the middle of an overlap.
FADE = 0.05


class ChunkPlan:
    """How a recording is cut into overlapping chunks of equal length.

    Arguments
    ---------
    chunk : int
        Samples per chunk, more than twice the overlap. It is rounded so that
        the hop is a multiple of ``align``.
    overlap : int
        Samples that neighboring chunks share.
    align : int
        Chunks start at multiples of this number of samples. With the samples
        per token of the network, a chunk has the same tokens as the whole
        recording.
    batch : int
        Chunks per call of the network.

    Raises
    ------
    ValueError
        When the overlap is less than 1 or the chunk is too short.

    Example
    -------
    >>> ChunkPlan(chunk=16000, overlap=4000, align=64).hop
    11968
    """

    def __init__(self, chunk, overlap, align=1, batch=1):
        if overlap < 1 or chunk <= 2 * overlap:
            raise ValueError(
                "chunks must be more than twice as long as their overlap, got "
                f"{chunk} and {overlap} samples"
            )
        self.overlap = overlap
        self.hop = max(1, (chunk - overlap) // align) * align
        self.chunk = self.hop + overlap
        self.align, self.batch = align, batch


class ChunkSeparator:
    """A stage that separates a recording of any length chunk by chunk.

    A recording that is not longer than one chunk is separated as a whole.

    Arguments
    ---------
    network : callable
        Maps mixtures [B, T] to sources [B, S, T].
    sample_rate : int
        Sampling rate of network and blocks, Hz.
    plan : ChunkPlan
        Lengths of chunk and overlap, and chunks per call.
    num_spks : int
        S.

    Example
    -------
    >>> mixture = torch.randn(1, 80000)
    >>> twice = lambda x: torch.stack([x, x], 1)
    >>> plan = ChunkPlan(chunk=16000, overlap=4000)
    >>> separator = ChunkSeparator(twice, 8000, plan, 2)
    >>> parts = [separator.feed(block) for block in mixture.split(999, 1)]
    >>> parts.append(separator.flush())
    >>> torch.equal(torch.cat(parts, 2), twice(mixture))
    True
    """

    def __init__(self, network, sample_rate, plan, num_spks):
        self.network, self.sample_rate = network, sample_rate
        self.plan, self.num_spks = plan, num_spks
        self.pieces, self.size = [], 0  # input that is still needed
        self.offset = 0  # start of the next chunk in it
        self.waiting = []  # chunks, until there are enough for a call
        self.orders = None
        self.held = None  # estimates of the last overlap, [C, S, overlap]
        fade = min(round(FADE * sample_rate), plan.overlap)
        self.fade = _fade_in(plan.overlap, fade)

    def feed(self, block):
        """Separate the next samples.

        Arguments
        ---------
        block : torch.Tensor
            [C, n].

        Returns
        -------
        torch.Tensor
            The sources that are ready, [C, S, m]; m may be 0.
        """
        ready = [block.new_zeros(len(block), self.num_spks, 0)]
        self.pieces.append(block)
        self.size += block.shape[1]
        plan = self.plan
        # Wait for one sample more: the last chunk is cut by ``flush``.
        while self.size > self.offset + plan.chunk:
            kept = torch.cat(self.pieces, 1)[:, self.offset :]
            self.waiting.append(kept[:, : plan.chunk])
            self.pieces, self.size = [kept], kept.shape[1]
            self.offset = plan.hop
            if len(self.waiting) == plan.batch:
                ready += self._run_waiting()
        return torch.cat(ready, 2)

    def flush(self):
        """Separate the end of the recording.

        Returns
        -------
        torch.Tensor
            The remaining sources, [C, S, m].
        """
        ready = self._run_waiting()
        # The last chunk starts earlier, so that it is as long as the others.
        plan, missing = self.plan, self.offset + self.plan.chunk - self.size
        early = -(-max(0, missing) // plan.align) * plan.align
        early = min(early, self.offset)
        last = torch.cat(self.pieces, 1)[:, self.offset - early :]
        if self.held is None and len(last) == 1:
            return self.network(last)  # one chunk, one channel: nothing to join
        ready.append(self._join(self.network(last)[..., early:]))
        return torch.cat([*ready, self.held], 2)

    def _run_waiting(self):
        """Separate the waiting chunks; return the sources that are ready."""
        if not self.waiting:
            return []
        chunks, self.waiting = torch.stack(self.waiting), []
        estimates = self.network(chunks.flatten(0, 1))
        return [self._join(x) for x in estimates.split(chunks.shape[1])]

    def _join(self, fresh):
        """Join a chunk to the output; return the sources that are final.

        ``fresh`` [C, S, T] starts where ``held`` starts. Its last ``overlap``
        samples are held back for the next chunk.
        """
        if self.orders is None:
            self.orders = [
                SpeakerOrder(self.num_spks, self.sample_rate) for _ in fresh
            ]
        held, overlap, arranged = self.held, self.plan.overlap, []
        for c, (order, mine) in enumerate(zip(self.orders, fresh)):
            index = order.arrange(
                None if held is None else held[c],
                mine,
                arranged[0] if c else None,
            )
            arranged.append(mine[index])
        joined = torch.stack(arranged)
        if held is not None:
            shared = held + (joined[..., :overlap] - held) * self.fade
            joined = torch.cat([shared, joined[..., overlap:]], 2)
        split = max(0, joined.shape[2] - overlap)
        self.held = joined[..., split:]
        return joined[..., :split]


def _fade_in(overlap, fade):
    """Weights of the newer chunk in an overlap, [overlap]."""
    ramp = (torch.arange(fade) + 0.5) / fade
    before = (overlap - fade) // 2
    after = overlap - fade - before
    return torch.cat([torch.zeros(before), ramp, torch.ones(after)])
