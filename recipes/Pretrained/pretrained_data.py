#!/usr/bin/env python3
"""Make and list the speech for training the pretrained model.

> python pretrained_data.py SPEECH OUT [VOICES [PEOPLE]]

SPEECH holds picovoice-commands/ and picovoice-wakewords/ (Apache-2.0, from the
speech-to-intent and wake-word benchmarks of Picovoice, as 8 kHz FLAC). Every
tenth command is held out for validation.

Because there are few speakers, voices are modified: sentences are resynthesized
with other vocal tracts and pitch, and words are concatenated. The script adds
the synthetic voices of the starter set, the voices of pretrained_voices.py
(folder VOICES) and the speakers of packaged_speakers.py (folder PEOPLE). Use
OUT/recordings.csv as ``base_folder_dm`` of the recipe. Needs praat-parselmouth.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import soundfile

from speechbrain_flashformer.training.recordings import Recording
from speechbrain_flashformer.training.voices import make_voices

VOICES = 1000
VARIANTS = 3  # voices per sentence
SEED = 7


def real_speech(speech):
    """List the recordings for training."""
    commands, words = find_speech(speech)
    # Sentences are listed twice, because they overlap for longer than words.
    # The speakers are unknown: every file counts as another speaker.
    return [Recording(file, file.stem) for file in 2 * commands + words]


def find_speech(speech):
    """Return the paths of the sentences and of the words for training."""
    commands = sorted((speech / "picovoice-commands").glob("*.flac"))
    held_out = set(commands[::10])
    words = sorted((speech / "picovoice-wakewords").glob("*.flac"))
    if not commands or not words:
        raise FileNotFoundError(
            f"{speech} has no FLAC files in picovoice-commands/ or in "
            "picovoice-wakewords/"
        )
    return [file for file in commands if file not in held_out], words


def main(speech, out, more_voices=None, more_people=None):
    """Write OUT/voices, OUT/variants and OUT/recordings.csv."""
    commands, words = find_speech(speech)
    # Listed twice: they are closest to the real speech of many people.
    more = 2 * find_voices(more_voices) if more_voices else []
    people = find_people(more_people) if more_people else []
    rng = np.random.default_rng(SEED)
    folder = out / "variants"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(path, path.stem) for path in commands]
    for path in commands:
        rows += [(p, p.stem) for p in vary_sentence(path, folder, rng)]
    for path in words:
        string = string_words(path, folder, rng)
        rows.append((string, string.stem))
    voices = make_voices(out / "voices", sizes=(VOICES, 1, 1), utterances=12)
    for path in sorted((voices / "wav8k/min/tr/s1").glob("*.wav")):
        vocal_tract = path.stem.split("_")[1][:-1]
        rows.append((path, f"voice {vocal_tract}"))
    for path in more:
        # A mix of two voices is one speaker, in either order of the names.
        names = path.stem.partition("_")[2].split("-")
        rows.append((path, "-".join(sorted(names))))
    rows += [(path, path.parent.name) for path in people]
    listing = out / "recordings.csv"
    partial = listing.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("wav", "speaker"))
        writer.writerows((path.resolve(), who) for path, who in rows)
    partial.replace(listing)
    print(f"{len(rows)} recordings in {listing}")


def find_voices(folder):
    """Find the files NUMBER_VOICE.wav that pretrained_voices.py writes."""
    found = sorted(folder.glob("*_*.wav"))
    if not found:
        raise FileNotFoundError(f"{folder} has no files NUMBER_VOICE.wav")
    return found


def find_people(folder):
    """Find the files SPEAKER/NUMBER.wav that packaged_speakers.py writes."""
    found = sorted(folder.glob("*/*.wav"))
    if not found:
        raise FileNotFoundError(f"{folder} has no files SPEAKER/NUMBER.wav")
    return found


def vary_sentence(path, folder, rng):
    """Write a sentence in VARIANTS other voices; return the paths."""
    signal, rate = soundfile.read(path, dtype="float32")
    written = []
    for i in range(VARIANTS):
        formants = np.exp(rng.uniform(np.log(0.84), np.log(1.2)))
        # Pitch is loosely correlated with the length of the vocal tract.
        pitch = formants ** rng.uniform(0.5, 2.5)
        pitch *= np.exp(rng.uniform(-0.12, 0.12))
        duration = rng.uniform(0.85, 1.15)
        voice = change_voice(signal, rate, formants, pitch, duration)
        written.append(folder / f"{path.stem}_v{i}.wav")
        soundfile.write(written[-1], voice, rate)
    return written


def string_words(path, folder, rng):
    """Write a word two to four times in one voice; return the path."""
    signal, rate = soundfile.read(path, dtype="float32")
    formants = 1.0
    if rng.random() < 0.5:
        formants = np.exp(rng.uniform(np.log(0.88), np.log(1.15)))
    pitch = formants ** rng.uniform(0.5, 2.5)
    parts = []
    for _ in range(rng.integers(2, 5)):
        said = change_voice(
            signal,
            rate,
            formants,
            pitch * np.exp(rng.uniform(-0.1, 0.1)),
            rng.uniform(0.8, 1.2),
        )
        parts.append(said * 10 ** (rng.uniform(-2, 2) / 20))
        parts.append(np.zeros(int(rate * rng.uniform(0, 0.25)), np.float32))
    written = folder / f"w_{path.stem}.wav"
    soundfile.write(written, np.concatenate(parts[:-1]), rate)
    return written


def change_voice(signal, rate, formants, pitch, duration):
    """Scale formants, pitch and duration of speech [T] with Praat."""
    import parselmouth
    from parselmouth.praat import call

    if len(signal) < 0.3 * rate:
        return signal
    sound = parselmouth.Sound(signal.astype(np.float64), rate)
    floor, ceiling = 70, 500
    hertz = sound.to_pitch(pitch_floor=floor, pitch_ceiling=ceiling)
    hertz = hertz.selected_array["frequency"]
    hertz = hertz[hertz > 0]
    # Praat keeps the pitch if the median is 0.
    median = float(np.median(hertz) * pitch) if len(hertz) > 5 else 0.0
    changed = call(
        sound,
        "Change gender",
        floor,
        ceiling,
        float(formants),
        median,
        1.0,
        float(duration),
    )
    return changed.values[0].astype(np.float32)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4, 5):
        sys.exit(__doc__)
    try:
        main(*map(Path, sys.argv[1:]))
    except (ImportError, OSError) as error:
        sys.exit(str(error))
