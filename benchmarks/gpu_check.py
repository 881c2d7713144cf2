#!/usr/bin/env python3
"""Is it right on this GPU, and how fast: one report.

> python benchmarks/gpu_check.py > docs/gpu.md

Every attention backend that the GPU and the installed packages allow is
compared with dense attention in float64: outputs and gradients, in bfloat16
and float16, alone and in the whole network. The recipe trains, goes on and
tests. Then speed and memory of attention over the length, training throughput
beside SepFormer, torch.compile, and a stream in a CUDA graph.

The bar for attention is what dense attention in the same precision loses to
rounding, twice; for the network, 3 dB more noise than with dense attention.
The exit status is 1 when a comparison fails, 2 without a GPU. ``--device cpu``
runs what a CPU can, on small sizes: a test of this script, no figures.
"""

import argparse
import contextlib
import csv
import datetime
import importlib.metadata
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from models import build
from torch.nn.attention import SDPBackend, sdpa_kernel

from speechbrain_flashformer.nnet.attention import (
    BACKENDS,
    attend,
    attention_report,
)
from speechbrain_flashformer.nnet.separator import separate
from speechbrain_flashformer.nnet.streaming import (
    StreamingSeparator,
    StreamingStep,
)
from speechbrain_flashformer.training.losses import pit_si_snr_loss

RECIPE = Path(__file__).resolve().parent.parent / "recipes/WSJ0Mix/separation"
RATE = 8000
WINDOW = (250, 250)
# Of attention: name, queries, keys, heads, width, options of attend.
CASES = (
    ("full", 257, 257, 6, 64, {}),
    ("causal", 257, 257, 6, 64, {"causal": True}),
    ("window", 1001, 1001, 6, 64, {"window": WINDOW}),
    ("narrow window", 515, 515, 4, 32, {"window": (17, 5)}),
    ("causal window", 515, 515, 4, 32, {"window": (50, 0)}),
    ("unlike lengths", 300, 300, 4, 64, {"window": (40, 40), "lengths": 1}),
    ("next tokens of a stream", 3, 120, 4, 32, {"window": (100, 0)}),
    ("wide heads", 130, 130, 1, 256, {}),
    ("odd heads", 130, 130, 2, 12, {"window": (20, 20)}),
)
MARGIN_DB = 3
# What is measured on a GPU, and on a CPU to see that the script works.
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
    """Print the report; the exit status."""
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
        # The other sections are still worth reading.
        except Exception as error:
            failed.append(title)
            print(f"\nFAILED: {type(error).__name__}: {error}", flush=True)
    print(f"\n## Result\n\n{len(failed) or 'no'} failures")
    return 1 if failed else 0


def machine(device, sizes):
    """Lines that say what was used."""
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


# --- is it right? ------------------------------------------------------------


def precisions(device):
    """What is compared on a device."""
    if device.type == "cuda":
        return (torch.bfloat16, torch.float16)
    return (torch.float32, torch.bfloat16)


def name_of(dtype):
    """Of a dtype: without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def compare_attention(device, sizes):
    """A row for each case, precision and backend."""
    yield (
        "| backend | precision | case | output error | its bar "
        "| gradient error | its bar | |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for dtype in precisions(device):
        for case in CASES:
            for backend in BACKENDS:
                if backend != "reference":
                    row = compare_one(backend, dtype, case, device)
                    start = f"| {backend} | {name_of(dtype)} | {case[0]}"
                    yield f"{start} | {row} |"


def compare_one(backend, dtype, case, device):
    """The rest of a row: errors beside what dense attention loses, twice."""
    _, tq, tk, heads, width, options = case
    options = dict(options)
    torch.manual_seed(1)
    shapes = [(2, tokens, heads, width) for tokens in (tq, tk, tk)]
    given = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    grad = torch.randn(shapes[0], device=device).to(dtype)
    if "lengths" in options:
        options["lengths"] = torch.tensor([tk, tk // 2 + 1], device=device)

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
    truth = run(through("reference"), [x.double() for x in given])
    rounded = run(lambda *x: dense(*x, **options), given)

    def worst(values):
        errors = [(a - b).abs().max().item() for a, b in zip(values, truth)]
        return errors[0], max(errors[1:])

    cells, right = [], True
    for error, lost in zip(worst(found), worst(rounded)):
        bar = 2 * lost + 1e-6
        right &= error <= bar
        cells += [f"{error:.1e}", f"{bar:.1e}"]
    return " | ".join([*cells, "ok" if right else "FAILED"])


def dense(q, k, v, window=(-1, -1), causal=False, lengths=None):
    """Softmax attention in the precision of q: the yardstick of rounding."""
    tq, tk = q.shape[1], k.shape[1]
    left, right = (side if side >= 0 else tk for side in window)
    right = 0 if causal else right
    ahead = torch.arange(tk, device=q.device) - (
        torch.arange(tq, device=q.device)[:, None] + tk - tq
    )
    hidden = ((ahead < -left) | (ahead > right))[None, None]
    if lengths is not None:
        past = torch.arange(tk, device=q.device) >= lengths[:, None]
        hidden = hidden | past[:, None, None] | past[:, None, :, None]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[3])
    scores = scores.masked_fill(hidden, torch.finfo(q.dtype).min)
    weights = scores.softmax(-1).masked_fill(hidden, 0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def compare_network(device, sizes):
    """A row for each backend: signal to noise of outputs and gradients."""
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
        model = [
            part.to(device) for part in build("tiny", attention_backend=backend)
        ]
        weights = [p for part in model for p in part.parameters()]
        with autocast(device, dtype), attention_report() as ran:
            out = separate(mixture, *model)
        loss = pit_si_snr_loss(targets, out.float()).mean()
        gradients = torch.autograd.grad(loss, weights)
        flat = torch.cat([g.flatten().double() for g in gradients])
        assert {entry["backend"] for entry in ran} == {backend}
        return out.double(), flat

    truth = run("reference", torch.float32)
    for dtype in precisions(device):
        bars = [
            min(100, snr(t, x)) - MARGIN_DB
            for t, x in zip(truth, run("reference", dtype))
        ]
        for backend in BACKENDS:
            if backend == "reference":
                continue
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


def autocast(device, dtype):
    """Autocast to a half precision; nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def snr(truth, found):
    """Signal to noise ratio in dB."""
    truth, found = truth.detach(), found.detach()
    noise = (found - truth).square().sum().clamp(min=1e-300)
    return 10 * math.log10(truth.square().sum() / noise)


