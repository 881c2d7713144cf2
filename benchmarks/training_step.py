#!/usr/bin/env python3
"""Measure how the time of a training step is divided.

> python benchmarks/training_step.py

For sizes and batches of the recipes, on one and two threads: seconds of forward
and backward, and of our optimizer, in float32 and bfloat16 (slow on a CPU
without instructions for it), in bfloat16 also with torch's attention kernel;
seconds of torch's Muon; and our optimizer's share of a step. The parts are
timed in turn, and the figures are medians. Writes results/training_step.csv.
"""

import statistics
import time
from pathlib import Path
from unittest import mock

import torch
from records import write_csv

from speechbrain_flashformer import build
from speechbrain_flashformer.nnet import window
from speechbrain_flashformer.training.losses import pit_snr_loss
from speechbrain_flashformer.training.optim import Muon, matrix_groups

OUT = Path(__file__).parent / "results" / "training_step.csv"
RATE = 8000
STEPS = 5
# Size, numbers of its yaml, batch size, and seconds per mixture.
TRAINED = (
    ("tiny", {}, 8, 1),
    ("tiny", {"num_layers": 8}, 4, 4),
    ("base", {}, 4, 4),
)
OPTIONS = {"lr": 1e-6, "adjust_lr_fn": "match_rms_adamw"}


def main():
    """Time all sizes and write the rows."""
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
                    **measure(build(name, **numbers), mixtures, seconds),
                }
            )
            print(rows[-1], flush=True)
    write_csv(OUT, rows)


def measure(model, mixtures, seconds):
    """Return median seconds of each part, and the optimizer's share."""
    masknet = model.masknet
    groups = matrix_groups(masknet)
    taken = {id(p) for group in groups for p in group["params"]}
    rest = [p for p in model.parameters() if id(p) not in taken]
    ours = Muon(groups, **OPTIONS), torch.optim.AdamW(rest, lr=1e-6)
    matrices = [p for p in masknet.parameters() if p.ndim == 2]
    theirs = (torch.optim.Muon(matrices, **OPTIONS),)

    def _network(half):
        mixture = torch.randn(mixtures, seconds * RATE)
        targets = torch.randn(mixtures, seconds * RATE, 2)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            estimates = model(mixture)
        pit_snr_loss(targets, estimates.float()).mean().backward()

    def _torch_attention():
        with mock.patch.object(window, "MOST_HELD", 0):
            _network(True)

    def _step(optimizers, capabilities):
        with mock.patch.object(torch.cpu, "get_capabilities", capabilities):
            for optimizer in optimizers:
                optimizer.step()

    parts = {
        "network (s)": (_network, False),
        "network, bfloat16 (s)": (_network, True),
        "network, bfloat16, torch's attention (s)": (_torch_attention,),
        "optimizer (s)": (_step, ours, dict),
        "optimizer, bfloat16 (s)": (_step, ours, lambda: {"amx_bf16": True}),
        "torch's Muon (s)": (_step, theirs, dict),
    }
    times = {name: [] for name in parts}
    for _ in range(STEPS + 1):
        for name, (run, *given) in parts.items():
            start = time.perf_counter()
            run(*given)
            times[name].append(time.perf_counter() - start)
    # The first step loads kernels.
    row = {name: statistics.median(x[1:]) for name, x in times.items()}
    shares = {}
    for kind in ("", ", bfloat16"):
        network, step = row[f"network{kind} (s)"], row[f"optimizer{kind} (s)"]
        share = 100 * step / (network + step)
        shares[f"optimizer's share{kind} (%)"] = round(share, 1)
    return {name: round(value, 4) for name, value in row.items()} | shares


if __name__ == "__main__":
    main()
