"""Effects of dynamic mixing on the sound.

An effect is called as ``effect(signals, rng, sample_rate)`` for a random
``share`` (0 to 1) of the mixtures. It returns the changed signals and may
overwrite its input. Signals are [S + 1, T], float32: S sources and the noise
(zeros by default). Their sum is the mixture, so that effects apply to the
targets too, except for noise and clipping. Effects keep the level of each
source where it speaks, and a silent source stays silent. ``rng`` is a
``numpy.random.Generator``, the only source of random numbers.

Axes: S speakers, T samples.
"""

from dataclasses import dataclass

import numpy as np
from scipy.signal import butter, fftconvolve, firwin2, sosfilt

from speechbrain_flashformer.training.levels import level_db, speech_level_db
from speechbrain_flashformer.training.recordings import (
    RecordingReader,
    find_recordings,
)

# Ranges of the reverberation time (T60, seconds) and of the ratio of direct to
# reverberant energy (dB), both uniform.
ROOM_T60, DIRECT_DB = (0.1, 0.5), (0.0, 15.0)
# Points of the random frequency response, and taps of the filter.
EQ_POINTS, EQ_TAPS = 7, 65
# Telephone bands: ranges of the edges (Hz) and of the order of the filter.
TELEPHONE_LOW, TELEPHONE_HIGH = (100.0, 400.0), (2800.0, 3800.0)
TELEPHONE_ORDER = (2, 6)


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
    """Place all speakers in one synthetic room, at different positions.

    Arguments
    ---------
    share : float
        Share of the mixtures.
    """

    share: float

    def __call__(self, signals, rng, sample_rate):
        """Draw a room, and a room impulse response for each source."""
        t60 = rng.uniform(*ROOM_T60)
        return _filter_sources(
            signals, lambda x: reverberate(x, t60, sample_rate, rng)
        )


@dataclass
class BandLimit:
    """Limit all speakers to one band, as a telephone does.

    Arguments
    ---------
    share : float
        Share of the mixtures.
    """

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


# --- noise, clipping, polarity -----------------------------------------------


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
        If the folder has no recordings, one of them is not mono, is empty or
        cannot be read, or snr_db is not a range.

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
        _check_range("snr_db of Noise", self.snr_db)
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
class Clipping:
    """Clip the mixture, as an overloaded microphone does.

    The sources are not clipped: the distortion counts as noise.

    Arguments
    ---------
    share : float
        Share of the mixtures.
    above_db : tuple of float
        Minimum and maximum of the level at which the mixture clips, in dB
        above its RMS level without the silence at its start and end.

    Raises
    ------
    ValueError
        If above_db is not a range.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> sine = np.sin(np.arange(8000) / 9)
    >>> signals = np.stack([sine, np.zeros(8000)])
    >>> clipped = Clipping(1, above_db=(0, 0))(signals, rng, 8000)
    >>> round(float(clipped.sum(0).max()), 2), round(float(clipped[0].max()), 2)
    (0.71, 1.0)
    """

    share: float
    above_db: tuple = (3.0, 14.0)

    def __post_init__(self):
        _check_range("above_db of Clipping", self.above_db)

    def __call__(self, signals, rng, sample_rate):
        """Draw the level at which the mixture clips."""
        mixture = signals.sum(0)
        level = speech_level_db(mixture) + rng.uniform(*self.above_db)
        most = 10 ** (level / 20)
        signals[-1] += np.clip(mixture, -most, most) - mixture
        return signals


@dataclass
class PolarityFlip:
    """Invert the polarity of all signals.

    Microphones differ in polarity, the waveform of speech is not symmetric, and
    a corpus may have only one polarity. All signals are inverted together,
    because one microphone records all speakers.

    Arguments
    ---------
    share : float
        Share of the mixtures.
    """

    share: float

    def __call__(self, signals, rng, sample_rate):
        """Invert all signals."""
        return -signals


def _check_range(name, limits):
    try:
        low, high = limits
        is_range = low <= high
    except (TypeError, ValueError):
        is_range = False
    if not is_range:
        raise ValueError(f"{name} must be [minimum, maximum], not {limits}")


def random_noise(length, rng):
    """Draw noise whose power falls as 1 / frequency^a, with a from 0 to 2.

    Arguments
    ---------
    length : int
        T, samples.
    rng : numpy.random.Generator
        Draws the noise and a.

    Returns
    -------
    numpy.ndarray
        [T].
    """
    spectrum = np.fft.rfft(rng.normal(size=length))
    frequency = np.maximum(np.arange(len(spectrum)), 1)
    return np.fft.irfft(spectrum / frequency ** rng.uniform(0, 1), length)
