#!/usr/bin/env python3
"""Latency, load and memory of the streaming model, block by block.

> python benchmarks/streaming_speed.py [--minutes 10]

Feeds noise in blocks of 16 ms to hparams/flashformer-streaming.yaml (the time
does not depend on the weights), as fast as it goes: torch with one thread and
with two, onnxruntime with one, each in a process of its own. The first then
goes on for an hour in blocks of 1 s, for the memory. Load is time over audio.
Columns with ``cpu`` count the processor's time alone, which other programs on
the machine (``machine load``) change less. ``old stream over new`` is what a
block costs at the end beside one of a stream that just began. Writes
results/streaming_speed.csv.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml
from records import write_csv

from speechbrain_flashformer.inference import FlashFormerSeparation
from speechbrain_flashformer.inference.export import export_streaming_onnx

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "streaming_speed.csv"
BLOCK = 0.016  # seconds
BLOCKS_TO_COMPARE = 5000
RUNS = (("torch", 1), ("torch", 2), ("onnxruntime", 1))


def main():
    """Measure each way to run it, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(measure(args.run[0], int(args.run[1]), args.minutes)))
        return
    rows = []
    for runtime, threads in RUNS:
        command = [sys.executable, __file__, "--run", runtime, str(threads)]
        command += ["--minutes", str(args.minutes)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1])
    write_csv(OUT, rows)


def measure(runtime, threads, minutes):
    """Feed a stream; a row of figures."""
    torch.set_num_threads(threads)
    with open(ROOT / "hparams" / "flashformer-streaming.yaml") as file:
        hparams = load_hyperpyyaml(file)
    modules = {
        part.lower(): hparams[part].eval()
        for part in ("Encoder", "MaskNet", "Decoder")
    }
    rate = hparams["sample_rate"]
    model = FlashFormerSeparation(
        modules, {"num_spks": hparams["num_spks"], "sample_rate": rate}
    )
    streams = torch_streams(model)
    if runtime == "onnxruntime":
        streams = onnx_streams(model, threads)
    feed = next(streams)
    block = 0.1 * torch.randn(1, round(BLOCK * rate))
    for _ in range(300):
        feed(block)
    times, cpu = [], []
    for _ in range(round(60 * minutes / BLOCK)):
        start = time.perf_counter(), time.process_time()
        feed(block)
        times.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    # In turns: a machine's pace changes over minutes.
    old, new = [], []
    for each, spent in BLOCKS_TO_COMPARE * [(feed, old), (next(streams), new)]:
        start = time.process_time()
        each(block)
        spent.append(time.process_time() - start)
    return {
        "runtime": runtime,
        "threads": threads,
        "minutes": minutes,
        "latency without block (ms)": 1000 * model.stream_latency(),
        "load": round(statistics.mean(times) / BLOCK, 4),
        "cpu load": round(statistics.mean(cpu) / BLOCK, 4),
        "median block (ms)": milliseconds(statistics.median(times)),
        "cpu median (ms)": milliseconds(statistics.median(cpu)),
        "99.9th percentile (ms)": milliseconds(percentile(times)),
        "cpu 99.9th percentile (ms)": milliseconds(percentile(cpu)),
        "old stream over new": round(
            statistics.median(old) / statistics.median(new), 3
        ),
        "hour's memory (MB)": (
            hour(feed, rate) if (runtime, threads) == RUNS[0] else ""
        ),
        "machine load": round(os.getloadavg()[0], 1),
    }


def milliseconds(seconds):
    """Rounded for the table."""
    return round(1000 * seconds, 3)


def percentile(times):
    """What 99.9 % of the times are below."""
    return statistics.quantiles(times, n=1000)[-1]


def torch_streams(model):
    """``feed`` of one new stream after another."""
    while True:
        yield model.make_stream().feed


def onnx_streams(model, threads):
    """``torch_streams`` in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = export_streaming_onnx(model, Path(folder, "step.onnx"))
        session = onnxruntime.InferenceSession(str(path), options)
    kinds = {"tensor(float)": torch.float32, "tensor(double)": torch.float64}
    start = {
        each.name: torch.zeros(
            [1 if isinstance(size, str) else size for size in each.shape],
            dtype=kinds.get(each.type, torch.int64),
        ).numpy()
        for each in session.get_inputs()[1:]
    }
    while True:
        yield onnx_feed(session, dict(start))


def onnx_feed(session, state):
    """``feed`` of a stream that is in this state; changes it."""

    def _feed(block):
        _, *new = session.run(None, {"mixture": block.numpy(), **state})
        state.update(zip(state, new))

    return _feed


def hour(feed, rate):
    """Megabytes that the process grows by over an hour of audio."""
    block = 0.1 * torch.randn(1, rate)
    for _ in range(60):
        feed(block)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3600):
        feed(block)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round((after - before) / 1024, 1)


if __name__ == "__main__":
    main()
