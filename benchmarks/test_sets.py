#!/usr/bin/env python3
"""Write the test sets for packed models.

> python benchmarks/test_sets.py SPEECH.csv OUT [NAME=FOLDER ...] --noise NOISE

SPEECH.csv lists speech of people who are in no training data, with the columns
``wav``, ``speaker``, ``corpus`` and ``language`` (``en`` for English). FOLDER
holds one folder per speaker, such as the output of prompt_speakers.py. Each set
is a folder in OUT with mix/, s1/ and s2/ at 8 kHz; a mixture and its sources
have the same file name. The sets are reproducible:

* english, other: 200 mixtures each of two people who speak English, or other
  languages, of up to 6 s, with the levels of WSJ0-mix;
* noisy, reverberant: the mixtures of english with noise 0 to 15 dB below the
  mixture, or with both speakers in one synthetic room (the sources are
  reverberant too);
* ambient: the mixtures of english with recordings of NOISE, 6 dB above to 3 dB
  below the louder speaker, as in WHAM! (arXiv:1907.01160); not without --noise;
* NAME: 200 mixtures of the speakers in a folder;
* alone: 50 recordings of one person; s2/ is silence;
* conversations: 80 conversations of 40 s, with turns, overlapping speech and
  pauses; turns/ lists speaker, start and stop (exclusive) of each turn, in
  samples;
* meetings: 4 conversations of 10 minutes.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import soundfile
from records import write_csv

from speechbrain_flashformer.training.effects import (
    Noise,
    random_noise,
    reverberate,
)
from speechbrain_flashformer.training.mixing import DynamicMixtures
from speechbrain_flashformer.training.recordings import (
    Recording,
    find_recordings,
)

RATE = 8000
MIXTURES, ALONE = 200, 50
LONGEST = 6 * RATE  # maximum length of a mixture
LEAST = 3 * RATE  # minimum length of a recording
CONVERSATIONS, MEETINGS = (80, 40), (4, 600)  # number, and seconds of each
ENOUGH = 10  # minimum seconds of speech of a speaker in conversations
TURN, PAUSE = (2, 6), (0.2, 1.5)  # minimum and maximum seconds
BOTH = 0.2  # share of the turns in which both speak
SNR_DB, T60 = (0, 15), (0.2, 0.5)
AMBIENT_DB = (-6, 3)  # ratio of the louder speaker to recorded noise


def main(speech, out, folders, noise=None):
    """Write all sets."""
    ambience = noise and Noise(share=1, snr_db=AMBIENT_DB, folder=noise)
    with open(speech, newline="", encoding="utf-8") as file:
        languages = [row["language"] for row in csv.DictReader(file)]
    # Sorted, so that the sets do not depend on the order of the list.
    every = sorted(
        zip(find_recordings(speech), languages),
        key=lambda x: (x[0].speaker, x[0].path.name),
    )
    english = [x for x, language in every if language == "en"]
    mix(english, out / "english")
    mix([x for x, language in every if language != "en"], out / "other")
    change(out / "english", out / "noisy", add_noise)
    change(out / "english", out / "reverberant", place_in_room)
    if ambience:
        change(
            out / "english",
            out / "ambient",
            lambda sources, rng: add_recording(sources, ambience, rng),
        )
    for word in folders:
        name, _, folder = word.partition("=")
        mix(find_recordings(folder), out / name)
    recordings = [x for x, _ in every]
    leave_alone(recordings, out / "alone")
    converse(recordings, out / "conversations", *CONVERSATIONS)
    converse(recordings, out / "meetings", *MEETINGS)


def mix(recordings, out):
    """Write mixtures of two speakers each."""
    long = [x for x in recordings if seconds(x) * RATE >= LEAST]
    made = DynamicMixtures(
        long, 2, RATE, LONGEST, seed=0, same_corpus_share=0.5
    )
    for n in range(MIXTURES):
        item = made[n]
        sources = [item[name].numpy() for name in ("s1_sig", "s2_sig")]
        write(out, n, item["mix_sig"].numpy(), sources)


def change(begin, out, change_mixture):
    """Write a set whose mixtures are changed by ``change_mixture``."""
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
    """Add noise with a random spectrum to the mixture."""
    mixture = sum(sources)
    noise = random_noise(len(mixture), rng)
    noise *= np.linalg.norm(mixture) / np.linalg.norm(noise)
    return mixture + noise * 10 ** (-rng.uniform(*SNR_DB) / 20), sources


def add_recording(sources, ambience, rng):
    """Add recorded noise to the mixture."""
    signals = np.stack([*sources, np.zeros_like(sources[0])])
    return ambience(signals, rng, RATE).sum(0), sources


def place_in_room(sources, rng):
    """Place both speakers in one synthetic room."""
    t60 = rng.uniform(*T60)
    sources = [reverberate(x, t60, RATE, rng) for x in sources]
    return sum(sources), sources


def leave_alone(recordings, out):
    """Write recordings of one person each."""
    rng = np.random.default_rng(2)
    for n, who in enumerate(rng.permutation(speakers(recordings))[:ALONE]):
        theirs = [x for x in recordings if x.speaker == who]
        signal = read(max(theirs, key=seconds))[: 2 * LONGEST]
        write(out, n, signal, [signal, np.zeros_like(signal)])


def converse(recordings, out, count, length):
    """Write conversations of two people."""
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
    """Return this many samples of a speaker, all recordings at one level."""
    said, length = [], 0
    while length < samples:
        signal = signals[rng.integers(len(signals))]
        said.append(0.05 * signal / np.sqrt(np.mean(np.square(signal))))
        length += len(signal)
    return np.concatenate(said)[:samples]


def speakers(recordings):
    """Return the names of all speakers."""
    return sorted({x.speaker for x in recordings})


def seconds(recording: Recording):
    """Return the duration of a recording."""
    return soundfile.info(recording.path).duration


def read(recording):
    """Read a recording at RATE, [T]."""
    signal, rate = soundfile.read(recording.path)
    if rate != RATE:
        raise ValueError(f"{recording.path} is at {rate} Hz, not at {RATE}")
    return signal


def write(out, n, mixture, sources):
    """Write one mixture and its sources."""
    signals = {"mix": mixture, "s1": sources[0], "s2": sources[1]}
    for part, signal in signals.items():
        (out / part).mkdir(parents=True, exist_ok=True)
        path = out / part / f"{n:03}.wav"
        soundfile.write(path, signal, RATE, subtype="FLOAT")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("speech", type=Path, metavar="SPEECH.csv")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("folders", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--noise", type=Path)
    try:
        main(**vars(parser.parse_intermixed_args()))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
