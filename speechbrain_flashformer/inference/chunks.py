"""Long recordings: separate chunk by chunk, with the speakers kept in order.

Chunks overlap. In an overlap both know the same samples, which tells how the
next chunk's outputs continue those before; when that is unclear, as in a
pause, a profile of each speaker's voice, gathered over the whole recording,
decides. Memory does not grow with the recording.

Axes: C channels of the recording, T samples, S speakers.
"""

import torch

from speechbrain_flashformer.inference.speakers import SpeakerOrder

# Seconds over which one chunk gives way to the next, in mid-overlap.
FADE = 0.05


class ChunkPlan:
    """How a recording is cut: chunks of equal length that overlap.

    Arguments
    ---------
    chunk : int
        Samples per chunk, more than twice the overlap.
    overlap : int
        Samples that neighbours share.
    align : int
        Chunks begin at multiples of so many samples: the samples per token of
        the network, so that a chunk has the same tokens as the whole.
    batch : int
        Chunks that the network is given at once.
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
    """Separates a recording of any length that comes in blocks.

    A recording no longer than one chunk is separated whole.

    Arguments
    ---------
    network : callable
        [B, T] -> [B, S, T].
    sample_rate : int
        Hz.
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
        self.pieces, self.size = [], 0  # samples not cut yet
        self.offset = 0  # of the next chunk among them
        self.waiting = []  # chunks until there are enough for a call
        self.orders = None
        self.held = None  # the last estimates, [C, S, overlap]
        fade = min(round(FADE * sample_rate), plan.overlap)
        self.fade = _fade_in(plan.overlap, fade)

    def feed(self, block):
        """Take samples [C, n], return sources that are ready, [C, S, m]."""
        ready = [block.new_zeros(len(block), self.num_spks, 0)]
        self.pieces.append(block)
        self.size += block.shape[1]
        plan = self.plan
        # One sample more, or it could be the last chunk of all.
        while self.size > self.offset + plan.chunk:
            kept = torch.cat(self.pieces, 1)[:, self.offset :]
            self.waiting.append(kept[:, : plan.chunk])
            self.pieces, self.size = [kept], kept.shape[1]
            self.offset = plan.hop
            if len(self.waiting) == plan.batch:
                ready += self._run_waiting()
        return torch.cat(ready, 2)

    def flush(self):
        """Return the rest, [C, S, m]."""
        ready = self._run_waiting()
        # The last chunk begins early, to be as long as the others.
        plan, missing = self.plan, self.offset + self.plan.chunk - self.size
        early = -(-max(0, missing) // plan.align) * plan.align
        early = min(early, self.offset)
        last = torch.cat(self.pieces, 1)[:, self.offset - early :]
        if self.held is None and len(last) == 1:
            return self.network(last)  # whole, with nothing to compare it with
        ready.append(self._join(self.network(last)[..., early:]))
        return torch.cat([*ready, self.held], 2)

    def _run_waiting(self):
        """Sources of the chunks that wait, those that are ready."""
        if not self.waiting:
            return []
        chunks, self.waiting = torch.stack(self.waiting), []
        estimates = self.network(chunks.flatten(0, 1))
        return [self._join(x) for x in estimates.split(chunks.shape[1])]

    def _join(self, fresh):
        """What a chunk adds, but for its own overlap, which is held back.

        fresh [C, S, T], from where the samples held begin.
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
    """Weights of the newer chunk over an overlap, [overlap]."""
    ramp = (torch.arange(fade) + 0.5) / fade
    before = (overlap - fade) // 2
    after = overlap - fade - before
    return torch.cat([torch.zeros(before), ramp, torch.ones(after)])
