#!/usr/bin/env python3
"""Make noise for dynamic mixing and for the test set ``ambient``.

> python noise_recordings.py babble SPEECH.csv OUT
> python noise_recordings.py cut RECORDINGS OUT

babble: writes OUT/babble, many people who talk at the same time in a room, and
OUT/color, noise whose power falls with the frequency, at 8 kHz. SPEECH.csv
lists mono speech with the columns ``wav`` and ``speaker``.

cut: converts all recordings of a folder (wav, flac, ogg, mp3) to mono at 8 kHz
and writes them to OUT in pieces of 20 s, because dynamic mixing draws each file
equally often. A last piece of less than 4 s is left out.

OUT may be the folder of the other command; files of the same name are replaced.
A training uses it with ``--dm_noise_folder OUT``.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

from speechbrain_flashformer.inference.audio import AudioReader
from speechbrain_flashformer.inference.files import written_beside
from speechbrain_flashformer.inference.listing import files_below
from speechbrain_flashformer.training.effects import random_noise, reverberate
from speechbrain_flashformer.training.levels import level_db, speech_level_db
from speechbrain_flashformer.training.recordings import (
    RecordingReader,
    find_recordings,
)

RATE, SEED = 8000, 5
PIECE = 20 * RATE
SHORTEST = 4 * RATE  # of the last piece of a recording
BABBLES, COLORS = 140, 50  # number of files
TALKERS = (4, 16)
# Pause between two recordings of a talker, samples; T60 of the room, seconds;
# levels of talkers below the loudest, and of the background below them, in dB.
PAUSE, T60 = (800, 12000), (0.2, 0.8)
QUIETER_DB, BACKGROUND_DB = 12, (3, 25)
PEAK = 0.9
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


def make_babble(speech, out):
    """Write OUT/babble and OUT/color."""
    rng = np.random.default_rng(SEED)
    spoken = defaultdict(list)
    for recording in find_recordings(speech):
        spoken[recording.speaker].append(recording.path)
    if len(spoken) < TALKERS[1]:
        raise ValueError(
            f"{speech} lists speech of {len(spoken)} people; babble requires "
            f"{TALKERS[1]} or more"
        )
    # Reads all headers: most errors are found before any noise is written.
    RecordingReader(sum(spoken.values(), []), "speech")
    names = sorted(spoken)
    for n in range(BABBLES):
        t60, talkers = rng.uniform(*T60), rng.integers(*TALKERS, endpoint=True)
        babble = np.zeros(PIECE)
        for name in rng.choice(names, talkers, replace=False):
            babble += talk(spoken[name], t60, rng)
        noise = random_noise(PIECE, rng)
        lower = rng.uniform(*BACKGROUND_DB)
        noise *= 10 ** ((level_db(babble) - lower - level_db(noise)) / 20)
        write(out / "babble" / f"{n:03}.flac", babble + noise)
    for n in range(COLORS):
        write(out / "color" / f"{n:03}.flac", random_noise(PIECE, rng))
    print(f"{BABBLES} files of babble and {COLORS} of noise in {out}")


def talk(paths, t60, rng):
    """Return speech of one person in a room, far from the microphone, [T]."""
    parts, length = [], 0
    while length < PIECE:
        parts += [read(rng.choice(paths)), np.zeros(rng.integers(*PAUSE))]
        length += sum(map(len, parts[-2:]))
    signal = np.roll(np.concatenate(parts), rng.integers(PIECE))[:PIECE]
    # Twice: the direct sound is then sometimes weaker than the reverberation,
    # after one pass it never is.
    for _ in range(2):
        signal = reverberate(signal, t60, RATE, rng)
    lower = rng.uniform(0, QUIETER_DB)
    return signal * 10 ** ((-lower - speech_level_db(signal)) / 20)


def cut(recordings, out):
    """Write the pieces of all recordings."""
    if not recordings.is_dir():
        raise FileNotFoundError(f"no folder {recordings}")
    if out.resolve().is_relative_to(recordings.resolve()):
        raise ValueError(f"{out} is in {recordings}: name another folder")
    places = {}
    for path in files_below(recordings):
        # macOS writes "._" files beside others.
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("._"):
            place = path.relative_to(recordings).with_suffix("")
            if place in places:
                raise ValueError(
                    f"{places[place]} and {path} would have pieces of the same "
                    "names: rename one"
                )
            places[place] = path
    count = 0
    for place, path in places.items():
        signal = read(path)
        stops = max(1, len(signal) - SHORTEST + 1)
        for n, start in enumerate(range(0, stops, PIECE)):
            piece = signal[start : start + PIECE]
            if piece.any():
                write(out / f"{place}-{n}.flac", piece)
                count += 1
    if not count:
        raise FileNotFoundError(
            f"no {', '.join(SUFFIXES)} with sound in {recordings}"
        )
    print(f"{count} pieces of {len(places)} recordings in {out}")


def read(path):
    """Read a recording as mono at RATE, [T]."""
    reader = AudioReader(path)
    signal = torch.cat(list(reader.blocks()), 1).mean(0)
    return resample(signal, reader.sample_rate, RATE).numpy()


def write(path, signal):
    """Write noise; its level does not matter."""
    signal = signal * (PEAK / np.abs(signal).max())
    with written_beside(path) as partial:
        soundfile.write(partial, signal, RATE, format="FLAC")


def main(words=None):
    """Run the command line ``words``."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    for name, run, source in (
        ("babble", make_babble, "speech"),
        ("cut", cut, "recordings"),
    ):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument(source, type=Path)
        command.add_argument("out", type=Path)
    options = vars(parser.parse_args(words))
    run = options.pop("run")
    try:
        run(**options)
    except (OSError, ValueError) as error:
        sys.exit(f"noise_recordings.py: {error}")


if __name__ == "__main__":
    main()
