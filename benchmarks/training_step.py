#!/usr/bin/env python3
"""What a training step spends its time on, in one run.

> python benchmarks/training_step.py

For the sizes and batches that the recipes train, float32, on one thread and on
two: seconds of forward and backward, of our optimizer and of torch's Muon, and
the share that ours takes of a step. Medians, the parts by turns. Writes
results/training_step.csv.
"""

import statistics
import time
from pathlib import Path

import torch
from models import build_separator
from records import write_csv

from speechbrain_flashformer.training.losses import pit_snr_loss
from speechbrain_flashformer.training.optim import Muon, matrix_groups

OUT = Path(__file__).parent / "results" / "training_step.csv"
RATE = 8000
STEPS = 5
# Size, numbers of its yaml, mixtures and seconds of each.
TRAINED = (
    ("tiny", {}, 8, 1),
    ("tiny", {"num_layers": 8}, 4, 4),
    ("base", {}, 4, 4),
)
OPTIONS = {"lr": 1e-6, "adjust_lr_fn": "match_rms_adamw"}


def main():
    """Time each size, write the rows."""
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, numbers, mixtures, seconds in TRAINED:
            rows.append(
                {
                    "model": name,
                    **{"num_layers": "as it is", **numbers},
                    "batch": f"{mixtures} x {seconds} s",
                    "threads": threads,
                    **measure(
                        build_separator(name, **numbers), mixtures, seconds
                    ),
                }
            )
            print(rows[-1], flush=True)
    write_csv(OUT, rows)


def measure(model, mixtures, seconds):
    """Median seconds of each part, and the optimizer's share."""
    masknet = model.parts[1]
    groups = matrix_groups(masknet)
    taken = {id(p) for group in groups for p in group["params"]}
    rest = [p for p in model.parameters() if id(p) not in taken]
    ours = Muon(groups, **OPTIONS), torch.optim.AdamW(rest, lr=1e-6)
    matrices = [p for p in masknet.parameters() if p.ndim == 2]
    theirs = (torch.optim.Muon(matrices, **OPTIONS),)
    times = {"network (s)": [], "optimizer (s)": [], "torch's Muon (s)": []}
    for _ in range(STEPS + 1):
        mixture = torch.randn(mixtures, seconds * RATE)
        targets = torch.randn(mixtures, seconds * RATE, 2)
        model.zero_grad()
        start = time.perf_counter()
        pit_snr_loss(targets, model(mixture)).mean().backward()
        times["network (s)"].append(time.perf_counter() - start)
        for name, optimizers in zip(list(times)[1:], (ours, theirs)):
            start = time.perf_counter()
            for optimizer in optimizers:
                optimizer.step()
            times[name].append(time.perf_counter() - start)
    # The first step loads kernels.
    row = {name: statistics.median(x[1:]) for name, x in times.items()}
    network, optimizer = row["network (s)"], row["optimizer (s)"]
    share = 100 * optimizer / (network + optimizer)
    row = {name: round(value, 4) for name, value in row.items()}
    return row | {"optimizer's share (%)": round(share, 1)}


if __name__ == "__main__":
    main()
