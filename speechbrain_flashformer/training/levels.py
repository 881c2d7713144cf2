"""Levels of speech, with and without the silence around it.

Axes: T samples.
"""

import numpy as np

# A signal starts and ends with a sample above this share of its peak, because
# the tail of a filtered signal never reaches 0.
AUDIBLE = 1e-3


def level_db(signal):
    """Mean power of a signal.

    Arguments
    ---------
    signal : numpy.ndarray
        [T].

    Returns
    -------
    float
        dB; -120 for digital silence.

    Example
    -------
    >>> round(float(level_db(np.full(80, 0.1))))
    -20
    """
    return 10 * np.log10(np.mean(np.square(signal, dtype=np.float64)) + 1e-12)


def speech_level_db(signal):
    """Mean power of a signal without the silence at its start and end.

    Arguments
    ---------
    signal : numpy.ndarray
        [T].

    Returns
    -------
    float
        dB; -120 for digital silence.
    """
    return level_db(signal[slice(*extent(signal))])


def extent(signal):
    """Find where a signal starts and ends, without silence around it.

    Arguments
    ---------
    signal : numpy.ndarray
        [T], T >= 1.

    Returns
    -------
    tuple of int
        Start and stop, in samples; (0, T) for digital silence.

    Example
    -------
    >>> extent(np.array([0, 0, 1, 0, -1, 0]))
    (2, 5)
    """
    loud = np.abs(signal)
    loud = loud > AUDIBLE * loud.max()
    return int(loud.argmax()), len(loud) - int(loud[::-1].argmax())
