"""Measure one model of side_by_side.py, in its own process."""

import json
import os
import resource
import statistics
import time
from pathlib import Path

import torch
from models import build_separator
from records import megabytes
from training import parse

from speechbrain_flashformer.nnet.macs import count_macs
from speechbrain_flashformer.training.losses import pit_si_snr_loss

RATE = 8000


def measure(task, name, threads, lengths, limit, gigabytes, gmac_per_s):
    """Print a row as JSON for each length, in the given order.

    gmac_per_s is counted if it is None.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    size, _, numbers = parse(name)
    model = build_separator(size, **numbers)
    model.train(task == "train")
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    # A short input loads libraries and kernels; then memory is measured.
    with torch.no_grad():
        model(torch.randn(1, RATE))
    before = megabytes("VmRSS")
    about = {
        "gmac_per_s": gmac_per_s or round(macs_of(model, 4 * RATE) / 4e9, 3),
        "parameters_m": round(sum(p.numel() for p in weights) / 1e6, 2),
    }

    def run(mixture, targets):
        if task == "separate":
            with torch.no_grad():
                return model(mixture)
        optimizer.zero_grad()
        estimates = model(mixture)
        pit_si_snr_loss(targets, estimates).mean().backward()
        optimizer.step()

    allow(gigabytes)
    last = None
    for seconds in lengths:
        row = {"task": task, "model": name, "threads": threads}
        row |= {"seconds": seconds, **about}
        if last and last[1] * seconds / last[0] > limit * threads:
            print(json.dumps(row | {"outcome": "time"}), flush=True)
            continue
        load = os.getloadavg()[0]
        mixture = torch.randn(1, seconds * RATE) * 0.1
        targets = torch.randn(1, seconds * RATE, 2) * 0.1
        times, computing = [], []
        # Reset the peak memory of the process.
        Path("/proc/self/clear_refs").write_text("5")
        try:
            while not times or (len(times) < 5 and sum(times) < 3):
                start = time.perf_counter(), time.process_time()
                run(mixture, targets)
                times.append(time.perf_counter() - start[0])
                computing.append(time.process_time() - start[1])
        except (MemoryError, RuntimeError) as error:
            # oneDNN reports this if it cannot allocate its kernels.
            marks = ("memory", "could not create a primitive")
            if str(error) and not any(text in str(error) for text in marks):
                raise
            print(json.dumps(row | {"outcome": "memory"}), flush=True)
            return
        median = statistics.median(times)
        last = seconds, median
        row |= {
            "outcome": "ok",
            "runs": len(times),
            "median_s": round(median, 4),
            "rtf": round(median / seconds, 5),
            "cpu_s": round(statistics.median(computing), 4),
            "extra_peak_mb": round(megabytes("VmHWM") - before),
            "load": round(load, 1),
        }
        print(json.dumps(row), flush=True)


def macs_of(model, samples):
    """Count the MACs for a mixture of this many samples."""
    # The counter does not see LSTMs that oneDNN runs.
    recurrent = any(isinstance(m, torch.nn.RNNBase) for m in model.modules())
    with torch.backends.mkldnn.flags(enabled=not recurrent):
        return count_macs(model, torch.randn(1, samples))


def allow(gigabytes):
    """Limit additional memory, so that allocations fail, not the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
