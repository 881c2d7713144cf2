#!/usr/bin/env python3
"""Quality of a packed model on held-out sets.

> python benchmarks/evaluate_model.py MODEL NAME=FOLDER [NAME=FOLDER ...]

FOLDER holds mix/, s1/ and s2/ with files of one name, at the model's rate, as
test_sets.py writes them; or a folder for each speaker, of whose recordings of
3 s and more mixtures are made. The NAME voices needs no folder: mixtures of
generated voices that occur in no training set of seed 0. Writes
results/evaluate_model.csv, a row for each set:

* of mixtures: mean SI-SNRi and its 5th percentile in dB, the share that comes
  out worse than it went in, and how much louder the outputs are than the
  sources;
* of recordings of one person, where s2/ is silence: SI-SNR of the louder output
  and how far the other one lies below it, medians in dB;
* of conversations, which have turns/: the share of the turns that come out
  where most of that speaker's speech does not.
"""

import csv
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
from records import write_csv

from speechbrain_flashformer.inference import FlashFormerSeparation
from speechbrain_flashformer.training.metrics import best_order, reorder, si_snr
from speechbrain_flashformer.training.mixing import DynamicMixtures
from speechbrain_flashformer.training.recordings import find_recordings
from speechbrain_flashformer.training.voices import make_voices

OUT = Path(__file__).parent / "results" / "evaluate_model.csv"
MADE = 200  # mixtures of generated voices, or of a folder of speakers
SECONDS = 3
COLUMNS = (
    "set",
    "mixtures",
    "si-snr_i",
    "5th percentile",
    "worse (%)",
    "level (dB)",
    "level deviation (dB)",
    "alone, si-snr",
    "alone, other output (dB)",
    "wrong turns (%)",
)


def main(model, sets):
    """Score each set, write the rows."""
    model = FlashFormerSeparation.from_hparams(model)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in find_sets(sets, Path(scratch)):
            rows.append({"set": name, **score(model, folder)})
            print(rows[-1])
    write_csv(OUT, [dict.fromkeys(COLUMNS, "") | row for row in rows])


def find_sets(words, scratch):
    """Name and folder of each set; generated voices go to ``scratch``."""
    sets = []
    for word in words:
        name, _, folder = word.partition("=")
        if name == "voices" and not folder:
            made = make_voices(scratch / "voices", sizes=(1, 1, MADE))
            folder = made / "wav8k/min/tt"
        elif not Path(folder).is_dir() or not folder:
            raise FileNotFoundError(f"{word}: give NAME=FOLDER, a folder")
        sets.append((name, Path(folder)))
    return sets


def score(model, folder):
    """What is said of the mixtures of a folder."""
    if (folder / "turns").is_dir():
        return score_turns(model, folder)
    mixtures = list(load_mixtures(model, folder))
    if not any(second.any() for _, _, second in mixtures):
        return score_alone(model, mixtures)
    return score_mixtures(model, mixtures)


def score_alone(model, mixtures):
    """One person alone: is the speech in one output, and that unharmed?"""
    kept, below = [], []
    for mixture, target, _ in mixtures:
        estimates = model.separate_batch(mixture[None])
        power = estimates[0].square().mean(0)
        loud = power.argmax().item()
        target = target[None, :, None]
        kept.append(si_snr(target, estimates[:, :, [loud]]).item())
        ratio = power[loud] / power[1 - loud].clamp(min=1e-12)
        below.append(10 * ratio.log10().item())
    return {
        "mixtures": len(mixtures),
        "alone, si-snr": round(float(np.median(kept)), 2),
        "alone, other output (dB)": round(float(np.median(below)), 2),
    }


