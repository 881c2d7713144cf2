#!/usr/bin/env python3
"""Compare FlashFormer with other networks: speed, memory and arithmetic.

> python -m pip install -e ".[bench]"
> python benchmarks/side_by_side.py

Random weights, float32, batch size 1, 8 kHz, one and two threads: separation of
1 s to 10 min, and training steps of 4 s. Each model, task and number of threads
runs in its own process. The time for a length is predicted from the length
before, assuming that it grows at least linearly. A separation with a predicted
time of more than --limit seconds times threads is skipped. A separation that
needs more than --memory GB is stopped.

Every figure is saved at once: the command resumes where it was interrupted, and
--again starts over. ``load`` is the load of the machine before a measurement.
Do not quote figures measured while other programs were running, except
``cpu_s``, the CPU time. Linux only.

Writes to ``benchmarks/results/``: ``side_by_side.csv``, the table
``side_by_side.md``, which is also in the README, and two plots. Prints the
ratios that are goals of the project.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from records import (
    read_csv,
    write_csv,
    write_figure,
    write_text,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "side_by_side.csv"
README = ROOT / "README.md"
OURS = tuple(f"flashformer-{size}" for size in ("tiny", "base", "large"))
PEERS = (
    "conv-tasnet",
    "dprnn",
    "skim",
    "sepformer",
    "re-sepformer",
    "mossformer2",
    "fla-sepreformer",
)
MODELS = (*OURS, *PEERS)
THREADS = (1, 2)
LENGTHS = (1, 4, 16, 60, 240, 600)
TRAINED = (4,)  # seconds
# Published SI-SNRi on WSJ0-2mix in dB, without and with dynamic mixing. The
# MACs of models that are not run here were counted with the same counter.
PUBLISHED = {
    "conv-tasnet": (15.3, None),
    "sepformer": (20.4, 22.4),
    "re-sepformer": (None, 18.6),
    "skim": (None, 18.1),
    "mossformer2": (None, 24.1),
}
COUNTED = {
    "SepReformer-T": (5.4, 22.4, None),
    "SepReformer-B": (20.2, 23.8, None),
    "SepReformer-L": (78, None, 25.1),
    "TF-Locoformer-M": (125, 23.6, 24.6),
}
KEYS = ("task", "model", "threads", "seconds")
COLUMNS = (
    *KEYS,
    "outcome",
    "runs",
    "median_s",
    "rtf",
    "cpu_s",
    "extra_peak_mb",
    "gmac_per_s",
    "parameters_m",
    "load",
)


# --- measurements ------------------------------------------------------------


def main(words=None):
    """Measure what is missing, write table and plots, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--models", nargs="+", default=MODELS, choices=MODELS)
    add("--threads", nargs="+", type=int, default=THREADS)
    add("--limit", type=float, default=45, metavar="SECONDS")
    add("--memory", type=float, default=16, metavar="GB")
    add("--again", action="store_true", help="measure everything again")
    add("--job", help=argparse.SUPPRESS)
    parsed = parser.parse_args(words)
    if parsed.job:
        from one_model import measure

        measure(*json.loads(parsed.job))
        return
    if parsed.again:
        RESULTS.unlink(missing_ok=True)
    for threads in parsed.threads:
        for task, lengths in (("separate", LENGTHS), ("train", TRAINED)):
            for model in parsed.models:
                rows = read()
                done = {tuple(row[key] for key in KEYS) for row in rows}
                # All lengths are measured again: each predicts the next.
                wanted = (task, model, threads)
                if all((*wanted, seconds) in done for seconds in lengths):
                    continue
                rows = [
                    row
                    for row in rows
                    if tuple(row[key] for key in KEYS[:3]) != wanted
                ]
                for row in one_job(task, model, threads, lengths, parsed):
                    rows.append(row)
                    print(*row.values(), sep="\t", flush=True)
                    write(rows)
    rows = read()
    write_text(RESULTS.with_suffix(".md"), table(rows))
    write_text(README, with_table(README.read_text("utf-8"), table(rows)))
    draw(rows)
    print(*report(rows), sep="\n")


def one_job(task, model, threads, lengths, parsed):
    """Yield the rows of one process, also for lengths that it did not reach."""
    macs = {row["model"]: row["gmac_per_s"] for row in read()}
    job = [task, model, threads, lengths, parsed.limit, parsed.memory]
    job.append(macs.get(model))
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    reached, row = 0, {}
    # The pipe of stderr has room for a few warnings; more are not expected.
    for line in process.stdout:
        if line.startswith("{"):
            row = json.loads(line)
            reached += 1
            yield _whole(row)
    errors = process.stderr.read()
    killed = process.wait() < 0
    if reached == len(lengths):
        return
    if killed or row.get("outcome") == "memory":
        outcome = "memory"
    else:
        last = errors.strip().splitlines()[-1:] or ["no reason given"]
        outcome = f"failed: {last[0]}"
    for seconds in lengths[reached:]:
        yield _whole(
            {"task": task, "model": model, "threads": threads}
            | {"seconds": seconds, "outcome": outcome}
        )


def _whole(row):
    return {column: row.get(column, "") for column in COLUMNS}


def read():
    """Read the rows measured so far, with numbers converted."""
    _, rows = read_csv(RESULTS)
    for row in rows:
        for key, value in row.items():
            if key not in ("task", "model", "outcome") and value:
                row[key] = float(value) if "." in value else int(value)
    return rows


def write(rows):
    """Write all rows, sorted."""
    place = {model: i for i, model in enumerate(MODELS)}
    rows = sorted(
        rows,
        key=lambda row: (
            row["threads"],
            row["task"],
            place[row["model"]],
            row["seconds"],
        ),
    )
    write_csv(RESULTS, rows, COLUMNS)


