"""Find the permutation of speakers between consecutive chunks.

Axes: S speakers, T samples, K frames, F frequencies, D features.
"""

from itertools import permutations

import torch
from torch.nn.functional import avg_pool1d

ENVELOPE_FRAME = 0.032  # seconds


class SpeakerOrder:
    """Chooses the order of speakers of each new chunk of a recording.

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

    # Largest cost in dB that the voice profile can add to an order. If two
    # chunks agree to 30 dB in their overlap, the order is certain.
    MOST_DOUBT = 30.0
    # Cost of a speaker whose envelope does not correlate with that in the
    # first channel. Envelopes of two conversations correlate by 0.1 or 0.2,
    # whose cube is almost 0; those of one conversation by nearly 1.
    UNLIKE = 30.0

    def __init__(self, num_spks, sample_rate):
        self.profile = VoiceProfile(num_spks, sample_rate)
        self.orders = list(permutations(range(num_spks)))
        self.frame = round(ENVELOPE_FRAME * sample_rate)

    def arrange(self, before, fresh, first=None):
        """Choose the order of speakers in which a new chunk continues.

        Also adds the chunk to the voice profiles.

        Arguments
        ---------
        before : torch.Tensor or None
            Estimates of the last chunk for the overlap, [S, overlap]; None for
            the first chunk.
        fresh : torch.Tensor
            Estimates of the new chunk from the start of the overlap, [S, T].
        first : torch.Tensor, optional
            Those of the first channel of the recording, in their final order,
            [S, T].

        Returns
        -------
        list of int
            The order: ``fresh[order]`` continues ``before``.
        """
        S = len(fresh)
        errors, energy = torch.ones(S, S), S
        if before is not None:
            # In the middle of the overlap both chunks have most context.
            weight = torch.hann_window(before.shape[1], periodic=False) ** 2
            shared = weight * fresh[:, : before.shape[1]]
            before = weight * before
            # |a - b|^2 of every pair; the error of an order is a sum of these.
            errors = (before[:, None] - shared).square().sum(2).double()
            energy = before.square().sum() + shared.square().sum()
        sums, counts = self.profile.measure(fresh)
        distances = self.profile.distances(sums, counts)
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
    """Correlate the envelopes of simultaneous signals.

    Arguments
    ---------
    one, other : torch.Tensor
        Signals of the same time, [S, T] each.
    frame : int
        Samples per value of the envelope.

    Returns
    -------
    torch.Tensor
        Correlations, [S, S], from -1 to 1; 0 where an envelope is constant.

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
    """Mean voice features of each speaker: spectral envelope and pitch.

    The features of a frame are its log-mel spectrum minus the mean, and its
    autocorrelation at the lags of voice pitch. Only frames in which one speaker
    dominates are used.

    Arguments
    ---------
    num_spks : int
        S.
    sample_rate : int
        Hz.

    Example
    -------
    >>> profile = VoiceProfile(2, 8000)
    >>> sums, counts = profile.measure(torch.randn(2, 8000))
    >>> sums.shape, counts.shape
    (torch.Size([2, 2, 69]), torch.Size([2]))
    """

    WINDOW = 0.064  # seconds
    BANDS, LAGS = 24, 45
    HIGHEST, LOWEST = 400, 73  # pitch, Hz
    # A frame belongs to one speaker if its power is ALONE times that of the
    # others, and at least FLOOR times that of the LOUD-th loudest frame: the
    # loudest ones may be a click.
    ALONE, FLOOR, LOUD = 4.0, 1e-4, 8
    # Distance of a profile without frames. The distance between two samples of
    # 15 s is 1 to 4 for one speaker and mostly above 8 for two.
    UNKNOWN = 8.0

    def __init__(self, num_spks, sample_rate):
        from torchaudio.functional import melscale_fbanks  # slow import

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
        """Sum the features over the frames in which one speaker dominates.

        Arguments
        ---------
        estimate : torch.Tensor
            Separated signals, [S, T].

        Returns
        -------
        tuple of torch.Tensor
            Sums of features and of their squares, [S, 2, D], and numbers of
            frames, [S].
        """
        features, alone, _ = self.frames(estimate)
        sums = torch.stack([features, features.square()], 1).sum(2)
        return sums, alone.sum(1).double()

    def frames(self, estimate):
        """Compute the features of the frames in which one speaker dominates.

        Arguments
        ---------
        estimate : torch.Tensor
            Separated signals, [S, T].

        Returns
        -------
        tuple of torch.Tensor
            Features [S, K, D], 0 in all other frames; whether the speaker
            dominates, [S, K]; energy of the frames, [S, K].
        """
        estimate = estimate.detach().float().cpu()
        power = estimate.new_zeros(len(estimate), 0, self.size // 2 + 1)
        if estimate.shape[1] >= self.size:
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
        loudest = energy.sum(0).topk(min(self.LOUD, energy.shape[1])).values
        loud = energy > self.FLOOR * loudest[-1:]
        alone = (energy > self.ALONE * others) & loud
        features = torch.zeros(
            *energy.shape, self.sums.shape[2], dtype=torch.double
        )
        if alone.any():  # the FFT takes no empty input
            features[alone] = self._features(power[alone]).double()
        return features, alone, energy

    def _features(self, power):
        """Features [K, D] of power spectra [K, F]."""
        mel = torch.log(power @ self.mel + 1e-10)
        mel = mel - mel.mean(1, keepdim=True)
        pitch = torch.fft.irfft(power, self.size)
        pitch = pitch[:, self.lags] / pitch[:, :1].clamp(min=1e-10)
        # The autocorrelation varies less than the log-mel spectrum; the factor
        # balances their weights.
        pitch = 3 * pitch.unflatten(1, (self.LAGS, 2)).mean(2)
        return torch.cat([mel, pitch], 1)

    def add(self, sums, counts):
        """Add sums and counts, as from ``measure``, to the profiles."""
        self.sums += sums
        self.counts += counts

    def distances(self, sums, counts):
        """Distances between the profiles and new voices.

        Arguments
        ---------
        sums, counts : torch.Tensor
            The new voices, as from ``measure``.

        Returns
        -------
        list of list of float
            [profile][voice]: squared differences of the means in units of the
            variance between frames, reduced for voices with few frames; 0 for
            a voice without frames.
        """
        S = len(counts)
        total = self.counts.sum()
        if not total:
            return [[0.0] * S for _ in range(S)]
        means = self.sums[:, 0] / self.counts.clamp(min=1)[:, None]
        squares = self.sums[:, 1] - self.counts[:, None] * means.square()
        variance = squares.sum(0) / total + 1e-6
        news = sums[:, 0] / counts.clamp(min=1)[:, None]
        # The mean of few frames is an inaccurate estimate of the voice.
        trust = counts / (counts + 1 / self.WINDOW)

        def _distance(i, j):
            if not counts[j]:
                return 0.0
            far = ((means[i] - news[j]).square() / variance).sum().item()
            far = far if self.counts[i] else self.UNKNOWN
            return far * trust[j].item()

        return [[_distance(i, j) for j in range(S)] for i in range(S)]
