#!/usr/bin/env python3
"""Check correctness and speed on a GPU, and print one report.

> python benchmarks/gpu_check.py > docs/gpu.md

Correctness: every attention backend that can run is compared with dense
attention in float64: outputs and gradients, in bfloat16 and float16, alone and
in the whole network. The recipe trains, resumes and tests.

Speed: time and memory of attention over the length, training throughput
compared with SepFormer, torch.compile, and a stream in a CUDA graph.

The limit for the error of attention is twice the rounding error of dense
attention in the same precision. The limit for the network is 3 dB more noise
than with dense attention. The exit status is 1 if a comparison fails, and 2
without a GPU. ``--device cpu`` runs what a CPU can run, on small sizes, to test
this script; its figures mean nothing.
"""

import argparse
import csv
import datetime
import importlib.metadata
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from gpu_speed import (
    RATE,
    WINDOW,
    attention_speed,
    autocast,
    compiled,
    graphed_stream,
    name_of,
    snr,
    training_speed,
)

from speechbrain_flashformer import build
from speechbrain_flashformer.nnet import layers
from speechbrain_flashformer.nnet.attention import (
    BACKENDS,
    Rows,
    attend,
    attention_report,
)
from speechbrain_flashformer.training.losses import pit_si_snr_loss

RECIPE = Path(__file__).resolve().parent.parent / "recipes/WSJ0Mix/separation"
# Cases of attention: name, tokens, heads, width, options of attend.
CASES = (
    ("full", 257, 6, 64, {}),
    ("causal", 257, 6, 64, {"window": (-1, 0)}),
    ("window", 1001, 6, 64, {"window": WINDOW}),
    ("narrow window", 515, 4, 32, {"window": (17, 5)}),
    ("causal window", 515, 4, 32, {"window": (50, 0)}),
    ("unlike lengths", 300, 4, 64, {"window": (40, 40), "rows": True}),
    ("wide heads", 130, 1, 256, {}),
    ("odd heads", 130, 2, 12, {"window": (20, 20)}),
)
MARGIN_DB = 3
# Sizes of the measurements on a GPU, and on a CPU to test the script.
SIZES = {
    "cuda": {
        "tokens": [2**n for n in range(10, 18)],
        "models": ("base", "large", "sepformer"),
        "batches": (1, 4),
        "seconds": 4,
        "recipe": {"starter_train": 200, "starter_valid": 20},
    },
    "cpu": {
        "tokens": [256, 1024],
        "models": ("tiny",),
        "batches": (1,),
        "seconds": 1,
        "recipe": {"starter_train": 4, "starter_valid": 1, "num_workers": 0},
    },
}


