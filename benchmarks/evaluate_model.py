#!/usr/bin/env python3
"""Quality of a packed model on held-out sets.

> python benchmarks/evaluate_model.py MODEL NAME=FOLDER [NAME=FOLDER ...]

FOLDER holds mix/, s1/ and s2/ with files of the same names, at the sampling
rate of the model, as test_sets.py writes them. It may also hold one folder per
speaker; mixtures are then made of the recordings of 3 s or more. The NAME
``voices`` needs no folder: it stands for mixtures of generated voices that are
in no training set of seed 0.

Writes results/evaluate_model.csv, one row per set:

* mixtures: mean and 5th percentile of SI-SNRi in dB, the share of mixtures with
  a negative SI-SNRi, and the level of the outputs relative to the sources;
* recordings of one person, where s2/ is silence: SI-SNR of the louder output,
  and how far the level of the other output is below it, medians in dB;
* conversations, which have turns/: the share of wrong turns, those in the wrong
  output under the better of the two assignments of speakers to outputs; also
  where the network puts them, before any is moved by its voice. For a model
  that can stream also where a live stream puts them. An oracle is scored too.
  It knows the sources, with a leak of 20 dB, and orders them at random in every
  chunk. Its wrong turns are errors of the chunk order only.

``--table robustness`` writes results/robustness.csv, one row for each of the
CONDITIONS in conditions.py: mean SI-SNRi in dB over the first 50 mixtures of
each set, scored without the added silence. The last rows choose the best order
of the speakers for every second, or quarter of a second. The difference to the
first row is roughly the loss from swapped speakers; it can be negative, because
a segment is ordered by its own SI-SNR.

``--table ablation_at_inference`` writes the mean SI-SNRi in dB over all
mixtures with a part of the network removed and no further training. This does
not measure the value of a part, because a network trained without it might
compensate. But a part whose removal changes little is hardly used. Not for
causal models.

MODEL may also be an .onnx file of ``flashformer export``, for sets of mixtures;
its rows are only printed.
"""

import argparse
import csv
import itertools
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import soundfile
import torch
from conditions import CONDITIONS, ablations
from exported import load_separation
from records import write_csv

from speechbrain_flashformer.inference import FlashFormerSeparation
from speechbrain_flashformer.inference.chunks import ChunkPlan, ChunkSeparator
from speechbrain_flashformer.training.metrics import best_order, reorder, si_snr
from speechbrain_flashformer.training.mixing import DynamicMixtures
from speechbrain_flashformer.training.recordings import find_recordings
from speechbrain_flashformer.training.voices import make_voices

RESULTS = Path(__file__).parent / "results"
MADE = 200  # mixtures made of generated voices, or of a folder of speakers
SECONDS = 3
ROBUSTNESS_MIXTURES = 50  # mixtures of each set in the table robustness
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
    "wrong turns, network (%)",
    "wrong turns, stream (%)",
    "wrong turns, oracle (%)",
)


