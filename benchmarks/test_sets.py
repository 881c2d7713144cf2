#!/usr/bin/env python3
"""Write the sets that packed models are tested on.

> python benchmarks/test_sets.py SPEECH.csv OUT [NAME=FOLDER ...]

SPEECH.csv lists speech by people whom no model was trained on: ``wav``,
``speaker``, ``corpus`` and ``language`` (``en`` for English). FOLDER holds a
folder for each speaker, such as that of prompt_speakers.py. Of a set OUT/NAME
gets mix/, s1/ and s2/ with files of one name at 8 kHz, the same each time:

* english, other: 200 mixtures of two people, in other languages than English
  too, of up to 6 s at the levels of WSJ0-mix;
* noisy, reverberant: those of english with noise 0 to 15 dB below the mixture,
  or each speaker in the same synthetic room (the sources are as in the room);
* NAME: 200 mixtures of a folder's speakers;
* alone: 50 recordings of one person, s2/ is silence;
* conversations: 20 of 40 s with turns, some of both at once, and pauses; turns/
  says who speaks from which sample to which; meetings: 4 of 10 minutes.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import soundfile
from records import write_csv

from speechbrain_flashformer.training.effects import random_noise, reverberate
from speechbrain_flashformer.training.mixing import DynamicMixtures
from speechbrain_flashformer.training.recordings import (
    Recording,
    find_recordings,
)

RATE = 8000
MIXTURES, ALONE = 200, 50
LONGEST = 6 * RATE  # of a mixture
LEAST = 3 * RATE  # of a recording
CONVERSATIONS, MEETINGS = (20, 40), (4, 600)  # how many, and seconds of each
ENOUGH = 10  # seconds by one speaker
TURN, PAUSE = (2, 6), (0.2, 1.5)  # seconds, shortest and longest
BOTH = 0.2  # share of the turns
SNR_DB, T60 = (0, 15), (0.2, 0.5)


def main(speech, out, folders):
    """Write all sets."""
    with open(speech, newline="", encoding="utf-8") as file:
        languages = [row["language"] for row in csv.DictReader(file)]
    # By name: the sets do not depend on how the list was made.
    every = sorted(
        zip(find_recordings(speech), languages),
        key=lambda x: (x[0].speaker, x[0].path.name),
    )
    english = [x for x, language in every if language == "en"]
    mix(english, out / "english")
    mix([x for x, language in every if language != "en"], out / "other")
    change(out / "english", out / "noisy", add_noise)
    change(out / "english", out / "reverberant", place_in_room)
    for word in folders:
        name, _, folder = word.partition("=")
        mix(find_recordings(folder), out / name)
    recordings = [x for x, _ in every]
    leave_alone(recordings, out / "alone")
    converse(recordings, out / "conversations", *CONVERSATIONS)
    converse(recordings, out / "meetings", *MEETINGS)


def mix(recordings, out):
    """Mixtures of two speakers each."""
    long = [x for x in recordings if seconds(x) * RATE >= LEAST]
    made = DynamicMixtures(
        long, 2, RATE, LONGEST, seed=0, same_corpus_share=0.5
    )
    for n in range(MIXTURES):
        item = made[n]
        sources = [item[name].numpy() for name in ("s1_sig", "s2_sig")]
        write(out, n, item["mix_sig"].numpy(), sources)


def change(begin, out, change_mixture):
    """Each mixture of a set as ``change_mixture`` makes it."""
    for n in range(MIXTURES):
        sources = [
            soundfile.read(begin / part / f"{n:03}.wav")[0]
            for part in ("s1", "s2")
        ]
        rng = np.random.default_rng([1, n])
        mixture, sources = change_mixture(sources, rng)
        scale = min(1, 0.9 / np.abs(mixture).max())
        write(out, n, mixture * scale, [x * scale for x in sources])


def add_noise(sources, rng):
    """Noise of a random colour in the mixture."""
    mixture = sum(sources)
    noise = random_noise(len(mixture), rng)
    noise *= np.linalg.norm(mixture) / np.linalg.norm(noise)
    return mixture + noise * 10 ** (-rng.uniform(*SNR_DB) / 20), sources


def place_in_room(sources, rng):
    """Both speakers in one synthetic room."""
    t60 = rng.uniform(*T60)
    sources = [reverberate(x, t60, RATE, rng) for x in sources]
    return sum(sources), sources


def leave_alone(recordings, out):
    """One person each."""
    rng = np.random.default_rng(2)
    for n, who in enumerate(rng.permutation(speakers(recordings))[:ALONE]):
        theirs = [x for x in recordings if x.speaker == who]
        signal = read(max(theirs, key=seconds))[: 2 * LONGEST]
        write(out, n, signal, [signal, np.zeros_like(signal)])


def converse(recordings, out, count, length):
    """Conversations of two people."""
    rng = np.random.default_rng(3)
    enough = [
        who
        for who in speakers(recordings)
        if sum(seconds(x) for x in recordings if x.speaker == who) > ENOUGH
    ]
    for n in range(count):
        pair = rng.choice(enough, 2, replace=False)
        theirs = [
            [read(x) for x in recordings if x.speaker == who] for who in pair
        ]
        sources = np.zeros((2, length * RATE))
        turns, place, who = [], 0.0, 0
        while place + TURN[1] < length:
            who, stop = 1 - who, place + rng.uniform(*TURN)
            both = rng.random() < BOTH
            for s in (0, 1) if both else (who,):
                span = slice(round(place * RATE), round(stop * RATE))
                sources[s, span] = say(theirs[s], span.stop - span.start, rng)
                turns.append(
                    {"speaker": s + 1, "start": span.start, "stop": span.stop}
                )
            place = stop + rng.uniform(*PAUSE)
        write(out, n, sources.sum(0), sources)
        write_csv(out / "turns" / f"{n:03}.csv", turns)


def say(signals, samples, rng):
    """So many samples of what a speaker says, all at one level."""
    said, length = [], 0
    while length < samples:
        signal = signals[rng.integers(len(signals))]
        said.append(0.05 * signal / np.sqrt(np.mean(np.square(signal))))
        length += len(signal)
    return np.concatenate(said)[:samples]


def speakers(recordings):
    """Names of those who speak."""
    return sorted({x.speaker for x in recordings})


def seconds(recording: Recording):
    """Duration of a recording."""
    return soundfile.info(recording.path).duration


def read(recording):
    """A recording at RATE, [T]."""
    signal, rate = soundfile.read(recording.path)
    if rate != RATE:
        raise ValueError(f"{recording.path} is at {rate} Hz, not at {RATE}")
    return signal


def write(out, n, mixture, sources):
    """One mixture and its sources."""
    signals = {"mix": mixture, "s1": sources[0], "s2": sources[1]}
    for part, signal in signals.items():
        (out / part).mkdir(parents=True, exist_ok=True)
        path = out / part / f"{n:03}.wav"
        soundfile.write(path, signal, RATE, subtype="FLOAT")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
