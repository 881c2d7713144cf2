"""Speed on a GPU: sections of the report of gpu_check.py.

Each section takes the device and its sizes, and yields lines of Markdown.
"""

import contextlib
import math
import statistics
import time

import torch
from models import build_separator
from torch.nn.attention import SDPBackend, sdpa_kernel

from speechbrain_flashformer import build
from speechbrain_flashformer.nnet.attention import BACKENDS, attend
from speechbrain_flashformer.nnet.step import StreamingStep
from speechbrain_flashformer.nnet.streaming import StreamingSeparator
from speechbrain_flashformer.training.losses import pit_si_snr_loss

RATE = 8000
WINDOW = (250, 250)


def name_of(dtype):
    """Return the name of a dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def autocast(device, dtype):
    """Return an autocast context; for float32 it does nothing."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def snr(truth, found):
    """Signal to noise ratio in dB."""
    truth, found = truth.detach(), found.detach()
    noise = (found - truth).square().sum().clamp(min=1e-300)
    return 10 * math.log10(truth.square().sum() / noise)


def measure(function, device):
    """Return the median time of a call in ms, and its extra memory in MB."""
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
    """Yield a row for each length and method, without and with gradients."""
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
    """Yield a row for each model and batch size: training steps in bfloat16."""
    seconds = sizes["seconds"]
    yield f"Forward, loss, backward and AdamW; mixtures of {seconds} s.\n"
    yield "| model | batch | autocast | ms per step | audio s per s | MB |"
    yield "|---|---|---|---|---|---|"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name in sizes["models"]:
        for batch in sizes["batches"]:
            model = build_separator(name).to(device).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            mixture = torch.randn(batch, seconds * RATE, device=device)
            targets = torch.randn(batch, seconds * RATE, 2, device=device)

            def step(model=model, optimizer=optimizer, x=mixture, y=targets):
                optimizer.zero_grad()
                with autocast(device, dtype):
                    out = model(x)
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
    """Compare the compiled masknet with the eager one: output and speed."""
    if device.type != "cuda":
        yield "not run on a CPU"
        return
    encoder, masknet, _ = build("base").to(device).eval().children()
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
    """Compare a stream run step by step with a replayed CUDA graph."""
    model = [*build("streaming").to(device).eval().children()]
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
    """``StreamingStep`` on tensors at fixed addresses.

    On a GPU, one step is captured as a CUDA graph, and calls replay it, so that
    Python launches no kernels. On other devices the step itself runs.

    Arguments
    ---------
    step : StreamingStep
        Step of a network without lookahead.
    first : torch.Tensor
        The first samples of the streams, [B, kernel - stride].
    block : torch.Tensor
        [B, n], an example of the blocks that follow.
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
        """Return the sources [B, n, S] of the next block [B, n]."""
        self.block.copy_(block)
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()
        return self.sources.clone()