def main(words=None):
    """Score all sets and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model")
    parser.add_argument("sets", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--table", choices=TABLES, default="evaluate_model")
    parser.add_argument("--out", help="write results/OUT.csv instead")
    options = parser.parse_args(words)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            sets = find_sets(options.sets, Path(scratch))
            rows = []
            for row in TABLES[options.table](options.model, sets):
                print(row, flush=True)
                rows.append(row)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"evaluate_model.py: {error}")
    if not options.model.endswith(".onnx"):
        write_csv(RESULTS / f"{options.out or options.table}.csv", rows)


def quality(model, sets):
    """Yield a row for each set."""
    model = load_separation(model)
    for name, folder in sets:
        row = {"set": name, **score(model, folder)}
        yield dict.fromkeys(COLUMNS, "") | row


def robustness(model, sets):
    """Yield a row for each condition."""
    model = load_separation(model)
    heard = {
        name: [
            torch.stack(signals, 1)
            for signals in itertools.islice(
                load_mixtures(model, folder), ROBUSTNESS_MIXTURES
            )
        ]
        for name, folder in sets
    }
    for condition, change, arrange in CONDITIONS:
        row = {"condition": condition}
        for name, mixtures in heard.items():
            gains = [gain(model, x, change, arrange) for x in mixtures]
            row[name] = round(float(np.mean(gains)), 2)
        yield row


def ablation_at_inference(source, sets):
    """Yield a row for each ablation."""
    model = FlashFormerSeparation.from_hparams(source)
    for name, change in ablations(model).items():
        model = FlashFormerSeparation.from_hparams(source)
        change(model.mods.masknet)
        row = {"condition": name}
        for title, folder in sets:
            row[title] = score(model, folder)["si-snr_i"]
        yield row


TABLES = {
    "evaluate_model": quality,
    "robustness": robustness,
    "ablation_at_inference": ablation_at_inference,
}


def find_sets(words, scratch):
    """Return name and folder of each set; make generated voices in scratch."""
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
    """Return the scores of the mixtures in a folder, by column."""
    if (folder / "turns").is_dir():
        return score_turns(model, folder)
    mixtures = list(load_mixtures(model, folder))
    if not any(second.any() for _, _, second in mixtures):
        return score_alone(model, mixtures)
    return score_mixtures(model, mixtures)


def score_alone(model, mixtures):
    """Score recordings of one person: quality, level of the other output."""
    scores, below = [], []
    for mixture, target, _ in mixtures:
        estimates = model.separate_batch(mixture[None])
        power = estimates[0].square().mean(0)
        loud = power.argmax().item()
        target = target[None, :, None]
        scores.append(si_snr(target, estimates[:, :, [loud]]).item())
        ratio = power[loud] / power[1 - loud].clamp(min=1e-12)
        below.append(10 * ratio.log10().item())
    return {
        "mixtures": len(mixtures),
        "alone, si-snr": round(float(np.median(scores)), 2),
        "alone, other output (dB)": round(float(np.median(below)), 2),
    }


def score_turns(model, folder):
    """Score conversations, as recordings, and as streams if possible."""
    rate, rng = model.hparams.sample_rate, np.random.default_rng(0)
    plan = ChunkPlan(10 * rate, round(2.5 * rate), align=1)
    wrong, count, mixtures = Counter(), 0, 0
    for path in sorted((folder / "turns").glob("*.csv")):
        with path.open(newline="") as file:
            turns = [
                (int(row["speaker"]) - 1, int(row["start"]), int(row["stop"]))
                for row in csv.DictReader(file)
            ]
        name = path.with_suffix(".wav").name
        mixture, *sources = read_mixture(folder, name, rate)
        sources = torch.stack(sources)
        oracle = Oracle(sources, plan, rng)
        separator = ChunkSeparator(oracle, rate, plan, 2)
        parts = [separator.feed(mixture[None]), separator.flush()]
        outputs = {
            ", oracle": torch.cat(parts, 2)[0],
            "": model.separate_audio(mixture[None], rate, turns="voice")[0].T,
            ", network": model.separate_audio(
                mixture[None], rate, turns="network"
            )[0].T,
        }
        if getattr(model.mods.masknet, "can_stream", False):
            # A stream equals the whole: see tests/test_streaming.py.
            outputs[", stream"] = model.separate_batch(mixture[None])[0].T
        for how, out in outputs.items():
            wrong[how] += wrong_turns(out.numpy(), sources.numpy(), turns)
        count, mixtures = count + len(turns), mixtures + 1
    shares = {
        f"wrong turns{how} (%)": round(100 * number / count, 1)
        for how, number in wrong.items()
    }
    return {"mixtures": mixtures, **shares}


def wrong_turns(out, sources, turns):
    """Count the turns (speaker, start, stop) that are in the wrong output.

    out and sources are [2, T]. The outputs may be in either order.
    """
    straight = 0
    for speaker, start, stop in turns:
        piece = slice(start, stop)
        likeness = np.abs(out[:, piece] @ sources[speaker, piece])
        straight += int(likeness.argmax() == speaker)
    return min(straight, len(turns) - straight)


class Oracle:
    """A network that returns the true sources [2, T] of each chunk."""

    LEAK = 0.1

    def __init__(self, sources, plan, rng):
        self.sources, self.plan, self.rng = sources, plan, rng
        self.calls = 0

    def __call__(self, chunks):
        """Return the sources [1, 2, n] of a chunk [1, n], in random order."""
        samples = chunks.shape[1]
        last = self.sources.shape[1] - samples
        start = min(self.calls * self.plan.hop, last)
        self.calls += 1
        true = self.sources[:, start : start + samples]
        true = true + self.LEAK * true.flip(0)
        return true[self.rng.permutation(2)][None]


def score_mixtures(model, mixtures):
    """Score mixtures [T], each with its sources."""
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


def gain(model, signals, change, arrange):
    """SI-SNRi of one mixture, in dB; signals [T, 1 + S]."""
    rate, length = model.hparams.sample_rate, len(signals)
    signals = change(rate, signals)
    estimates = model.separate_batch(signals[None, :, 0])[:, -length:]
    mixture, targets = signals[None, -length:].tensor_split((1,), 2)
    estimates = arrange(rate, targets, estimates)
    before = si_snr(targets, mixture.expand_as(targets))
    return (best_order(targets, estimates)[0] - before).mean().item()


def load_mixtures(model, folder):
    """Mixtures of a set, or made of its speakers, and their sources: [T]."""
    if (folder / "mix").is_dir():
        return read_mixtures(folder, model.hparams.sample_rate)
    # These would be taken for speakers.
    named = [folder / "mixture", *folder.glob("mix_*")]
    if others := [path.name for path in named if path.is_dir()]:
        raise ValueError(
            f"{folder} has {', '.join(others)} but no mix: name its folders "
            "mix, s1 and s2"
        )
    return make_mixtures(model, folder)


def read_mixtures(folder, rate):
    """Mixtures of a set and their sources, each [T]."""
    paths = sorted((folder / "mix").glob("*.wav"))
    if not paths:
        raise FileNotFoundError(f"{folder}/mix has no wav files")
    for path in paths:
        yield read_mixture(folder, path.name, rate)


def read_mixture(folder, name, rate):
    """Read a mixture of a set and its sources, each [T]."""
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
    """Yield mixtures of a folder's speakers with their sources, each [T]."""
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


if __name__ == "__main__":
    main()
