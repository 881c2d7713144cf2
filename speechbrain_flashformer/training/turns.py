"""Effects of dynamic mixing on who speaks when.

They are called as those of ``effects``.

Axes: S speakers, R rows of signals, T samples.
"""

from dataclasses import dataclass

import numpy as np

from speechbrain_flashformer.training.levels import extent, speech_level_db

# Ranges, uniform, of the turns and of the pauses between them.
TURN_SECONDS, PAUSE_SECONDS = (1.0, 5.0), (0.0, 1.0)
# Share of the turns in which all speakers talk.
TOGETHER = 0.2
FADE_SECONDS = 0.01
# Minimum length of the part that Silence keeps, relative to the mixture.
LEAST_SPOKEN = 0.2
# A part this much softer than the source is a pause, and another is drawn.
PAUSE_DB = -30.0
TRIES = 100


@dataclass
class Absence:
    """Only the first speaker is present; the other sources are 0.

    Requires a loss that is defined for a silent source. The mixture is cut to
    the speech of that speaker.

    Arguments
    ---------
    share : float
        Share of the mixtures.
    """

    share: float

    def __call__(self, signals, rng, sample_rate):
        """Remove all speakers except the first."""
        begin, end = extent(signals[0])
        signals = signals[:, begin:end]
        signals[1:-1] = 0
        return signals


@dataclass
class TurnTaking:
    """Speakers take turns, as in a conversation.

    A turn belongs to one speaker, and the next turn to another one; or, with
    the probability ``TOGETHER``, to all speakers. Each speaker talks in some
    turn and is silent outside of the turns. Mixtures of many turns need long
    excerpts and a ``concatenation_share``; those shorter than a turn often stay
    as they are.

    Arguments
    ---------
    share : float
        Share of the mixtures.
    """

    share: float

    def __call__(self, signals, rng, sample_rate):
        """Draw the turns."""
        taken = signals.copy()
        for _ in range(TRIES):
            gains = _draw_turns(*signals[:-1].shape, rng, sample_rate)
            taken[:-1] = gains * signals[:-1]
            # A turn may fall into a pause of its speaker.
            if all(
                speech_level_db(part) > speech_level_db(whole) + PAUSE_DB
                for part, whole in zip(taken[:-1], signals)
                if whole.any()
            ):
                return taken
        return signals


def _draw_turns(speakers, length, rng, sample_rate):
    """Draw turns; returns the gain of each speaker, [S, length]."""
    gains = np.zeros((speakers, length), np.float32)
    ramp = np.linspace(0, 1, round(FADE_SECONDS * sample_rate))
    who = rng.integers(speakers)
    # The first turn may have begun before the mixture.
    start = -round(rng.uniform(0, TURN_SECONDS[0]) * sample_rate)
    while start < length:
        gain = np.ones(round(rng.uniform(*TURN_SECONDS) * sample_rate))
        gain[: len(ramp)], gain[-len(ramp) :] = ramp, ramp[::-1]
        gain = gain[max(-start, 0) : length - start]
        everyone = rng.random() < TOGETHER
        row = slice(None) if everyone else who
        gains[row, max(start, 0) : max(start, 0) + len(gain)] = gain
        start = max(start, 0) + len(gain)
        start += round(rng.uniform(*PAUSE_SECONDS) * sample_rate)
        who = (who + rng.integers(1, max(speakers, 2))) % speakers
    return gains


@dataclass
class Silence:
    """Keep a random part of the mixture, with silence around it.

    The part is at least ``LEAST_SPOKEN`` of the mixture.

    Arguments
    ---------
    share : float
        Share of the mixtures.
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
