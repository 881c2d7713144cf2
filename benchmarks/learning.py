#!/usr/bin/env python3
"""Train models on the same mixtures and compare how fast they learn.

> python benchmarks/learning.py --speech SPEECH --test cv=CV --test tt=TT \
      --examples 4800 tiny tiny:num_layers=2 conv-tasnet

SPEECH is a folder or CSV file of single-speaker recordings, as in dynamic
mixing, or the input folder of pretrained_data.py, whose validation part is left
out. Several SPEECH may be given; the default is generated voices. CV and TT
hold mix/, s1/ and s2/; the test set ``voices`` needs no folder. Every MODEL is
trained with every SEED, for a number of --examples or --minutes. All models get
the same mixtures, gradient clipping and shape of the learning rate schedule.

MODEL is NAME[:KEY=VALUE]... NAME is a size of hparams/, conv-tasnet, sepformer,
re-sepformer, skim or dprnn, or, with the extra ``bench``, mossformer2 or
fla-sepreformer. A KEY is a number of the yaml of a size
(tiny:d_model=96:window=(62,62)) or one of these:

* ``optimizer``: muon (Muon and AdamW as in the recipe, the default of our
  models), muon-inner (the same without Muon on the input projection and the
  mask head) or adamw (the default of the other models);
* ``lr``, ``batch``, ``crop`` (samples). ``crop`` and ``batch`` may be a range:
  (4000,12000) grows from 4000 to 12000 in the first 70 % of the training;
* ``levels``: share of the level difference between the speakers that is kept;
  (0,1) grows in the same way;
* ``speeds``: least and greatest speed in percent;
* ``precision=bf16``;
* ``flip``: share of the mixtures with inverted polarity, 0, 0.5 or 1;
* ``loss``: si-snr, snr or mixed;
* ``absent``: share of the mixtures with only one speaker;
* ``start``, ``output=map`` and, for our models, ``without``, ``norm`` and
  ``variant``: see models.py.

Writes OUT.csv (a row per run), OUT_curves.csv (scores during training), OUT.md
(the rows as a table) and OUT.png (the curves). ``training`` is the mean
negative loss since the previous point; all other scores are SI-SNRi; both in
dB.

A run that is in OUT.csv is skipped, unless it has another ``version`` of this
project's mixing and optimizers. Data sets are identified only by the names of
the folders and the number of recordings, so use another OUT for other speech or
other test sets. With one thread, minutes are CPU time, so other programs do not
count; with more threads they are wall-clock time.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

import torch
from evaluate_model import read_mixture
from models import build_separator
from records import read_csv, write_csv, write_figure, write_text
from training import (
    RATE,
    TEST_SECONDS,
    both_ends,
    parse,
    real_time_factor,
    score,
    train,
)

from speechbrain_flashformer.nnet.macs import count_macs
from speechbrain_flashformer.training.effects import PolarityFlip
from speechbrain_flashformer.training.mixing import DynamicMixtures
from speechbrain_flashformer.training.recordings import find_recordings
from speechbrain_flashformer.training.turns import Absence
from speechbrain_flashformer.training.voices import make_voices

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT.parent / "recipes/Pretrained"))

from pretrained_data import real_speech  # noqa: E402

# The data set of generated voices, for training and test.
VOICES = {"sizes": (1000, 1, 200), "utterances": 5}
# The speaker in a file name: tr00997_mike2b_Hugod.wav is person b of mike2.
VOICE = r"^\w{7}_(\w+?)[a-d]_"

# Version of everything that determines the result of a run: increase it if
# mixing, an optimizer, a gradient or an initialization changes. Rows of other
# versions are kept and count as other runs.
VERSION = 3
# Columns that identify a run, and results; then SI-SNRi for each set.
KEY = ("model", "seed", "data", "budget", "optimizer", "lr", "batch", "crop")
KEY += ("test_mixtures", "threads", "parameters_m", "gmac_per_s", "version")
MEASURED = ("steps", "examples", "minutes", "rtf", "training")
CURVES = (*KEY, "examples", "minutes", "set", "db")


def first_mixtures(folder, count):
    """Read the first mixtures of a folder, in the form that ``score`` takes."""
    names = sorted(path.name for path in (folder / "mix").glob("*.wav"))
    if len(names) < count:
        raise ValueError(
            f"{folder}/mix holds {len(names)} wav files, {count} are asked "
            "for: see --test and --mixtures"
        )
    mixtures = []
    for name in names[:count]:
        mixture, *sources = (
            signal[: TEST_SECONDS * RATE]
            for signal in read_mixture(folder, name, RATE)
        )
        mixtures.append((mixture, torch.stack(sources, 1)))
    return mixtures


def load_speech(arguments):
    """Return the name and the recordings of the training data."""
    if not arguments.speech:
        folder = make_voices(arguments.scratch / "voices", **VOICES)
        folder = folder / "wav8k/min/tr/s1"
        return "voices", find_recordings(folder, VOICE)
    found = []
    for place in arguments.speech:
        if (place / "picovoice-commands").is_dir():
            found += real_speech(place)
        else:
            found += find_recordings(place, arguments.speaker)
    return " + ".join(place.name for place in arguments.speech), found


def load_tests(arguments):
    """Return the test mixtures by the name of their set."""
    tests = {}
    for word in arguments.test:
        name, _, folder = word.partition("=")
        if name == "voices" and not folder:
            made = make_voices(arguments.scratch / "voices", **VOICES)
            folder = made / "wav8k/min/tt"
        elif not folder:
            raise ValueError(f"--test {word} is not NAME=FOLDER")
        tests[name] = first_mixtures(Path(folder), arguments.mixtures)
    return tests


def run(entry, seed, speech, tests, arguments, done):
    """Do one run; return its row and the rows of its curve, None if done."""
    name, training, numbers = parse(entry)
    torch.manual_seed(seed)
    model = build_separator(name, **numbers)
    source, recordings = speech
    mixtures = DynamicMixtures(
        *(recordings, 2, RATE, both_ends(training["crop"])[0], seed),
        speeds=training["speeds"],
        same_corpus_share=0.5,
        effects=[Absence(training["absent"]), PolarityFlip(training["flip"])],
    )
    seconds = torch.randn(1, TEST_SECONDS * RATE)
    # Without oneDNN, because the counter does not see its fused LSTM kernel.
    with torch.backends.mkldnn.flags(enabled=False):
        macs = count_macs(model, seconds) / TEST_SECONDS
    count = sum(p.numel() for p in model.parameters())
    asked = arguments.examples or arguments.minutes
    values = (
        entry,
        seed,
        f"{source} ({len(recordings)} recordings)",
        f"{asked} {'examples' if arguments.examples else 'minutes'}",
        *(training[key] for key in ("optimizer", "lr", "batch", "crop")),
        arguments.mixtures,
        arguments.threads,
        round(count / 1e6, 3),
        round(macs / 1e9, 3),
        VERSION,
    )
    key = dict(zip(KEY, map(str, values)))
    if any(all(row[k] == key[k] for k in KEY) for row in done):
        print(f"{entry}, seed {seed}: done before", flush=True)
        return None
    row, curve = dict(key), []

    def measure(steps, examples, minutes, training_db):
        model.eval()
        scores = {name: score(model, test) for name, test in tests.items()}
        model.train()
        row.update(steps=steps, examples=examples, minutes=minutes, **scores)
        row["training"] = round(training_db, 2)
        point = {**key, "examples": examples, "minutes": minutes}
        for which in ("training", *tests):
            curve.append({**point, "set": which, "db": row[which]})
        print(f"{entry}, seed {seed}: {row['training']}, {scores}", flush=True)

    train(model, mixtures, training, arguments, measure)
    model.eval()
    row["rtf"] = real_time_factor(model)
    return row, curve


def read(path, columns):
    """Read the rows of a CSV of this command; without a file, no rows."""
    found, rows = read_csv(path)
    if path.exists() and found != columns:
        raise ValueError(
            f"{path} has other columns or test sets: give another --out"
        )
    return rows


def table(rows):
    """Format rows of OUT.csv as a Markdown table."""
    sets = list(rows[0])[len(KEY) + len(MEASURED) :]
    titles = ("model", "seed", "budget", "optimizer, rate", "batch x crop")
    titles += ("parameters (M)", "GMAC/s", "minutes", "RTF", *sets)
    titles += ("mean",)
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in rows:
        cells = [f"`{row['model']}`", row["seed"], row["budget"]]
        cells += [f"{row['optimizer']}, {row['lr']}"]
        cells += [f"{row['batch']} x {row['crop']}", row["parameters_m"]]
        cells += [row[k] for k in ("gmac_per_s", "minutes", "rtf")]
        cells += [row[name] for name in sets]
        mean = statistics.mean(float(row[name]) for name in sets)
        cells += [f"{mean:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def draw(path, curves):
    """Plot SI-SNRi over examples and over minutes, one row of plots per set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sets = dict.fromkeys(row["set"] for row in curves)
    runs = {}
    for row in curves:
        label = f"{row['model']}, seed {row['seed']}, {row['budget']}"
        if row["version"] != str(VERSION):
            label += f", version {row['version']}"
        runs.setdefault(label, []).append(row)
    figure, axes = pyplot.subplots(
        len(sets),
        2,
        figsize=(11, 2 + 2.5 * len(sets)),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    styles = ("-", "--", ":", "-.")
    markers = ".x+^"
    for line, name in zip(axes, sets):
        for axis, what in zip(line, ("examples", "minutes")):
            for i, (label, rows) in enumerate(runs.items()):
                rows = [row for row in rows if row["set"] == name]
                axis.plot(
                    [float(row[what]) for row in rows],
                    [float(row["db"]) for row in rows],
                    color=f"C{i % 10}",
                    linestyle=styles[i // 10 % len(styles)],
                    marker=markers[i // 10 % len(markers)],
                    label=label,
                )
            axis.set(xlabel=what)
            axis.grid(alpha=0.3)
        kind = "SI-SNR" if name == "training" else "SI-SNRi"
        line[0].set_ylabel(f"{name}, {kind} (dB)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=7)
    write_figure(path, figure)
    pyplot.close(figure)


def main(words=None):
    """Do all runs that are missing; write all files after each run."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument(
        "--speech", type=Path, action="append", help="may be repeated"
    )
    parser.add_argument(
        "--speaker", default="folder", help="as dm_speaker of the recipe"
    )
    parser.add_argument(
        "--test",
        action="append",
        metavar="NAME=FOLDER",
        help="default: voices; may be repeated",
    )
    parser.add_argument("--mixtures", type=int, default=50, help="per test set")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--examples", type=int)
    budget.add_argument("--minutes", type=float)
    parser.add_argument(
        "--seed", type=int, action="append", help="default: 1; may be repeated"
    )
    parser.add_argument(
        "--points", type=int, default=3, help="per learning curve"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=ROOT / "results/learning")
    parser.add_argument(
        "--scratch",
        type=Path,
        default=ROOT / "scratch",
        help="folder for generated voices",
    )
    arguments = parser.parse_args(words)
    arguments.test = arguments.test or ["voices"]
    arguments.seed = arguments.seed or [1]
    numbers = ("examples", "minutes", "mixtures", "points", "threads")
    for name in numbers:
        if (getattr(arguments, name) or 1) <= 0:
            parser.error(f"--{name} is a number above 0")
    torch.set_num_threads(arguments.threads)
    try:
        compare(arguments)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"learning.py: {error}")


def compare(arguments):
    """Do all runs, and write the files of ``--out``."""
    for entry in arguments.models:
        name, _, numbers = parse(entry)
        build_separator(name, **numbers)
    out = arguments.out
    names = [word.partition("=")[0] for word in arguments.test]
    columns = (*KEY, *MEASURED, *names)
    files = {
        kind: out.with_name(out.name + kind)
        for kind in (".csv", "_curves.csv", ".md", ".png")
    }
    read(files[".csv"], columns)
    speech, tests = load_speech(arguments), load_tests(arguments)
    out.parent.mkdir(parents=True, exist_ok=True)
    for entry in arguments.models:
        for seed in arguments.seed:
            # Read again: another process may have written to it.
            rows = read(files[".csv"], columns)
            made = run(entry, seed, speech, tests, arguments, rows)
            if made is None:
                continue
            # Same order of columns as in the rows that were read.
            row = {name: made[0][name] for name in columns}
            rows = [*read(files[".csv"], columns), row]
            curves = [*read(files["_curves.csv"], CURVES), *made[1]]
            write_csv(files["_curves.csv"], curves, CURVES)
            write_csv(files[".csv"], rows, columns)
            write_text(files[".md"], table(rows))
            draw(files[".png"], curves)


if __name__ == "__main__":
    main()