# --- table and plots ---------------------------------------------------------

START = "<!-- table: python benchmarks/side_by_side.py -->\n"
END = "<!-- end of table -->\n"


def table(rows):
    """Return the table of the README as Markdown, for two threads."""
    found = {tuple(row[key] for key in KEYS): row for row in rows}

    def cell(task, model, seconds, column, digits):
        row = found.get((task, model, 2, seconds))
        if row is None:
            return ""
        if row["outcome"] == "ok":
            return f"{row[column]:.{digits}f}"
        return row["outcome"].split(":")[0]

    lines = [
        "| model | parameters (M) | GMAC/s | RTF, 4 s | RTF, 60 s "
        "| RTF, 10 min | MB, 60 s | MB, 10 min | training step (s) "
        "| training MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        known = [
            row for row in rows if row["model"] == model and row["gmac_per_s"]
        ]
        if not any(row["model"] == model for row in rows):
            continue
        about = ["", ""]
        if known:
            about = [
                f"{known[0]['parameters_m']:.1f}",
                f"{known[0]['gmac_per_s']:.2f}",
            ]
        cells = [
            model,
            *about,
            *(cell("separate", model, s, "rtf", 3) for s in (4, 60, 600)),
            *(
                cell("separate", model, s, "extra_peak_mb", 0)
                for s in (60, 600)
            ),
            cell("train", model, 4, "median_s", 2),
            cell("train", model, 4, "extra_peak_mb", 0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(text, lines):
    """Return a page with the table between its markers replaced."""
    before, rest = text.split(START)
    return before + START + lines + END + rest.split(END)[1]


def draw(rows):
    """Plot time and memory over the length, and quality over MACs."""
    from matplotlib.figure import Figure

    # A log axis needs at least one point.
    if not any(row["threads"] == 2 and row["outcome"] == "ok" for row in rows):
        return
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, column, label in zip(
        figure.subplots(1, 2),
        ("rtf", "extra_peak_mb"),
        ("time per second of audio (s)", "memory (MB)"),
    ):
        for model in MODELS:
            points = [
                (row["seconds"], row[column])
                for row in rows
                if (row["task"], row["model"]) == ("separate", model)
                and row["threads"] == 2
                and row["outcome"] == "ok"
                and row[column] > 0
            ]
            style = "-o" if model in OURS else "--."
            if points:
                axes.plot(*zip(*points), style, label=model)
        axes.set(xscale="log", yscale="log", xlabel="audio (s)", ylabel=label)
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].axhline(1, color="0.6", linewidth=0.8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.suptitle("separation, CPU, two threads, float32", fontsize=10)
    _save(figure, "length")

    macs = {
        row["model"]: row["gmac_per_s"] for row in rows if row["gmac_per_s"]
    }
    points = {
        model: (macs[model], *PUBLISHED[model])
        for model in PEERS
        if model in macs and model in PUBLISHED
    } | COUNTED
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, (gmacs, *gains) in points.items():
        for gain, marker in zip(gains, ("o", "^")):
            if gain:
                axes.plot(gmacs, gain, marker, color="C0")
                axes.annotate(
                    name,
                    (gmacs, gain),
                    (4, 4),
                    textcoords="offset points",
                    fontsize=8,
                )
    for name in OURS:
        if name in macs:
            axes.axvline(macs[name], color="C1", linestyle=":")
            axes.annotate(
                f"{name}: not trained on it",
                (macs[name], 15.2),
                (3, 0),
                textcoords="offset points",
                rotation=90,
                fontsize=8,
            )
    axes.plot([], [], "o", color="C0", label="as published")
    axes.plot([], [], "^", color="C0", label="with dynamic mixing")
    axes.set(
        xscale="log",
        xlim=(0.15, 500),
        xlabel="GMAC per second of audio",
        ylabel="SI-SNRi on WSJ0-2mix (dB)",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    _save(figure, "quality")


def _save(figure, what):
    write_figure(RESULTS.with_name(f"{RESULTS.stem}_{what}.png"), figure)


def report(rows):
    """Yield lines that compare the ratios with their goals, two threads."""
    found = {
        tuple(row[key] for key in KEYS): row
        for row in rows
        if row["outcome"] == "ok"
    }
    base = "flashformer-base"

    def ratio(task, seconds, column, peer):
        pair = [found.get((task, m, 2, seconds)) for m in (peer, base)]
        if None in pair:
            return "not measured"
        return f"{pair[0][column] / pair[1][column]:.1f}"

    for peer, bar in (("sepformer", 10), ("conv-tasnet", 1)):
        for seconds in (4, 16, 60):
            times = ratio("separate", seconds, "median_s", peer)
            yield f"{seconds} s: time of {peer} to base: {times} (bar {bar})"
    memory = ratio("separate", 60, "extra_peak_mb", "sepformer")
    yield f"60 s: memory of sepformer to base: {memory} (bar 6)"
    step = ratio("train", 4, "median_s", "sepformer")
    memory = ratio("train", 4, "extra_peak_mb", "sepformer")
    yield f"training: time of sepformer to base: {step} (bar 5)"
    yield f"training: memory of sepformer to base: {memory} (bar 3)"
    ends = [found.get(("separate", base, 2, s)) for s in (16, 240)]
    if None not in ends:
        growth = ends[1]["rtf"] / ends[0]["rtf"]
        yield f"base: RTF at 240 s to that at 16 s: {growth:.2f} (bar 1.3)"


if __name__ == "__main__":
    main()
