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


def separate_long(blocks, separate, sample_rate, plan, num_spks):
    """Separate a recording that comes in blocks.

    A recording no longer than one chunk is separated whole.

    Arguments
    ---------
    blocks : iterable of torch.Tensor
        The mixture in order, each [C, n]; channels are recordings apart.
    separate : callable
        [B, T] -> [B, T, S], a network.
    sample_rate : int
        Hz.
    plan : ChunkPlan
        Lengths of chunk and overlap, and chunks per call.
    num_spks : int
        S.

    Yields
    ------
    torch.Tensor
        The sources in order, each [C, n, S]; as long as the blocks in all.

    Example
    -------
    >>> mixture = torch.randn(1, 80000)
    >>> twice = lambda x: torch.stack([x, x], 2)
    >>> plan = ChunkPlan(chunk=16000, overlap=4000)
    >>> parts = separate_long(mixture.split(999, 1), twice, 8000, plan, 2)
    >>> torch.equal(torch.cat(list(parts), 1), twice(mixture))
    True
    """
    orders = None
    held = None  # the last estimates, [C, overlap, S], not given out yet
    fade = _fade_in(plan.overlap, min(round(FADE * sample_rate), plan.overlap))
    for start, chunks, is_last in _batches(blocks, plan):
        C = chunks.shape[1]
        estimates = separate(chunks.flatten(0, 1)).unflatten(0, (-1, C))
        for k, estimate in enumerate(estimates):
            last = is_last and k == len(estimates) - 1
            if orders is None:
                orders = [SpeakerOrder(num_spks, sample_rate) for _ in range(C)]
            # The last chunk begins early, to be as long as the others.
            fresh = estimate[:, start[k] :]
            arranged = []
            for c, (order, mine) in enumerate(zip(orders, fresh)):
                index = order.arrange(
                    None if held is None else held[c].T,
                    mine.T,
                    arranged[0].T if c else None,
                )
                arranged.append(mine[:, index])
            fresh = torch.stack(arranged)
            if held is None:
                merged = fresh
            else:
                shared = held + (fresh[:, : plan.overlap] - held) * fade
                merged = torch.cat([shared, fresh[:, plan.overlap :]], 1)
            if last:
                yield merged
            else:
                split = merged.shape[1] - plan.overlap
                yield merged[:, :split]
                held = merged[:, split:]


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


def _batches(blocks, plan):
    """Cut blocks into chunks.

    Yields (where each chunk's news begin, chunks [B, C, T], whether these end
    the recording). News are what follows the estimates given out so far.
    """
    waiting, pieces, size = [], [], 0
    offset = 0  # of the next chunk among the samples kept
    for block in blocks:
        pieces.append(block)
        size += block.shape[1]
        # One sample more, or it could be the last chunk of all.
        while size > offset + plan.chunk:
            kept = torch.cat(pieces, 1)[:, offset:]
            waiting.append(kept[:, : plan.chunk])
            pieces, size, offset = [kept], kept.shape[1], plan.hop
            if len(waiting) == plan.batch:
                yield [0] * plan.batch, torch.stack(waiting), False
                waiting = []
    if waiting:
        yield [0] * len(waiting), torch.stack(waiting), False
    if size:
        missing = max(0, offset + plan.chunk - size)
        early = min(-(-missing // plan.align) * plan.align, offset)
        last = torch.cat(pieces, 1)[:, offset - early :]
        yield [early], last[None], True


def _fade_in(overlap, fade):
    """Weights of the newer chunk over an overlap, [overlap, 1]."""
    ramp = (torch.arange(fade) + 0.5) / fade
    before = (overlap - fade) // 2
    after = overlap - fade - before
    return torch.cat([torch.zeros(before), ramp, torch.ones(after)])[:, None]