def score_turns(model, folder):
    """Conversations, separated as recordings are."""
    wrong = count = mixtures = 0
    for path in sorted((folder / "turns").glob("*.csv")):
        with path.open(newline="") as file:
            turns = [
                (int(row["speaker"]) - 1, int(row["start"]), int(row["stop"]))
                for row in csv.DictReader(file)
            ]
        rate = model.hparams.sample_rate
        name = path.with_suffix(".wav").name
        mixture, *sources = read_mixture(folder, name, rate)
        heard = model.separate_audio(mixture[None], rate)[0].T.numpy()
        wrong += wrong_turns(heard, torch.stack(sources).numpy(), turns)
        count, mixtures = count + len(turns), mixtures + 1
    share = round(100 * wrong / count, 1)
    return {"mixtures": mixtures, "wrong turns (%)": share}


def wrong_turns(out, sources, turns):
    """Turns (speaker, start, stop) that came out in the wrong place.

    out and sources are [2, T].
    """
    straight = 0
    for speaker, start, stop in turns:
        piece = slice(start, stop)
        likeness = np.abs(out[:, piece] @ sources[speaker, piece])
        straight += int(likeness.argmax() == speaker)
    return min(straight, len(turns) - straight)


def score_mixtures(model, mixtures):
    """Means over mixtures [T], each with its sources."""
    gains, levels = [], []
    for mixture, *sources in mixtures:
        targets = torch.stack(sources, 1)[None]
        estimates = model.separate_batch(mixture[None])
        after, order = best_order(targets, estimates)
        before = si_snr(targets, mixture[None, :, None].expand_as(targets))
        gains.append((after - before).mean().item())
        power = reorder(estimates, order).square().mean(
            1
        ) / targets.square().mean(1)
        levels.append(10 * power.log10().mean().item())
    return {
        "mixtures": len(gains),
        "si-snr_i": round(float(np.mean(gains)), 2),
        "5th percentile": round(float(np.percentile(gains, 5)), 2),
        "worse (%)": round(100 * float(np.mean(np.less(gains, 0))), 1),
        "level (dB)": round(float(np.mean(levels)), 2),
        "level deviation (dB)": round(float(np.std(levels)), 2),
    }


def load_mixtures(model, folder):
    """Mixtures of a set, or made of its speakers, and their sources: [T]."""
    if (folder / "mix").is_dir():
        return read_mixtures(folder, model.hparams.sample_rate)
    return make_mixtures(model, folder)


def read_mixtures(folder, rate):
    """Mixtures of a set and their sources, each [T]."""
    paths = sorted((folder / "mix").glob("*.wav"))
    if not paths:
        raise FileNotFoundError(f"{folder}/mix has no wav files")
    for path in paths:
        yield read_mixture(folder, path.name, rate)


def read_mixture(folder, name, rate):
    """A mixture of a set and its sources, each [T]."""
    signals = []
    for part in ("mix", "s1", "s2"):
        path = folder / part / name
        try:
            signal, found = soundfile.read(path, dtype="float32")
        except (OSError, soundfile.SoundFileError) as error:
            raise ValueError(f"cannot read {path}: {error}") from error
        if found != rate:
            raise ValueError(f"{path} is at {found} Hz, not at {rate}")
        signals.append(torch.from_numpy(signal))
        if signals[-1].shape != signals[0].shape or signal.ndim != 1:
            raise ValueError(
                f"{path} is not mono or not as long as its mixture"
            )
    return signals


def make_mixtures(model, folder):
    """Mixtures of the speakers in a folder and their sources, each [T]."""
    recordings = [
        recording
        for recording in find_recordings(folder)
        if soundfile.info(recording.path).duration >= SECONDS
    ]
    if not recordings:
        raise FileNotFoundError(
            f"{folder}: no recording of {SECONDS} s or more"
        )
    rate = model.hparams.sample_rate
    made = DynamicMixtures(recordings, 2, rate, SECONDS * rate, seed=0)
    for n in range(MADE):
        item = made[n]
        yield [item[name] for name in ("mix_sig", "s1_sig", "s2_sig")]


def command(usage, main):
    """Run ``main(MODEL, sets)`` with the words of the command line."""
    if len(sys.argv) < 3:
        sys.exit(usage)
    try:
        main(sys.argv[1], sys.argv[2:])
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    command(__doc__, main)
