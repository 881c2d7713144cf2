"""Long recordings: separate chunk by chunk, with the speakers kept in order.

Chunks overlap. In an overlap both know the same samples, which tells how the
next chunk's outputs continue those before; when that is unclear, as in a
pause, a profile of each speaker's voice, gathered over the whole recording,
decides. Memory does not grow with the recording.

Axes: C channels of the recording, T samples, S speakers, K frames, D features.
"""

from itertools import permutations

import torch
from torch.nn.functional import avg_pool1d
from torchaudio.functional import melscale_fbanks

# Seconds over which one chunk gives way to the next, in mid-overlap.
FADE = 0.05
ENVELOPE_FRAME = 0.032  # seconds


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


class SpeakerOrder:
    """Says which output of a new chunk is which speaker of those before.

    Arguments
    ---------
    num_spks : int
        S.
    sample_rate : int
        Hz.

    Example
    -------
    >>> order = SpeakerOrder(2, 8000)
    >>> chunk = torch.randn(2, 16000)
    >>> order.arrange(None, chunk)
    [0, 1]
    >>> order.arrange(chunk[:, -4000:], chunk[:, -4000:].flip(0))
    [1, 0]
    """

    # A profile may say so much against an order, and no more: two chunks that
    # agree to 30 dB in their overlap are beyond doubt.
    MOST_DOUBT = 30.0
    # What a voice never heard before costs; 15 s of one speaker lie 1 to 4
    # apart, those of two speakers mostly above 8.
    UNKNOWN = 8.0
    # What it costs when a speaker has nothing of the first channel's envelope.
    # Envelopes of two conversations correlate by 0.1 or 0.2, whose cube is
    # nothing; those of one conversation by nearly 1.
    UNLIKE = 30.0

    def __init__(self, num_spks, sample_rate):
        self.profile = VoiceProfile(num_spks, sample_rate)
        self.orders = list(permutations(range(num_spks)))
        self.frame = round(ENVELOPE_FRAME * sample_rate)

    def arrange(self, before, fresh, first=None):
        """Choose the order in which a new chunk continues the last.

        Arguments
        ---------
        before : torch.Tensor or None
            What the last chunk says about the overlap, [S, overlap]; None for
            the first chunk.
        fresh : torch.Tensor
            The new chunk from there on, [S, T].
        first : torch.Tensor, optional
            The same in the recording's first channel, in order, [S, T].

        Returns
        -------
        list of int
            ``fresh[order]`` continues ``before``.
        """
        S = len(fresh)
        errors, energy = torch.ones(S, S), S
        if before is not None:
            # In the middle both chunks have heard most of what is around.
            weight = torch.hann_window(before.shape[1], periodic=False) ** 2
            shared = weight * fresh[:, : before.shape[1]]
            before = weight * before
            # |a - b|^2 of every pair, so that each order is a sum.
            errors = (before[:, None] - shared).square().sum(2).double()
            energy = before.square().sum() + shared.square().sum()
        sums, counts = self.profile.measure(fresh)
        distances = self.profile.distances(sums, counts, self.UNKNOWN)
        alike = torch.zeros(S, S)
        if first is not None:
            alike = envelope_correlation(first, fresh, self.frame) ** 3

        def _cost(order):
            pairs = [(i, j) for i, j in enumerate(order)]
            error = sum(errors[i, j] for i, j in pairs) / (energy + 1e-20)
            mismatch = 10 * torch.log10(error + 1e-12).item()
            unlike = S - sum(alike[i, j].item() for i, j in pairs)
            voices = sum(distances[i][j] for i, j in pairs)
            return mismatch + self.UNLIKE * unlike, voices

        costs = [_cost(order) for order in self.orders]
        least = min(voices for _, voices in costs)
        totals = [
            signals + min(voices - least, self.MOST_DOUBT)
            for signals, voices in costs
        ]
        best = self.orders[totals.index(min(totals))]
        index = list(best)
        self.profile.add(sums[index], counts[index])
        return index


def envelope_correlation(one, other, frame):
    """Correlation of the envelopes of signals that sound at the same time.

    Arguments
    ---------
    one, other : torch.Tensor
        [S, T] each.
    frame : int
        Samples that make one value of the envelope.

    Returns
    -------
    torch.Tensor
        [S, S], each of -1 to 1; 0 where an envelope is constant.

    Example
    -------
    >>> x = torch.randn(2, 8000) * torch.linspace(0, 9, 8000).sin()
    >>> envelope_correlation(x[:1], -0.5 * x[:1], 80).round()
    tensor([[1.]])
    """

    def _envelope(signals):
        frame_power = avg_pool1d(signals[None].square(), frame, ceil_mode=True)[
            0
        ]
        envelope = frame_power.sqrt()
        envelope = envelope - envelope.mean(1, keepdim=True)
        return envelope / envelope.norm(dim=1, keepdim=True).clamp(min=1e-20)

    return _envelope(one) @ _envelope(other).T


