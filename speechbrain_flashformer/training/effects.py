"""Effects of dynamic mixing.

An effect is called as ``effect(signals, rng, sample_rate)`` for a random
``share`` (0 to 1) of the mixtures and returns the changed signals. They are
[S + 1, T], float32: S sources and the noise (zeros by default). Their sum is
the mixture, so that effects apply to the targets too, except for noise. Effects
keep the level of each source, and a silent source stays silent. ``rng`` is a
``numpy.random.Generator``, the only source of random numbers.

Axes: S speakers, T samples.
"""

from dataclasses import dataclass

import numpy as np
from scipy.signal import butter, fftconvolve, firwin2, sosfilt

from speechbrain_flashformer.training.recordings import (
    RecordingReader,
    find_recordings,
)

# Minimum length of the part of a source that TurnTaking keeps, or of a mixture
# that Silence keeps, relative to the whole.
LEAST_SPOKEN = 0.2
# A part this much softer than the source is a pause, and another is drawn.
PAUSE_DB = -30.0
TRIES = 100
# A source starts and ends with a sample above this share of its peak, because
# the tail of a filtered signal never reaches 0.
AUDIBLE = 1e-3

# Ranges of the reverberation time (T60, seconds) and of the ratio of direct to
# reverberant energy (dB), both uniform.
ROOM_T60, DIRECT_DB = (0.1, 0.5), (0.0, 15.0)
# Points of the random frequency response, and taps of the filter.
EQ_POINTS, EQ_TAPS = 7, 65
# Telephone bands: ranges of the edges (Hz) and of the order of the filter.
TELEPHONE_LOW, TELEPHONE_HIGH = (100.0, 400.0), (2800.0, 3800.0)
TELEPHONE_ORDER = (2, 6)


def level_db(signal):
    """Mean power of a signal [T] in dB; -120 for digital silence."""
    return 10 * np.log10(np.mean(np.square(signal, dtype=np.float64)) + 1e-12)


def speech_level_db(signal):
    """Level of a signal [T] in dB, without silence at its start and end."""
    return level_db(signal[slice(*_extent(signal))])


def _extent(signal):
    """Start and end of a signal [T] without silence, in samples."""
    loud = np.abs(signal)
    loud = loud > AUDIBLE * loud.max()
    return int(loud.argmax()), len(loud) - int(loud[::-1].argmax())


def happens(share, rng):
    """Draw whether an effect applies; a share of 0 draws no random number."""
    return share > 0 and rng.random() < share


# --- who speaks when ---------------------------------------------------------


@dataclass
class Absence:
    """Only the first speaker is present; the other sources are 0.

    Requires a loss that is defined for a silent source. The mixture is cut to
    the speech of that speaker.
    """

    share: float

    def __call__(self, signals, rng, sample_rate):
        """Remove all speakers except the first."""
        begin, end = _extent(signals[0])
        signals = signals[:, begin:end]
        signals[1:-1] = 0
        return signals


@dataclass
class TurnTaking:
    """Keep a random part of each source, at a random time.

    The part is at least ``LEAST_SPOKEN`` of the source.
    """

    share: float

    def __call__(self, signals, rng, sample_rate):
        """Draw a part of each source and its new time."""
        taken = signals.copy()
        for row, source in zip(taken[:-1], signals[:-1]):
            begin, end = _extent(source)
            part = _place_part(source[None, begin:end], len(row), rng)
            if part is not None:
                row[:] = part
        return taken


@dataclass
class Silence:
    """Keep a random part of the mixture, with silence around it.

    The part is at least ``LEAST_SPOKEN`` of the mixture.
    """

    share: float

    def __call__(self, signals, rng, sample_rate):
        """Draw a part of the mixture and its new time."""
        part = _place_part(signals, signals.shape[1], rng)
        return signals if part is None else part