def recipe(device, sizes):
    """A row for each start: one epoch, another one, the test alone."""
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
            # Each test has to write its own.
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
    """Run ``train.py``; what it last said if it failed, else nothing."""
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
    """SI-SNRi in dB, over all mixtures; NaN without results."""
    if not results.is_file():
        return math.nan
    with results.open(newline="", encoding="utf-8") as file:
        rows = {row["snt_id"]: row for row in csv.DictReader(file)}
    return float(rows["avg"]["si-snr_i"])


# --- how fast? ---------------------------------------------------------------


def measure(function, device):
    """Median milliseconds of a call, and the megabytes it takes beyond."""
    on_gpu = device.type == "cuda"

    def wait():
        if on_gpu:
            torch.cuda.synchronize(device)

    function()
    wait()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    times = []
    while len(times) < 3 or (len(times) < 20 and sum(times) < 0.5):
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    memory = math.nan
    if on_gpu:
        memory = torch.cuda.max_memory_allocated(device) - before
    return 1000 * statistics.median(times), memory / 2**20


def attention_speed(device, sizes):
    """A row for each length and way: forward alone, and with gradients."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    yield f"6 heads of 64, {name_of(dtype)}, batch 1, window {WINDOW}.\n"
    yield "| tokens | way | forward (ms) | MB | and backward (ms) | MB |"
    yield "|---|---|---|---|---|---|"

    def math_attention(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.MATH):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    ways = {"math, full": math_attention}
    for backend in BACKENDS:
        for name, window in (("full", (-1, -1)), ("window", WINDOW)):
            if backend != "reference":
                ways[f"{backend}, {name}"] = _way(backend, window)
    for tokens in sizes["tokens"]:
        qkv = torch.randn(3, 1, tokens, 6, 64, device=device, dtype=dtype)
        for name, way in ways.items():
            inputs = [x.clone().requires_grad_() for x in qkv]

            def forward(way=way, inputs=inputs):
                with torch.no_grad():
                    way(*inputs)

            def both(way=way, inputs=inputs):
                torch.autograd.grad(way(*inputs).sum(), inputs)

            try:
                cells = [*measure(forward, device), *measure(both, device)]
            except torch.OutOfMemoryError:
                row = "out of memory | | | "
            except RuntimeError as error:
                if "cannot run here" not in str(error):
                    raise
                continue
            else:
                row = " | ".join(_figure(cell) for cell in cells)
            yield f"| {tokens} | {name} | {row} |"


def _way(backend, window):
    return lambda q, k, v: attend(q, k, v, window=window, backend=backend)


def _figure(value):
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if value < 10 else f"{value:.0f}"


def training_speed(device, sizes):
    """A row for each model and batch: a training step under bfloat16."""
    seconds = sizes["seconds"]
    yield f"Forward, loss, backward and AdamW; mixtures of {seconds} s.\n"
    yield "| model | batch | autocast | ms per step | audio s per s | MB |"
    yield "|---|---|---|---|---|---|"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name in sizes["models"]:
        for batch in sizes["batches"]:
            model = [part.to(device).train() for part in build(name)]
            weights = [p for part in model for p in part.parameters()]
            optimizer = torch.optim.AdamW(weights, lr=1e-4)
            mixture = torch.randn(batch, seconds * RATE, device=device)
            targets = torch.randn(batch, seconds * RATE, 2, device=device)

            def step(model=model, optimizer=optimizer, x=mixture, y=targets):
                optimizer.zero_grad()
                with autocast(device, dtype):
                    out = separate(x, *model)
                pit_si_snr_loss(y, out.float()).mean().backward()
                optimizer.step()

            row = f"| {name} | {batch} | {name_of(dtype)} | "
            try:
                ms, megabytes = measure(step, device)
            except torch.OutOfMemoryError:
                yield row + "out of memory | | |"
                continue
            speed = 1000 * batch * seconds / ms
            yield row + f"{ms:.1f} | {speed:.0f} | {_figure(megabytes)} |"


def compiled(device, sizes):
    """Whether the compiled masknet gives the same, and its speed."""
    if device.type != "cuda":
        yield "not run on a CPU"
        return
    encoder, masknet, _ = (part.to(device).eval() for part in build("base"))
    yield "The base masknet on 4 s, bfloat16, without and with gradients.\n"
    yield "| | forward (ms) | and backward (ms) | output to eager (dB) | |"
    yield "|---|---|---|---|---|"
    with torch.no_grad():
        mix_w = encoder(torch.randn(4, 4 * RATE, device=device))
    weights = list(masknet.parameters())
    outputs = {}
    ways = {"eager": masknet, "compiled": torch.compile(masknet)}
    for name, network in ways.items():

        def forward(network=network, name=name):
            with torch.no_grad(), autocast(device, torch.bfloat16):
                outputs[name] = network(mix_w)

        def both(network=network):
            with autocast(device, torch.bfloat16):
                out = network(mix_w)
            torch.autograd.grad(out.float().sum(), weights)

        times = [measure(function, device)[0] for function in (forward, both)]
        gain = snr(outputs["eager"].double(), outputs[name].double())
        right = "ok" if gain > 30 else "FAILED"
        cells = f"{times[0]:.2f} | {times[1]:.2f} | {gain:.0f}"
        yield f"| {name} | {cells} | {right} |"


def graphed_stream(device, sizes):
    """A stream, step by step and as a graph that is replayed."""
    model = [part.to(device).eval() for part in build("streaming")]
    step = StreamingStep(*model)
    overlap, size = step.kernel - step.stride, 2 * step.token
    mixture = 0.1 * torch.randn(1, overlap + 100 * size, device=device)
    first, *blocks = mixture.split([overlap, *[size] * 100], 1)
    separator = StreamingSeparator(*model)
    expected = separator.feed(mixture)
    graph = GraphedStep(step, first, blocks[0])
    found = torch.cat([graph(block) for block in blocks], 1)
    gain = snr(expected.double(), found.double())
    right = "ok" if gain > 60 else "FAILED"
    times = [
        measure(lambda function=function: function(blocks[0]), device)[0]
        for function in (separator.feed, graph)
    ]
    yield f"Blocks of {1000 * size / RATE:.0f} ms.\n"
    yield "| | ms per block | |"
    yield "|---|---|---|"
    yield f"| `StreamingSeparator.feed` | {times[0]:.3f} | |"
    way = "CUDA graph" if device.type == "cuda" else "`StreamingStep`"
    yield f"| {way}, {gain:.0f} dB to the above | {times[1]:.3f} | {right} |"


class GraphedStep:
    """``StreamingStep`` on tensors that stay where they are.

    On a GPU one step is captured as a CUDA graph, and calls replay it: no
    kernel is launched from Python. Elsewhere the step itself runs.

    Arguments
    ---------
    step : StreamingStep
        Of a network that hears nothing ahead.
    first : torch.Tensor
        The first samples of the streams, [B, kernel - stride].
    block : torch.Tensor
        [B, n], a block like all that come after them.
    """

    def __init__(self, step, first, block):
        self.step, self.block = step, block.clone()
        state = step.make_state(block.shape[0])
        state["samples"] = first
        self.state = [x.to(block.device).clone() for x in state.values()]
        self.graph = None
        if block.is_cuda:
            self._capture()

    def _capture(self):
        first = [tensor.clone() for tensor in self.state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._run()
        for tensor, value in zip(self.state, first):
            tensor.copy_(value)

    @torch.no_grad()
    def _run(self):
        self.sources, *new = self.step(self.block, *self.state)
        for tensor, value in zip(self.state, new):
            tensor.copy_(value)

    def __call__(self, block):
        """Sources [B, n, S] of the next block [B, n]."""
        self.block.copy_(block)
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()
        return self.sources.clone()


if __name__ == "__main__":
    sys.exit(main())
