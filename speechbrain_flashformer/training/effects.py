"""Effects of dynamic mixing: what a mixture goes through before it is heard.

An effect is called as ``effect(signals, rng, sample_rate)`` in a ``share`` of
the mixtures, and returns the signals changed. They are [S + 1, T], float32: S
sources, then what no speaker says (zeros, until there is noise). Their sum is
the mixture, so that targets go through all of it, but without the noise.
Effects keep the level of each source, and a source that is silent stays so.
``rng`` is a ``numpy.random.Generator``, from which alone they draw.

Axes: S speakers, T samples.
"""

from dataclasses import dataclass

import numpy as np
from scipy.signal import butter, fftconvolve, firwin2, sosfilt

from speechbrain_flashformer.training.recordings import (
    RecordingReader,
    find_recordings,
)

# Least share of the time that is spoken: by a speaker when turns are taken, in
# a mixture that stands in silence.
LEAST_SPOKEN = 0.2
# A piece so much softer than the source is a pause, and another is drawn.
PAUSE_DB = -30.0
TRIES = 100
# A source begins and ends with a sample above this share of its peak: filters
# ring for ever.
AUDIBLE = 1e-3

# Reverberation times, seconds, and direct to reverberant energy, dB; uniform.
ROOM_T60, DIRECT_DB = (0.1, 0.5), (0.0, 15.0)
# Points of the random curve and taps of the filter that follows it.
EQ_POINTS, EQ_TAPS = 7, 65
# Telephones: lower and upper edge in Hz, steepness as the order of the filter.
TELEPHONE_LOW, TELEPHONE_HIGH = (100.0, 400.0), (2800.0, 3800.0)
TELEPHONE_ORDER = (2, 6)


def level_db(signal):
    """Mean power of a signal [T], in dB; of digital silence -120."""
    return 10 * np.log10(np.mean(np.square(signal, dtype=np.float64)) + 1e-12)


def speech_level_db(signal):
    """Level of a signal [T] without the silence before and after it."""
    return level_db(signal[slice(*_extent(signal))])


def _extent(signal):
    """Where a signal [T] begins and ends."""
    loud = np.abs(signal)
    loud = loud > AUDIBLE * loud.max()
    return int(loud.argmax()), len(loud) - int(loud[::-1].argmax())


def happens(share, rng):
    """Whether it happens this time; a share of 0 draws nothing."""
    return share > 0 and rng.random() < share


# --- who speaks when ---------------------------------------------------------


@dataclass
class Absence:
    """The first speaker is alone, the other sources are 0.

    Needs a loss that is defined for a silent source. The mixture ends with the
    speaker.
    """

    share: float

    def __call__(self, signals, rng, sample_rate):
        """Leave one speaker."""
        begin, end = _extent(signals[0])
        signals = signals[:, begin:end]
        signals[1:-1] = 0
        return signals


@dataclass
class TurnTaking:
    """Each speaker says only a part, a fifth at least, at a random time."""

    share: float

    def __call__(self, signals, rng, sample_rate):
        """Draw a part of each source."""
        taken = signals.copy()
        for row, source in zip(taken[:-1], signals[:-1]):
            begin, end = _extent(source)
            part = _place_part(source[None, begin:end], len(row), rng)
            if part is not None:
                row[:] = part
        return taken


@dataclass
class Silence:
    """A part of the mixture, a fifth at least, stands in silence."""

    share: float

    def __call__(self, signals, rng, sample_rate):
        """Draw a part of the mixture."""
        part = _place_part(signals, signals.shape[1], rng)
        return signals if part is None else part


def _place_part(signals, length, rng):
    """A random piece of signals [R, T] in silence [R, length].

    None where every piece that was drawn had a pause of some source.
    """
    whole = [speech_level_db(x) if x.any() else None for x in signals]
    for _ in range(TRIES):
        size = int(np.ceil(signals.shape[1] * rng.uniform(LEAST_SPOKEN, 1)))
        begin = rng.integers(signals.shape[1] - size + 1)
        piece = signals[:, begin : begin + size]
        levels = [speech_level_db(x) for x in piece]
        changes = [b - a for a, b in zip(whole, levels) if a is not None]
        if not changes or min(changes) > PAUSE_DB:
            break
    else:
        return None
    placed = np.zeros((len(signals), length), np.float32)
    begin = rng.integers(length - size + 1)
    for row, x, a, b in zip(placed, piece, whole, levels):
        if a is not None:
            row[begin : begin + size] = x * 10 ** ((a - b) / 20)
    return placed


# --- filters -----------------------------------------------------------------