def _place_part(signals, length, rng):
    """Place a random part of signals [R, T] in silence, [R, length].

    Returns None if some source has a pause in every part that was drawn.
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
    """Filter each source at random, to imitate different microphones.

    Arguments
    ---------
    share : float
        Share of the mixtures.
    range_db : float
        Maximum gain or attenuation of the smooth filter, in dB, above 0.

    Raises
    ------
    ValueError
        If range_db is not above 0.
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
        return _filter_sources(signals, lambda x: self._equalize(x, rng))

    def _equalize(self, signal, rng):
        gains = rng.uniform(-self.range_db, self.range_db, EQ_POINTS)
        taps = firwin2(
            EQ_TAPS, np.linspace(0, 1, EQ_POINTS), 10 ** (gains / 20)
        )
        # Remove the delay of the filter.
        full = np.convolve(signal, taps)
        return full[EQ_TAPS // 2 :][: len(signal)]


@dataclass
class Reverberation:
    """Place all speakers in one synthetic room, at different positions."""

    share: float

    def __call__(self, signals, rng, sample_rate):
        """Draw a room, and a room impulse response for each source."""
        t60 = rng.uniform(*ROOM_T60)
        return _filter_sources(
            signals, lambda x: reverberate(x, t60, sample_rate, rng)
        )


@dataclass
class BandLimit:
    """Limit all speakers to one band, as a telephone does."""

    share: float

    def __call__(self, signals, rng, sample_rate):
        """Draw one band for all sources."""
        edges = [rng.uniform(*TELEPHONE_LOW), rng.uniform(*TELEPHONE_HIGH)]
        edges[1] = min(edges[1], 0.95 * sample_rate / 2)
        order = rng.integers(TELEPHONE_ORDER[0], TELEPHONE_ORDER[1] + 1)
        band = butter(order, edges, "bandpass", fs=sample_rate, output="sos")
        return _filter_sources(signals, lambda x: sosfilt(band, x))


def reverberate(signal, t60, sample_rate, rng):
    """Add synthetic reverberation: the impulse response is decaying noise.

    The direct sound is not delayed. The ratio of direct to reverberant energy
    is drawn from ``DIRECT_DB``.

    Arguments
    ---------
    signal : numpy.ndarray
        [T].
    t60 : float
        Reverberation time, in seconds.
    sample_rate : int
        Hz.
    rng : numpy.random.Generator
        Draws the impulse response.

    Returns
    -------
    numpy.ndarray
        [T].

    Example
    -------
    >>> reverberate(np.ones(800), 0.2, 8000, np.random.default_rng(0)).shape
    (800,)
    """
    samples = np.arange(1, round(t60 * sample_rate))
    tail = rng.normal(size=len(samples)) * 10 ** (
        -3 * samples / (t60 * sample_rate)
    )
    tail *= 10 ** (-rng.uniform(*DIRECT_DB) / 20) / np.linalg.norm(tail)
    response = np.concatenate([[1.0], tail])
    return fftconvolve(signal, response)[: len(signal)]


def _filter_sources(signals, change):
    """Apply a filter to each signal that is not silent, and keep its energy."""
    for i, signal in enumerate(signals):
        if signal.any():
            filtered = change(signal)
            energies = np.vdot(signal, signal), np.vdot(filtered, filtered)
            signals[i] = filtered * np.sqrt(energies[0] / energies[1])
    return signals


# --- noise, polarity ---------------------------------------------------------


@dataclass
class Noise:
    """Add noise to the mixture; the sources stay clean.

    Arguments
    ---------
    share : float
        Share of the mixtures.
    snr_db : tuple of float
        Minimum and maximum ratio of the loudest source to the noise, in dB;
        -6 to 3 in WHAM! (arXiv:1907.01160).
    folder : str
        Recordings of noise, as ``find_recordings`` takes them; if empty, the
        noise has a random spectrum.

    Raises
    ------
    FileNotFoundError, ValueError
        If the folder has no recordings, or snr_db is not a range.

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
        """Draw the noise and its level."""
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
    """Invert the polarity of all signals.

    Microphones differ in polarity, the waveform of speech is not symmetric, and
    a corpus may have only one polarity. All signals are inverted together,
    because one microphone records all speakers.
    """

    share: float

    def __call__(self, signals, rng, sample_rate):
        """Invert all signals."""
        return -signals


def random_noise(length, rng):
    """Noise [T] whose power falls as 1 / frequency^a, a from 0 to 2."""
    spectrum = np.fft.rfft(rng.normal(size=length))
    frequency = np.maximum(np.arange(len(spectrum)), 1)
    return np.fft.irfft(spectrum / frequency ** rng.uniform(0, 1), length)
