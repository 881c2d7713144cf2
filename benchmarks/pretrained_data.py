#!/usr/bin/env python3
"""List the speech that the shipped checkpoint is trained on.

> python benchmarks/pretrained_data.py SPEECH OUT

SPEECH holds picovoice-commands/ and picovoice-wakewords/ (Apache-2.0, from the
speech-to-intent and wake-word benchmarks of Picovoice, as 8 kHz FLAC). Every
tenth command is left out for validation. To them come synthetic voices, which
are made. OUT/recordings.csv is then the ``base_folder_dm`` of the recipe.
"""

import csv
import sys
from pathlib import Path

from speechbrain_flashformer.voices import make_voices

VOICES = 1000


def real_speech(speech):
    """(path, speaker) of the recordings for training, sentences twice."""
    commands = sorted((speech / "picovoice-commands").glob("*.flac"))
    held_out = set(commands[::10])
    words = sorted((speech / "picovoice-wakewords").glob("*.flac"))
    if not commands or not words:
        raise FileNotFoundError(
            f"{speech} has no FLAC files in picovoice-commands/ or in "
            "picovoice-wakewords/"
        )
    # Who speaks is not known: taken as a person each.
    commands = [file for file in commands if file not in held_out]
    # Sentences, which overlap for longer than words, are listed twice.
    return [(file, file.stem) for file in 2 * commands + words]


def main(speech, out):
    """Write OUT/voices and OUT/recordings.csv."""
    rows = real_speech(speech)
    voices = make_voices(out / "voices", sizes=(VOICES, 1, 1), utterances=12)
    for path in sorted((voices / "wav8k/min/tr/s1").glob("*.wav")):
        vocal_tract = path.stem.split("_")[1][:-1]
        rows.append((path, f"voice {vocal_tract}"))
    with (out / "recordings.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["wav", "speaker"])
        writer.writerows((path.resolve(), who) for path, who in rows)
    print(f"{len(rows)} recordings in {out / 'recordings.csv'}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except FileNotFoundError as error:
        sys.exit(str(error))