class VoiceProfile:
    """Means of what tells voices apart: spectral envelope and pitch.

    Per frame, a log-mel spectrum without its mean and the autocorrelation at
    the lags of a voice's pitch, over the frames that are one speaker's alone.

    Arguments are those of ``SpeakerOrder``.
    """

    WINDOW = 0.064  # seconds
    BANDS, LAGS = 24, 45
    HIGHEST, LOWEST = 400, 73  # pitch, Hz
    # Frames of one speaker: so much above the others, and so far below the
    # loudest frame at most, in power.
    ALONE, FLOOR = 4.0, 1e-4

    def __init__(self, num_spks, sample_rate):
        self.size = round(self.WINDOW * sample_rate)
        self.window = torch.hann_window(self.size)
        self.mel = melscale_fbanks(
            self.size // 2 + 1,
            100.0,
            min(3800.0, sample_rate / 2),
            self.BANDS,
            sample_rate,
        )
        lags = sample_rate / torch.linspace(self.HIGHEST, self.LOWEST, 91)
        lags = torch.linspace(lags[0], lags[-1], 2 * self.LAGS)
        self.lags = lags.round().long().clamp(max=self.size - 1)
        width = self.BANDS + self.LAGS
        self.sums = torch.zeros(num_spks, 2, width, dtype=torch.double)
        self.counts = torch.zeros(num_spks, dtype=torch.double)

    def measure(self, estimate):
        """Sums of features and of their squares over the frames that tell.

        estimate [S, T] -> sums [S, 2, D] and counts of frames [S].
        """
        estimate = estimate.detach().float().cpu()
        sums, counts = (
            torch.zeros_like(self.sums),
            torch.zeros_like(self.counts),
        )
        if estimate.shape[1] < self.size:
            return sums, counts
        power = torch.stft(
            estimate,
            self.size,
            self.size // 2,
            window=self.window,
            center=False,
            return_complex=True,
        )
        power = power.abs().square().transpose(1, 2)  # [S, K, F]
        energy = power.sum(2)
        others = (energy.sum(0) - energy).clamp(min=1e-20)
        alone = (energy > self.ALONE * others) & (
            energy > self.FLOOR * energy.max()
        )
        for s, mine in enumerate(alone):
            if not mine.any():
                continue
            features = self._features(power[s, mine]).double()
            sums[s] = torch.stack([features.sum(0), features.square().sum(0)])
            counts[s] = len(features)
        return sums, counts

    def _features(self, power):
        """[K, F] -> [K, D]."""
        mel = torch.log(power @ self.mel + 1e-10)
        mel = mel - mel.mean(1, keepdim=True)
        pitch = torch.fft.irfft(power, self.size)
        pitch = pitch[:, self.lags] / pitch[:, :1].clamp(min=1e-10)
        # Pitch varies less in these units than the envelope: to count alike.
        pitch = 3 * pitch.unflatten(1, (self.LAGS, 2)).mean(2)
        return torch.cat([mel, pitch], 1)

    def add(self, sums, counts):
        """Add what was measured to each speaker's profile."""
        self.sums += sums
        self.counts += counts

    def distances(self, sums, counts, unknown):
        """How far each profile is from each new voice, [S][S] numbers.

        Squared differences of the means, in units of the variance between
        frames; ``unknown`` where a profile has no frames, 0 where the new
        voice has none.
        """
        S = len(counts)
        total = self.counts.sum()
        if not total:
            return [[0.0] * S for _ in range(S)]
        means = self.sums[:, 0] / self.counts.clamp(min=1)[:, None]
        squares = self.sums[:, 1] - self.counts[:, None] * means.square()
        variance = squares.sum(0) / total + 1e-6
        news = sums[:, 0] / counts.clamp(min=1)[:, None]
        # Few frames tell little: their mean is wide of the speaker's.
        trust = counts / (counts + 1 / self.WINDOW)

        def _distance(i, j):
            if not counts[j]:
                return 0.0
            far = ((means[i] - news[j]).square() / variance).sum().item()
            far = far if self.counts[i] else unknown
            return far * trust[j].item()

        return [[_distance(i, j) for j in range(S)] for i in range(S)]
