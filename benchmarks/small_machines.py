#!/usr/bin/env python3
"""Measure the models on a small machine: the tables of docs/small_machines.md.

> python benchmarks/small_machines.py

Our models (``pretrained`` are the networks of the models in the package) and
other models of similar cost, random weights, float32, 8 kHz, one and two
threads:

* separation of 4 s and of 60 s in one call: computing time over audio time
  (RTF), and the memory beyond the loaded model, measured as in side_by_side.py;
* one minute of audio through the pretrained streaming network on one thread,
  torch in blocks of 16 ms, traced torch of 16, 8 and 4 ms, onnxruntime of 16
  and 8 ms: load (computing time over audio time) and the 99.9th percentile of
  the block times, medians of three runs in turns, because the speed of the
  machine varies over minutes;
* run time of whole commands, including the start of Python, on one thread:
  median of five runs.

Each measurement has its own process. The machine should run nothing else
(``machine load`` shows it). Writes results/small_machines.csv and the tables of
the page.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import inference_speed
import numpy as np
import side_by_side
import soundfile
from records import with_table, write_csv, write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "small_machines.csv"
PAGE = ROOT / "docs" / "small_machines.md"
PRETRAINED = {"num_layers": 8}
MODELS = {
    "tiny": "flashformer-tiny",
    "pretrained": "flashformer-tiny:num_layers=8",
    "streaming": "flashformer-streaming",
    "pretrained, streaming": "flashformer-streaming:num_layers=8",
    "base": "flashformer-base",
    "SkiM": "skim",
    "RE-SepFormer": "re-sepformer",
    "Conv-TasNet": "conv-tasnet",
}
SECONDS = (4, 60)
LIMITS = Namespace(limit=120, memory=16)
# Runtime, and block length in milliseconds.
STREAMS = (
    ("torch", 16),
    ("torch, traced", 16),
    ("torch, traced", 8),
    ("torch, traced", 4),
    ("onnxruntime", 16),
    ("onnxruntime", 8),
)
COMMANDS = {
    "--help": ["--help"],
    "info": ["info"],
    "separate, a file of 5 s": ["separate", "a.wav", "-o", "out"],
}
RUNS = 5
ROUNDS = 3  # of all streams


def main():
    """Run all measurements, write the rows and the page."""
    tables = {"whole": [], "stream": [], "start": []}
    for what, rows in (("whole", whole()), ("stream", streams())):
        for row in rows:
            print(row, flush=True)
            tables[what].append(row)
    tables["start"] = starts()
    text = PAGE.read_text("utf-8")
    for what, rows in tables.items():
        text = with_table(text, what, markdown(rows))
    rows = [{"table": k, **row} for k, rows in tables.items() for row in rows]
    columns = dict.fromkeys(key for row in rows for key in row)
    write_csv(RESULTS, rows, tuple(columns))
    write_text(PAGE, text)


def whole():
    """Yield the rows of separation in one call."""
    for title, name in MODELS.items():
        row = {"model": title}
        for threads, column in ((1, "1 thread"), (2, "2 threads")):
            job = "separate", name, threads, SECONDS, LIMITS
            for found in side_by_side.one_job(*job):
                seconds, rtf = found["seconds"], found["rtf"]
                row["parameters (M)"] = found["parameters_m"]
                row["GMAC/s"] = found["gmac_per_s"]
                if found["outcome"] != "ok":
                    rtf = found["outcome"].split(":")[0]
                row[f"RTF, {seconds} s, {column}"] = rtf
                if threads == 2:
                    row[f"MB, {seconds} s"] = found["extra_peak_mb"]
        yield {**row, "machine load": round(os.getloadavg()[0], 1)}


def streams():
    """Yield the rows of streams."""
    figures = ("load", "99.9th percentile (ms)", "machine load")
    runs = {stream: [] for stream in STREAMS}
    for _ in range(ROUNDS):
        for runtime, block in STREAMS:
            job = "stream", runtime, 1, 1, block
            runs[runtime, block].append(
                inference_speed.run_alone(*job, **PRETRAINED)
            )
    for (runtime, block), found in runs.items():
        medians = {
            name: statistics.median(run[name] for run in found)
            for name in figures
        }
        yield {"runtime": runtime, "block (ms)": block, **medians}


def starts():
    """Return the rows of commands."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        noise = 0.1 * np.random.default_rng(0).standard_normal(40000)
        soundfile.write(Path(folder, "a.wav"), noise, 8000)
        for name, words in COMMANDS.items():
            times = []
            for _ in range(RUNS):
                start = time.perf_counter()
                subprocess.run(
                    [sys.executable, "-m", "speechbrain_flashformer.cli"]
                    + [*words, *(["--overwrite"] if "-o" in words else [])],
                    cwd=folder,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    check=True,
                    capture_output=True,
                )
                times.append(time.perf_counter() - start)
            seconds = round(statistics.median(times), 2)
            rows.append({"command": f"flashformer {name}", "seconds": seconds})
            print(rows[-1], flush=True)
    return rows


def markdown(rows):
    """Return rows as a table."""
    cells = [list(rows[0]), ["---"] * len(rows[0])]
    cells += [map(str, row.values()) for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    main()
