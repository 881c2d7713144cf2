#!/usr/bin/env python3
"""Files per second of the recipe's preparation, new ones and unchanged ones.

> python benchmarks/preparation_speed.py

Makes a WSJ0-mix folder of 5 s files at 8 kHz (16-bit) in a temporary folder.
Writes results/preparation_speed.csv: medians of runs, with what the machine
had in memory and, where the system allows it, with files read from the disk;
per second of the clock and, for a machine that has other work, per second of
computing.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
from records import write_csv

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "recipes/WSJ0Mix/separation"))

from prepare_data import prepare_wsjmix  # noqa: E402

SIZES = {"tr": 800, "cv": 100, "tt": 100}  # mixtures
SECONDS, RATE, RUNS = 5, 8000, 5
OUT = Path(__file__).parent / "results" / "preparation_speed.csv"
COLUMNS = ("files", "number", "cores", "per second", "per CPU second")


def make(folder):
    """Write the mixtures; the list of all files."""
    rng, files = np.random.default_rng(0), []
    for part, mixtures in SIZES.items():
        for name in ("mix", "s1", "s2"):
            place = folder / "wav8k" / "min" / part / name
            place.mkdir(parents=True)
            for i in range(mixtures):
                signal = 0.1 * rng.normal(size=SECONDS * RATE)
                files.append(place / f"{i:05d}.wav")
                soundfile.write(files[-1], signal, RATE)
    return files


def forget(files):
    """Have the system read these files from the disk next time."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main():
    """Time all, write the rows."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files = make(folder / "data")
        seconds = {"new": [], "unchanged": []}
        if hasattr(os, "posix_fadvise"):
            seconds["new, from disk"] = []

        def prepare(save, what):
            start = time.perf_counter(), time.process_time()
            prepare_wsjmix(folder / "data", folder / save)
            stop = time.perf_counter(), time.process_time()
            seconds[what].append([b - a for a, b in zip(start, stop)])

        for run in range(RUNS):
            prepare(f"save{run}", "new")
            prepare(f"save{run}", "unchanged")
            if "new, from disk" in seconds:
                forget(files)
                prepare(f"disk{run}", "new, from disk")
    rows = []
    for what, times in seconds.items():
        medians = [statistics.median(kind) for kind in zip(*times)]
        speeds = [round(len(files) / median) for median in medians]
        row = (what, len(files), os.cpu_count(), *speeds)
        rows.append(dict(zip(COLUMNS, row)))
        print(*row)
    write_csv(OUT, rows)


if __name__ == "__main__":
    main()
