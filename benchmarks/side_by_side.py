#!/usr/bin/env python3
"""FlashFormer beside SpeechBrain's SepFormer and Conv-TasNet.

> python benchmarks/side_by_side.py

Random weights, float32, batch 1, 8 kHz, as many threads as the machine has
cores (--threads). Each figure is taken in a process of its own, the models in
turn, so that no one profits from the order. Writes ``benchmarks/results/``
``side_by_side.csv`` and prints the ratios that the project promises. About
ten minutes and 8 GB of memory on 2 cores.
"""

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

RATE = 8000
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "side_by_side.csv"
PEERS = ("conv-tasnet", "sepformer")
OURS = tuple(f"flashformer-{size}" for size in ("tiny", "base", "large"))
# After so many seconds a job is not run once more.
PATIENCE = 30
# What is measured: (task, model, seconds of audio, runs).
JOBS = [
    *(
        ("separate", model, seconds, runs)
        for seconds, runs in ((4, 5), (16, 5), (60, 3))
        for model in (*OURS, *PEERS)
    ),
    *(("separate", "flashformer-base", s, 3) for s in (15, 75, 150, 300)),
    *(("train", model, 4, 5) for model in (*OURS, *PEERS)),
]


def measure(task, name, seconds, runs, threads):
    """Seconds per run, extra peak memory, MACs and parameters; as a dict."""
    import torch
    from models import build

    from speechbrain_flashformer.metrics import count_macs, pit_si_snr_loss
    from speechbrain_flashformer.separate import separate

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = build(name)
    mixture = torch.randn(1, seconds * RATE) * 0.1
    targets = torch.randn(1, seconds * RATE, 2) * 0.1
    parameters = [p for part in model for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def run():
        if task == "separate":
            with torch.no_grad():
                separate(mixture, *model)
            return
        optimizer.zero_grad()
        pit_si_snr_loss(targets, separate(mixture, *model)).mean().backward()
        optimizer.step()

    for part in model:
        part.train(task == "train")
    # Load libraries and kernels on a short input, then look at memory.
    with torch.no_grad():
        separate(mixture[:, :RATE], *model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    while len(times) < runs and sum(times) < PATIENCE:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    macs = count_macs(separate, mixture[:, : 4 * RATE], *model)
    return {
        "task": task,
        "model": name,
        "seconds": seconds,
        "runs": len(times),
        "median_s": round(statistics.median(times), 4),
        "rtf": round(statistics.median(times) / seconds, 5),
        "extra_peak_mb": round((after - before) / 1024),
        "gmac_per_s": round(macs / 1e9 / 4, 3),
        "parameters_m": round(sum(p.numel() for p in parameters) / 1e6, 2),
    }


def report(rows):
    """Lines that put the promised ratios beside their bars."""

    def get(task, model, seconds, what):
        return next(
            row[what]
            for row in rows
            if (row["task"], row["model"], row["seconds"])
            == (task, model, seconds)
        )

    def ratio(task, seconds, what, peer):
        return get(task, peer, seconds, what) / get(
            task, "flashformer-base", seconds, what
        )

    for seconds in (4, 16, 60):
        slower = {
            peer: ratio("separate", seconds, "median_s", peer) for peer in PEERS
        }
        yield (
            f"{seconds} s: base is {slower['sepformer']:.1f} times as fast as "
            f"SepFormer (bar 10), {slower['conv-tasnet']:.1f} times as fast "
            "as Conv-TasNet (bar 1)"
        )
    base = "flashformer-base"
    growth = get("separate", base, 300, "rtf") / get(
        "separate", base, 15, "rtf"
    )
    yield (
        f"base, time per second of audio at 300 s over 15 s: {growth:.2f} "
        "(bar 1.3)"
    )
    memory = [
        f"{s} s: {get('separate', base, s, 'extra_peak_mb')} MB"
        for s in (15, 75, 150, 300)
    ]
    yield "base, extra peak memory: " + ", ".join(memory) + " (linear)"
    yield (
        "60 s: SepFormer takes "
        f"{ratio('separate', 60, 'extra_peak_mb', 'sepformer'):.1f} times the "
        "memory of base (bar 6)"
    )
    yield (
        "training step at 4 s: base is "
        f"{ratio('train', 4, 'median_s', 'sepformer'):.1f} times as fast as "
        "SepFormer (bar 5), which takes "
        f"{ratio('train', 4, 'extra_peak_mb', 'sepformer'):.1f} times the "
        "memory (bar 3)"
    )


def main():
    """Measure everything, each job in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job = json.loads(arguments.job)
        print(json.dumps(measure(*job, arguments.threads)))
        return
    rows = []
    for job in JOBS:
        command = [sys.executable, __file__, "--job", json.dumps(job)]
        command += ["--threads", str(arguments.threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{job} failed:\n{done.stderr}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(*rows[-1].values(), sep="\t", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    partial = RESULTS.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, RESULTS)
    print(*report(rows), sep="\n")


if __name__ == "__main__":
    main()
