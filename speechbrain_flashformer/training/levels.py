"""Levels of speech, with and without the silence around it.

Axes: T samples.
"""

import numpy as np

# A signal starts and ends with a sample above this share of its peak, because
# the tail of a filtered signal never reaches 0.
AUDIBLE = 1e-3


def level_db(signal):
    """Mean power of a signal [T] in dB; -120 for digital silence."""
    return 10 * np.log10(np.mean(np.square(signal, dtype=np.float64)) + 1e-12)


def speech_level_db(signal):
    """Level of a signal [T] in dB, without silence at its start and end."""
    return level_db(signal[slice(*extent(signal))])


def extent(signal):
    """Start and end of a signal [T] without silence, in samples."""
    loud = np.abs(signal)
    loud = loud > AUDIBLE * loud.max()
    return int(loud.argmax()), len(loud) - int(loud[::-1].argmax())
