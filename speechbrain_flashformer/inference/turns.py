"""Move each turn of a conversation to the output of its speaker.

A network that follows voices over a few seconds often gives a speaker's next
turn to the other output. The voices of all turns, compared over a minute, tell
whose turn it is.

Axes: C channels, S speakers, T, n and m samples, K frames, D features, G
segments, O orders of the speakers.
"""

from functools import partial
from itertools import permutations

import torch
from torch.nn.functional import avg_pool1d, pad

from speechbrain_flashformer.inference.speakers import VoiceProfile

# Seconds that are compared; the first half of them is then final.
HELD = 60.0
FADE = 0.05  # seconds from one order to another
# A frame is speech if its power is at least QUIET times that of a loud frame,
# and belongs to one speaker if that has CLEAR times the power of the others,
# over SMOOTH frames.
QUIET, CLEAR, SMOOTH = 1e-3, 10.0, 15
PAUSE = 8  # frames
# Cost of a change of the order in a pause, and where speech goes on.
IN_PAUSE, IN_SPEECH = 0.5, 5.0
ENOUGH = 30  # frames at which the distance of a voice has half its weight
# Minimum seconds in which one speaker is alone, whoever it is. With less, no
# turn is moved.
HEARD = 8.0
ROUNDS = 15


class TurnOrder:
    """A stage that moves each turn to the output of its speaker.

    Several channels pass unchanged: their speakers have one order, and turns
    that are moved in one channel alone would break it.

    Arguments
    ---------
    num_spks : int
        S.
    sample_rate : int
        Hz.

    Example
    -------
    >>> sources = torch.randn(1, 2, 8000)
    >>> stage = TurnOrder(2, 8000)
    >>> parts = [stage.feed(sources), stage.flush()]
    >>> torch.equal(torch.cat(parts, 2), sources)
    True
    """

    def __init__(self, num_spks, sample_rate):
        self.make_turns = partial(ChannelTurns, num_spks, sample_rate)
        self.turns = None
        self.least = HEARD * sample_rate
        self.held = round(HELD * sample_rate)
        self.pieces, self.size = [], 0

    def feed(self, sources):
        """Take the next samples.

        Arguments
        ---------
        sources : torch.Tensor
            [C, S, n].

        Returns
        -------
        torch.Tensor
            The sources that are final, [C, S, m]; m may be 0.
        """
        if len(sources) > 1:
            self.pieces = [sources[..., :0]]
            return sources
        self.pieces.append(sources)
        self.size += sources.shape[2]
        ready = [sources[..., :0]]
        while self.size >= self.held:
            ready.append(self._release(self.held // 2))
        return torch.cat(ready, 2)

    def flush(self):
        """Return the remaining sources, [C, S, m]."""
        return self._release(self.size)

    def _release(self, samples):
        held = torch.cat(self.pieces, 2)
        self.pieces, self.size = [held[..., samples:]], self.size - samples
        if self.turns is None:
            # Nothing is moved: do not import what only profiles need.
            if held.shape[2] < self.least:
                return held
            self.turns = self.make_turns()
        if not samples:
            return held
        # At most ``held``, so that the result does not depend on the blocks.
        return self.turns.arrange(held[0, :, : self.held], samples)[None]


class ChannelTurns:
    """The turns of one channel.

    Arguments
    ---------
    num_spks : int
        S.
    sample_rate : int
        Hz.

    Example
    -------
    >>> ChannelTurns(2, 8000).arrange(torch.randn(2, 8000), 4000).shape
    torch.Size([2, 4000])
    """

    def __init__(self, num_spks, sample_rate):
        self.profile = VoiceProfile(num_spks, sample_rate)
        self.orders = torch.tensor(list(permutations(range(num_spks))))
        self.fade = round(FADE * sample_rate)
        self.enough = HEARD * sample_rate / (self.profile.size // 2)
        self.last = None  # index of the order at the end of what is final

    def arrange(self, sources, samples):
        """Put the turns in order, and return the first samples.

        Arguments
        ---------
        sources : torch.Tensor
            From the end of what was returned before, [S, T].
        samples : int
            How many samples are final.

        Returns
        -------
        torch.Tensor
            [S, samples].
        """
        features, alone, energy = self.profile.frames(sources)
        hop, size = self.profile.size // 2, self.profile.size
        cut = min(samples // hop, energy.shape[1])
        start, stop = segments(energy, cut)
        if not len(start):
            return self._reorder(sources[:, :samples], None)
        sums, counts = _segment_sums(features, alone, start, stop)
        pause = start[1:] - stop[:-1] >= PAUSE
        change = torch.where(pause, IN_PAUSE, IN_SPEECH)
        first = 0.0
        if self.last is not None:
            first = IN_PAUSE if start[0] >= PAUSE else IN_SPEECH
        change = torch.cat([torch.tensor([first]), change])
        chosen = self._choose(sums, counts, change.tolist())
        final = stop <= cut
        index = self.orders[chosen[final]]
        for g, order in zip(final.nonzero()[:, 0].tolist(), index):
            self.profile.add(sums[g, order], counts[g, order])
        # An order holds until the middle between its segment and the next.
        ends = (stop[:-1] - 1 + start[1:]) * hop // 2 + size // 2
        ends = torch.cat([ends, torch.tensor([sources.shape[1]])])
        ends = ends.clamp(max=sources.shape[1])
        lengths = ends.diff(prepend=torch.zeros(1, dtype=ends.dtype))
        which = chosen.repeat_interleave(lengths)
        return self._reorder(sources[:, :samples], which[:samples])

    def _choose(self, sums, counts, change):
        """Index of the order of each segment, [G]."""
        start = self.last or 0
        kept = torch.full((len(sums),), start)
        if counts.sum() + self.profile.counts.sum() < self.enough:
            return kept
        found = []
        for chosen in (kept, *self._sides(sums, counts)):
            for _ in range(ROUNDS):
                costs = self._costs(sums, counts, chosen)
                before = chosen
                chosen, cost = cheapest_path(costs, change, start)
                if torch.equal(chosen, before):
                    break
            found.append((cost, chosen))
        return min(found, key=lambda pair: pair[0])[1]

    def _sides(self, sums, counts):
        """Orders that put the voices on the two sides of their main axis.

        From the network's own orders alone, the search can end where both
        profiles are a blend of the two voices.
        """
        if len(self.orders) != 2 or not counts.any():
            return []
        heard, output = counts.max(1)
        voice = sums[torch.arange(len(sums)), output, 0]
        voice = voice / heard.clamp(min=1)[:, None]
        weight = heard[:, None] / heard.sum()
        voice = voice - (weight * voice).sum(0)
        axis = torch.linalg.svd(weight.sqrt() * voice, full_matrices=False)[2]
        moved = ((voice @ axis[0] > 0).long() != output).long()
        # Which side is whose: as in the profiles, at first as in the network.
        totals = self._by_speaker(sums, counts, moved)
        (a, b), (c, d) = self.profile.distances(*totals)
        swapped = a + d - b - c
        if not self.profile.counts.any():
            swapped = (weight[:, 0] * moved).sum() - 0.5
        return [1 - moved if swapped > 0 else moved]

    def _by_speaker(self, sums, counts, chosen):
        """Sums [S, 2, D] and counts [S] over all segments in their orders."""
        order = self.orders[chosen]  # [G, S]: the output of each speaker
        each = torch.arange(len(sums))[:, None]
        return sums[each, order].sum(0), counts[each, order].sum(0)

    def _costs(self, sums, counts, chosen):
        """Distances of the segments from the voices they make, [G, O]."""
        total, count = self._by_speaker(sums, counts, chosen)
        total, count = total + self.profile.sums, count + self.profile.counts
        voice = total[:, 0] / count.clamp(min=1)[:, None]
        spread = total[:, 1] - count[:, None] * voice.square()
        variance = spread.sum(0) / count.sum().clamp(min=1) + 1e-6
        mean = sums[:, :, 0] / counts.clamp(min=1)[..., None]  # [G, S, D]
        far = (mean[:, None] - voice[:, None]).square() / variance
        heard, unknown = count[:, None] >= 1, self.profile.UNKNOWN
        far = torch.where(heard, far.sum(3), unknown)  # [G, S, S]
        far = far * (counts / (counts + ENOUGH))[:, None]
        return far[:, torch.arange(len(voice)), self.orders].sum(2)

    def _reorder(self, sources, which):
        """Apply an order to each sample, with a fade from one to another.

        ``which`` [T] has its index; None keeps the last order.
        """
        if which is None:
            which = torch.full((sources.shape[1],), self.last or 0)
        # The order does not change at the ends, where a fade has no room.
        half = self.fade // 2 + 1
        if self.last is not None:
            which[:half] = self.last
        which[-half:] = which[-half:][0]
        self.last = which[-1].item()
        used = which.unique_consecutive().unique().tolist()
        if len(used) == 1:
            return sources[self.orders[used[0]]]
        out = torch.zeros_like(sources)
        for index in used:
            chosen = (which == index).double()[None]
            chosen = pad(chosen, (half, half - 1), mode="replicate")[0]
            run, width = chosen.cumsum(0), 2 * half - 1
            weight = (run[width:] - run[:-width]) / width
            out += weight.to(out) * sources[self.orders[index]]
        return out


def segments(energy, cut):
    """Cut speech at pauses, where the dominant speaker changes, and at ``cut``.

    Arguments
    ---------
    energy : torch.Tensor
        Energy of the frames of each output, [S, K].
    cut : int
        A frame that no segment crosses.

    Returns
    -------
    tuple of torch.Tensor
        First frame of each segment, and the frame after its last, [G] each.

    Example
    -------
    >>> energy = torch.zeros(2, 100)
    >>> energy[0, :40], energy[1, 60:] = 1, 1
    >>> segments(energy, 100)
    (tensor([ 0, 60]), tensor([ 40, 100]))
    """
    total = energy.sum(0)
    if not total.numel() or not total.max():
        return torch.zeros(2, 0, dtype=torch.long).unbind()
    smooth = avg_pool1d(
        energy[None], SMOOTH, 1, SMOOTH // 2, count_include_pad=False
    )[0]
    most, who = smooth.max(0)
    several = most <= CLEAR * (smooth.sum(0) - most)
    label = who.masked_fill(several, len(energy))
    speech = (total > QUIET * total.quantile(0.95)).nonzero()[:, 0]
    new = (
        (speech.diff() > PAUSE)
        | (label[speech].diff() != 0)
        | ((speech >= cut).long().diff() > 0)
    )
    edges = new.nonzero()[:, 0]
    start = torch.cat([speech[:1], speech[edges + 1]])
    stop = torch.cat([speech[edges], speech[-1:]]) + 1
    return start, stop


def cheapest_path(costs, change, start):
    """Choose an order for each segment.

    Arguments
    ---------
    costs : torch.Tensor
        Cost of each order of each segment, [G, O].
    change : list of float
        Cost of a change of the order before each segment.
    start : int
        Order before the first segment.

    Returns
    -------
    tuple
        Indices of the orders with the least sum of costs, [G], and that sum.

    Example
    -------
    >>> costs = torch.tensor([[0.0, 3], [2, 0], [0, 3]])
    >>> cheapest_path(costs, [1, 1, 1], 0)
    (tensor([0, 0, 0]), 2.0)
    >>> cheapest_path(costs, [0, 0, 0], 0)
    (tensor([0, 1, 0]), 0.0)
    """
    reached = [float("inf")] * costs.shape[1]
    reached[start] = 0.0
    before = []  # the order before, for each order of each segment
    for cost, price in zip(costs.tolist(), change):
        least = reached.index(min(reached))
        moved = reached[least] + price
        before.append(
            [o if stay <= moved else least for o, stay in enumerate(reached)]
        )
        reached = [min(stay, moved) + c for stay, c in zip(reached, cost)]
    path = [reached.index(min(reached))]
    for come_from in reversed(before[1:]):
        path.append(come_from[path[-1]])
    return torch.tensor(path[::-1]), min(reached)


def _segment_sums(features, alone, start, stop):
    """Sums of features and squares [G, S, 2, D], and counts [G, S]."""
    both = torch.stack([features, features.square()], 2)  # [S, K, 2, D]
    run = pad(both.cumsum(1), (0, 0, 0, 0, 1, 0))
    count = pad(alone.double().cumsum(1), (1, 0))
    sums = run[:, stop] - run[:, start]
    return sums.transpose(0, 1), (count[:, stop] - count[:, start]).T