def main(words=None):
    """Print the report and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(words).device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "no GPU here: nothing was checked (--device cpu runs what a CPU "
            "can)",
            file=sys.stderr,
        )
        return 2
    torch.manual_seed(0)
    failed = []
    sizes = SIZES[device.type]
    for title, section in (
        ("Machine", machine),
        ("Attention beside dense attention", compare_attention),
        ("The network beside one with dense attention", compare_network),
        ("The recipe", recipe),
        ("Attention over the length", attention_speed),
        ("Training", training_speed),
        ("torch.compile", compiled),
        ("A stream in a CUDA graph", graphed_stream),
    ):
        print(f"\n## {title}\n", flush=True)
        try:
            for line in section(device, sizes):
                print(line, flush=True)
                if "FAILED" in line:
                    failed.append(line)
        # A failed section does not stop the report.
        except Exception as error:
            failed.append(title)
            print(f"\nFAILED: {type(error).__name__}: {error}", flush=True)
    print(f"\n## Result\n\n{len(failed) or 'no'} failures")
    return 1 if failed else 0


def machine(device, sizes):
    """Yield lines that describe the machine and the packages."""
    yield f"- date: {datetime.date.today()}"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        yield (
            f"- GPU: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute "
            f"capability {gpu.major}.{gpu.minor}; CUDA {torch.version.cuda}"
        )
    else:
        yield f"- CPU: {platform.machine()}, {os.cpu_count()} cores"
    for package in ("torch", "flash-attn", "speechbrain"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        yield f"- {package}: {version}"


# --- correctness -------------------------------------------------------------


def precisions(device):
    """Return the precisions to compare on a device."""
    if device.type == "cuda":
        return (torch.bfloat16, torch.float16)
    return (torch.float32, torch.bfloat16)


def compare_attention(device, sizes):
    """Yield a row for each case, precision and backend."""
    yield (
        "| backend | precision | case | output error | its bar "
        "| gradient error | its bar | |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for dtype in precisions(device):
        for case in CASES:
            for backend in BACKENDS:
                row = compare_one(backend, dtype, case, device)
                start = f"| {backend} | {name_of(dtype)} | {case[0]}"
                yield f"{start} | {row} |"


def compare_one(backend, dtype, case, device):
    """Return the cells of a row: errors and their limits."""
    _, tokens, heads, width, options = case
    options = dict(options)
    torch.manual_seed(1)
    shape = 2, tokens, heads, width
    *given, grad = torch.randn(4, *shape, device=device).to(dtype)
    if "rows" in options:
        lengths = torch.tensor([tokens, tokens // 2 + 1])
        options["rows"] = Rows.of(lengths, tokens, device)

    def run(function, inputs):
        inputs = [x.detach().clone().requires_grad_() for x in inputs]
        out = function(*inputs)
        gradients = torch.autograd.grad(out, inputs, grad.to(out.dtype))
        return [x.double() for x in (out, *gradients)]

    def through(name):
        return lambda q, k, v: attend(q, k, v, backend=name, **options)

    try:
        found = run(through(backend), given)
    except RuntimeError as error:
        if "cannot run here" not in str(error):
            raise
        why = str(error).split(f"{backend}: ", 1)[1].split(";")[0]
        return f"not run: {why.split('. Can run')[0]} | | | | "
    exact = partial(dense, **options)
    truth = run(exact, [x.double() for x in given])
    rounded = run(exact, given)

    def worst(values):
        errors = [(a - b).abs().max().item() for a, b in zip(values, truth)]
        return errors[0], max(errors[1:])

    cells, right = [], True
    for error, lost in zip(worst(found), worst(rounded)):
        bar = 2 * lost + 1e-6
        right &= error <= bar
        cells += [f"{error:.1e}", f"{bar:.1e}"]
    return " | ".join([*cells, "ok" if right else "FAILED"])


def dense(q, k, v, window=(-1, -1), backend="dense", rows=None):
    """Softmax attention in the precision of q: the reference for rounding."""
    T = q.shape[1]
    left, right = (side if side >= 0 else T for side in window)
    place = torch.arange(T, device=q.device)
    ahead = place - place[:, None]
    hidden = ((ahead < -left) | (ahead > right))[None, None]
    if rows is not None:
        lengths = torch.tensor(rows.lengths, device=q.device)
        past = place >= lengths[:, None]
        hidden = hidden | past[:, None, None] | past[:, None, :, None]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[3])
    scores = scores.masked_fill(hidden, torch.finfo(q.dtype).min)
    weights = scores.softmax(-1).masked_fill(hidden, 0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def compare_network(device, sizes):
    """Yield a row for each backend: SNR of outputs and gradients."""
    yield (
        "Noise is what differs from float32 with dense attention; the bar is "
        f"dense attention under the same autocast, less {MARGIN_DB} dB.\n"
    )
    yield "| backend | autocast | outputs (dB) | bar | gradients (dB) | bar | |"
    yield "|---|---|---|---|---|---|---|"
    mixture = torch.randn(1, 2 * RATE, device=device)
    targets = torch.randn(1, 2 * RATE, 2, device=device)

    def run(backend, dtype):
        torch.manual_seed(0)
        exact = backend == "dense"
        numbers = {} if exact else {"attention_backend": backend}
        model = build("tiny", **numbers).to(device)
        weights = list(model.parameters())
        kernel = (
            patch.object(layers, "attend", dense) if exact else nullcontext()
        )
        with kernel, autocast(device, dtype), attention_report() as ran:
            out = model(mixture)
        loss = pit_si_snr_loss(targets, out.float()).mean()
        gradients = torch.autograd.grad(loss, weights)
        flat = torch.cat([g.flatten().double() for g in gradients])
        assert exact or {entry["backend"] for entry in ran} == {backend}
        return out.double(), flat

    truth = run("dense", torch.float32)
    for dtype in precisions(device):
        bars = [
            min(100, snr(t, x)) - MARGIN_DB
            for t, x in zip(truth, run("dense", dtype))
        ]
        for backend in BACKENDS:
            row = f"| {backend} | {name_of(dtype)} | "
            try:
                found = [snr(*pair) for pair in zip(truth, run(backend, dtype))]
            except RuntimeError as error:
                if "cannot run here" not in str(error):
                    raise
                yield row + "not run | | | | |"
                continue
            cells = [
                f"{value:.1f} | {bar:.1f}" for value, bar in zip(found, bars)
            ]
            right = all(value >= bar for value, bar in zip(found, bars))
            yield row + " | ".join([*cells, "ok |" if right else "FAILED |"])


def recipe(device, sizes):
    """Yield a row for each run: one epoch, one more, only the test."""
    yield "`flashformer-demo.yaml` in bfloat16, from the command line.\n"
    yield "| start | seconds | epochs | SI-SNRi of the test (dB) | |"
    yield "|---|---|---|---|---|"
    options = {
        "device": device,
        "precision": "bf16",
        "eval_precision": "bf16",
        "starter_test": 2,
        "plot_results": False,
        "noprogressbar": None,
        **sizes["recipe"],
    }
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "test_results.csv")
        for name, more, expected in (
            ("one epoch", {"N_epochs": 1}, [1]),
            ("resumed", {"N_epochs": 2}, [1, 2]),
            ("test alone", {"N_epochs": 2, "test_only": None}, [1, 2]),
        ):
            # Each run must write its own results.
            results.unlink(missing_ok=True)
            words = ["hparams/flashformer-demo.yaml", "--output_folder", folder]
            for key, value in {**options, **more}.items():
                words += [f"--{key}", *([] if value is None else [str(value)])]
            began = time.perf_counter()
            wrong = run_recipe(words)
            seconds = time.perf_counter() - began
            log = Path(folder, "train_log.txt")
            text = log.read_text() if log.is_file() else ""
            epochs = [int(n) for n in re.findall(r"^epoch: (\d+)", text, re.M)]
            gain = _test_gain(results)
            right = not wrong and epochs == expected and math.isfinite(gain)
            row = f"| {name} | {seconds:.0f} | {epochs} | {gain:.1f} | "
            yield row + ("ok |" if right else f"FAILED {wrong} |")


def run_recipe(words):
    """Run ``train.py``; return the last line of its error, or ""."""
    done = subprocess.run(
        [sys.executable, "train.py", *words],
        cwd=RECIPE,
        capture_output=True,
        text=True,
    )
    if not done.returncode:
        return ""
    return (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]


def _test_gain(results):
    """Return the mean SI-SNRi in dB, or NaN without results."""
    if not results.is_file():
        return math.nan
    with results.open(newline="", encoding="utf-8") as file:
        rows = {row["snt_id"]: row for row in csv.DictReader(file)}
    return float(rows["avg"]["si-snr_i"])


if __name__ == "__main__":
    sys.exit(main())