@dataclass
class RandomEQ:
    """Each source passes a random filter, as if through another microphone.

    The filter is smooth and its gains are within ``range_db`` up or down.
    """

    share: float
    range_db: float = 6.0

    def __post_init__(self):
        if not self.range_db > 0:
            raise ValueError(
                f"range_db of RandomEQ must be above 0, not {self.range_db}"
            )

    def __call__(self, signals, rng, sample_rate):
        """Draw a filter for each source."""
        return _filtered(signals, lambda x: self._equalise(x, rng))

    def _equalise(self, signal, rng):
        gains = rng.uniform(-self.range_db, self.range_db, EQ_POINTS)
        taps = firwin2(
            EQ_TAPS, np.linspace(0, 1, EQ_POINTS), 10 ** (gains / 20)
        )
        # Its delay is taken out.
        full = np.convolve(signal, taps)
        return full[EQ_TAPS // 2 :][: len(signal)]


@dataclass
class Reverberation:
    """All speakers are in one synthetic room, each at a place of their own."""

    share: float

    def __call__(self, signals, rng, sample_rate):
        """Draw a room, and a place for each source."""
        t60 = rng.uniform(*ROOM_T60)
        return _filtered(
            signals, lambda x: reverberate(x, t60, sample_rate, rng)
        )


@dataclass
class BandLimit:
    """All speakers pass one band, as if recorded from a telephone."""

    share: float

    def __call__(self, signals, rng, sample_rate):
        """Draw a band for all."""
        edges = [rng.uniform(*TELEPHONE_LOW), rng.uniform(*TELEPHONE_HIGH)]
        edges[1] = min(edges[1], 0.95 * sample_rate / 2)
        order = rng.integers(TELEPHONE_ORDER[0], TELEPHONE_ORDER[1] + 1)
        band = butter(order, edges, "bandpass", fs=sample_rate, output="sos")
        return _filtered(signals, lambda x: sosfilt(band, x))


def reverberate(signal, t60, sample_rate, rng):
    """Place a signal [T] in a synthetic room: noise that decays after it.

    The direct sound stays in place. The ratio of direct to reverberant energy
    is drawn between 0 and 15 dB.
    """
    samples = np.arange(1, round(t60 * sample_rate))
    tail = rng.normal(size=len(samples)) * 10 ** (
        -3 * samples / (t60 * sample_rate)
    )
    tail *= 10 ** (-rng.uniform(*DIRECT_DB) / 20) / np.linalg.norm(tail)
    response = np.concatenate([[1.0], tail])
    return fftconvolve(signal, response)[: len(signal)]


def _filtered(signals, change):
    """Change each signal that is not silent; its energy stays the same."""
    for i, signal in enumerate(signals):
        if signal.any():
            heard = change(signal)
            energies = np.vdot(signal, signal), np.vdot(heard, heard)
            signals[i] = heard * np.sqrt(energies[0] / energies[1])
    return signals


# --- noise, polarity ---------------------------------------------------------


@dataclass
class Noise:
    """Noise in the mixture; the sources stay clean.

    ``snr_db`` holds the least and the greatest ratio of the loudest source to
    the noise; that of WHAM! (arXiv:1907.01160) is -6 to 3 dB. ``folder`` holds
    recordings of noise, as ``find_recordings`` takes them; without one it has
    a random spectrum.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> signals = np.ones((3, 800)) * [[1], [1], [0]]
    >>> noisy = Noise(share=1, snr_db=(20, 20))(signals, rng, 8000)
    >>> round(float(level_db(noisy[-1])))
    -20
    """

    share: float
    snr_db: tuple = (5.0, 35.0)
    folder: str = ""

    def __post_init__(self):
        if len(self.snr_db) != 2 or self.snr_db[0] > self.snr_db[1]:
            raise ValueError(
                "snr_db of Noise must be the least and the greatest ratio, "
                f"not {self.snr_db}"
            )
        self.recordings = None
        if self.folder and self.share:
            found = find_recordings(self.folder)
            self.recordings = RecordingReader([x.path for x in found], "noise")

    def __call__(self, signals, rng, sample_rate):
        """Draw a noise and its level."""
        noise = self._draw(signals.shape[1], sample_rate, rng)
        loudest = max(speech_level_db(source) for source in signals[:-1])
        gain_db = loudest - rng.uniform(*self.snr_db) - level_db(noise)
        signals[-1] += noise * 10 ** (gain_db / 20)
        return signals

    def _draw(self, length, sample_rate, rng):
        if self.recordings is None:
            return random_noise(length, rng)
        index = rng.integers(len(self.recordings.paths))
        noise = self.recordings.cut(index, length, sample_rate, rng)
        return np.resize(noise, length)


@dataclass
class PolarityFlip:
    """The polarity of all is inverted.

    Pressure that makes one microphone's signal rise makes another's fall;
    speech is not the same both ways, and a corpus may have one polarity. All of
    it: a microphone that hears both speakers has one.
    """

    share: float

    def __call__(self, signals, rng, sample_rate):
        """Invert all."""
        return -signals


def random_noise(length, rng):
    """Noise [T] whose power falls with frequency, by 0 to 2 orders."""
    spectrum = np.fft.rfft(rng.normal(size=length))
    frequency = np.maximum(np.arange(len(spectrum)), 1)
    return np.fft.irfft(spectrum / frequency ** rng.uniform(0, 1), length)
