#!/usr/bin/env python3
"""Latency, load and memory of the streaming model, block by block.

> python benchmarks/streaming_speed.py [--minutes 10]

Feeds noise in blocks of 16 ms to hparams/flashformer-streaming.yaml (the time
does not depend on the weights), as fast as it goes, with one thread and with
two, each in a process of its own. Writes results/streaming_speed.csv.
"""

import argparse
import csv
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_flashformer.streaming import StreamingSeparator

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "streaming_speed.csv"
BLOCK = 0.016  # seconds


def main():
    """Measure each number of threads, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        print(json.dumps(measure(args.threads, args.minutes)))
        return
    rows = []
    for threads in (1, 2):
        command = [sys.executable, __file__, "--threads", str(threads)]
        command += ["--minutes", str(args.minutes)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1])
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def measure(threads, minutes):
    """Feed a stream; a row of figures."""
    torch.set_num_threads(threads)
    with open(ROOT / "hparams" / "flashformer-streaming.yaml") as file:
        hparams = load_hyperpyyaml(file)
    modules = [hparams[part] for part in ("Encoder", "MaskNet", "Decoder")]
    stream = StreamingSeparator(*(module.eval() for module in modules))
    rate = hparams["sample_rate"]
    block = 0.1 * torch.randn(1, round(BLOCK * rate))
    for _ in range(300):
        stream.feed(block)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(round(60 * minutes / BLOCK)):
        start = time.perf_counter()
        stream.feed(block)
        times.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tenth = len(times) // 10
    ends = [statistics.median(part) for part in (times[:tenth], times[-tenth:])]
    return {
        "threads": threads,
        "minutes": minutes,
        "latency (ms)": 1000 * stream.latency / rate,
        "rtf": round(statistics.mean(times) / BLOCK, 4),
        "median block (ms)": round(1000 * statistics.median(times), 3),
        "99.9th percentile (ms)": round(
            1000 * statistics.quantiles(times, n=1000)[-1], 3
        ),
        "last tenth over first": round(ends[1] / ends[0], 3),
        "memory grown (MB)": round((after - before) / 1024, 1),
    }


if __name__ == "__main__":
    main()
