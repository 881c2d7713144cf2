#!/usr/bin/env python3
"""How long a training step waits for its data.

> python benchmarks/loading_speed.py

Trains the tiny network on generated voices, crops of 1 s, 8 in a batch, with 0
and 2 workers: from a prepared set, and with dynamic mixing and all that it can
add. Writes results/loading_speed.csv: median time of a step, and the share of
all time that the loop waited for the next batch; and how many mixtures a second
the loader gives when nothing is trained.
"""

import csv
import tempfile
import time
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml
from records import write_csv
from speechbrain.dataio.batch import PaddedBatch
from torch.utils.data import DataLoader

from speechbrain_flashformer.nnet.separator import separate
from speechbrain_flashformer.training.data import EpochSampler, load_dataset
from speechbrain_flashformer.training.effects import (
    Noise,
    RandomEQ,
    Reverberation,
)
from speechbrain_flashformer.training.losses import pit_si_snr_loss
from speechbrain_flashformer.training.mixing import DynamicMixtures
from speechbrain_flashformer.training.recordings import find_recordings
from speechbrain_flashformer.training.voices import make_voices

ROOT = Path(__file__).parent.parent
OUT = Path(__file__).parent / "results" / "loading_speed.csv"
MIXTURES, BATCH, SAMPLES, STEPS = 400, 8, 8000, 40


def main():
    """Time each way of loading, write the rows."""
    with tempfile.TemporaryDirectory() as folder:
        sets = make_sets(Path(folder))
        rows = [
            {"data": name, "workers": workers, **measure(dataset, workers)}
            for name, dataset in sets.items()
            for workers in (0, 2)
        ]
    for row in rows:
        print(row)
    write_csv(OUT, rows)


def make_sets(folder):
    """The same voices: mixed before, and mixed on the fly."""
    voices = make_voices(folder / "voices", sizes=(MIXTURES, 1, 1))
    part = voices / "wav8k/min/tr"
    table = folder / "tr.csv"
    columns = ("mix", "s1", "s2")
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ID", "duration", *(f"{c}_wav" for c in columns)])
        for path in sorted((part / "mix").glob("*.wav")):
            seconds = (path.stat().st_size - 44) / 2 / 8000
            paths = [part / c / path.name for c in columns]
            writer.writerow([path.stem, seconds, *paths])
    hparams = {
        "data_folder": "",
        "num_spks": 2,
        "sample_rate": 8000,
        "seed": 0,
    }
    mixed = DynamicMixtures(
        find_recordings(part / "s1", "file"),
        2,
        8000,
        SAMPLES,
        seed=0,
        speeds=(90, 110),
        effects=[RandomEQ(1.0), Reverberation(0.5), Noise(0.5)],
    )
    return {
        "prepared": load_dataset(table, hparams, SAMPLES),
        "dynamic mixing": mixed,
    }


def measure(dataset, workers):
    """Median seconds of a step, and the share spent waiting."""
    torch.manual_seed(0)
    with open(ROOT / "hparams/flashformer-tiny.yaml") as file:
        model = load_hyperpyyaml(file)
    parts = [model[name] for name in ("Encoder", "MaskNet", "Decoder")]
    parameters = [p for part in parts for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    loader = DataLoader(
        dataset,
        BATCH,
        sampler=EpochSampler(MIXTURES, shuffle=True),
        num_workers=workers,
        collate_fn=PaddedBatch,
    )
    batches = iter(loader)
    next(batches)
    start = time.perf_counter()
    alone = sum(len(batch.id) for batch in batches)
    alone /= time.perf_counter() - start
    waits, times = [], []
    batches = iter(loader)
    for _ in range(STEPS):
        start = time.perf_counter()
        batch = next(batches)
        loaded = time.perf_counter()
        mixture, lengths = batch.mix_sig
        targets = torch.stack([batch.s1_sig.data, batch.s2_sig.data], 2)
        loss = pit_si_snr_loss(
            targets, separate(mixture, *parts, lengths), lengths
        )
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        waits.append(loaded - start)
        times.append(time.perf_counter() - start)
    # The first steps wait for workers to start.
    waits, times = waits[5:], times[5:]
    return {
        "step (s)": round(torch.tensor(times).median().item(), 3),
        "waiting (%)": round(100 * sum(waits) / sum(times), 1),
        "mixtures per second": round(alone),
    }


if __name__ == "__main__":
    main()
