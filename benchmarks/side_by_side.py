#!/usr/bin/env python3
"""FlashFormer beside its peers: speed, memory and arithmetic over the length.

> python -m pip install -e ".[bench]"
> python benchmarks/side_by_side.py

Random weights, float32, batch size 1, 8 kHz, two threads: separation of 1 s to
10 min, and training steps of 4 s. Base is also measured without its window, and
with attention over every frame. Each task of a model runs in its own process.
The time for a length is predicted from the length before, assuming that it
grows at least linearly. A separation with a predicted time of more than --limit
seconds times threads is skipped. A separation that needs more than --memory GB
is stopped.

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

from records import read_csv, with_table, write_csv, write_text
from side_by_side_shown import (
    KEYS,
    MODELS,
    TABLE,
    draw,
    report,
    table,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "side_by_side.csv"
README = ROOT / "README.md"
THREADS = (2,)
LENGTHS = (1, 4, 16, 60, 240, 600)
TRAINED = (4,)  # seconds
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


def main(words=None):
    """Measure what is missing, write table and plots, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--models", nargs="+", default=MODELS, choices=MODELS)
    add("--threads", nargs="+", type=int, default=THREADS)
    add("--limit", type=float, default=45, metavar="SECONDS")
    add("--memory", type=float, default=16, metavar="GB")
    add("--again", action="store_true", help="forget what was measured")
    add("--job", help=argparse.SUPPRESS)
    parsed = parser.parse_args(words)
    if parsed.job:
        from one_model import measure

        measure(*json.loads(parsed.job))
        return
    if parsed.again:
        RESULTS.unlink(missing_ok=True)
    before = read()
    for threads in parsed.threads:
        for task, lengths in (("separate", LENGTHS), ("train", TRAINED)):
            for model in parsed.models:
                rows = read()
                done = {tuple(row[key] for key in KEYS) for row in rows}
                # All lengths of a job are measured again, because each time
                # is predicted from the length before.
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
    if read() == before:
        print("nothing is left to measure: --again measures everything anew")
    rows = read()
    write_text(RESULTS.with_suffix(".md"), table(rows))
    page = with_table(README.read_text("utf-8"), TABLE, table(rows))
    write_text(README, page)
    draw(rows, RESULTS)
    print(*report(rows), sep="\n")


def one_job(task, model, threads, lengths, parsed):
    """Yield one row per length from one process, also for those not reached."""
    macs = {row["model"]: row["gmac_per_s"] for row in read()}
    job = [task, model, threads, lengths, parsed.limit, parsed.memory]
    job.append(macs.get(model))
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    reached, row = 0, {}
    # Its stderr is read at the end: the pipe holds the few warnings it prints.
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
    """The rows measured so far, numbers as numbers."""
    _, rows = read_csv(RESULTS)
    for row in rows:
        for key, value in row.items():
            if key not in ("task", "model", "outcome") and value:
                row[key] = float(value) if "." in value else int(value)
    return rows


def write(rows):
    """Write the rows, all or none."""
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


if __name__ == "__main__":
    main()
