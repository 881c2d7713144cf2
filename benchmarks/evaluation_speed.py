#!/usr/bin/env python3
"""Time of a test's scores beside that of SpeechBrain's recipe.

> python benchmarks/evaluation_speed.py [MIXTURES]

Scores MIXTURES (200) mixtures of two sources, six seconds at 8000 Hz, noise of
random colours, as the test of our recipe does: SI-SNR and SDR, before and
after, in threads, written as they come. Then, one in ten of them, what
SpeechBrain's recipe does: SI-SNR with all orders twice, and ``mir_eval``'s
``bss_eval_sources`` with all orders twice, one after another. Writes
results/evaluation_speed.csv: seconds per mixture.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from mir_eval.separation import bss_eval_sources
from records import write_csv
from speechbrain.nnet.losses import get_si_snr_with_pitwrapper

from speechbrain_flashformer.training.effects import random_noise
from speechbrain_flashformer.training.scores import ResultsWriter, quick_scores

OUT = Path(__file__).parent / "results" / "evaluation_speed.csv"
SAMPLES = 48000


def main(count):
    """Time both, compare what they say, write the rows."""
    rng = np.random.default_rng(0)
    items = []
    for _ in range(count):
        targets = np.stack([random_noise(SAMPLES, rng) for _ in range(2)], 1)
        targets /= targets.std(0)
        leak = 0.2 * targets[:, ::-1] + 0.1 * rng.normal(size=targets.shape)
        items.append(
            [
                torch.from_numpy(x)[None].float()
                for x in (targets, targets + leak)
            ]
        )
    start = time.perf_counter()
    ours = score_ours(items)
    seconds = {"flashformer": (time.perf_counter() - start) / count}
    some = items[::10]
    start = time.perf_counter()
    theirs = [score_theirs(*item) for item in some]
    seconds["speechbrain"] = (time.perf_counter() - start) / len(some)
    worst = max(abs(a - b) for a, b in zip(ours[::10], theirs, strict=True))
    rows = [
        {"procedure": name, "seconds per mixture": round(value, 4)}
        for name, value in seconds.items()
    ]
    ratio = seconds["speechbrain"] / seconds["flashformer"]
    print(*rows, f"ratio {ratio:.1f}", sep="\n")
    print(f"greatest difference of SDRi: {worst:.1e} dB")
    write_csv(OUT, rows)


def score_ours(items):
    """SDRi of each mixture."""
    with tempfile.TemporaryDirectory() as folder:
        writer = ResultsWriter(Path(folder, "growing"), 8000)
        for index, (targets, estimates) in enumerate(items):
            mixture = targets.sum(2)
            (row,), (signals,) = quick_scores(
                [f"{index:03}"], mixture, targets, estimates, torch.ones(1)
            )
            writer.add(row, *signals)
        return [row["sdr_i"] for row in writer.close()]


def score_theirs(targets, estimates):
    """SDRi of one mixture."""
    mixtures = targets.sum(2, keepdim=True).expand_as(targets).contiguous()
    for predictions in (estimates, mixtures):
        get_si_snr_with_pitwrapper(targets, predictions)
    after, before = (
        bss_eval_sources(targets[0].T.numpy(), x[0].T.numpy())[0].mean()
        for x in (estimates, mixtures)
    )
    return after - before


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
