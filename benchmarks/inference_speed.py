#!/usr/bin/env python3
"""Measure time and memory of separation: whole, as a stream, over the length.

> python benchmarks/inference_speed.py whole MODEL [--threads 1 2]
> python benchmarks/inference_speed.py stream [--minutes 10]
> python benchmarks/inference_speed.py length MODEL

MODEL is a packed folder. Each command writes
results/inference_speed_COMMAND.csv:

* whole: computing time over audio time in torch, onnxruntime and onnxruntime
  with int8 weights. The runs alternate, and the figures are medians. SI-SNR in
  dB compares the outputs with those of torch; an error at 23 dB costs a model
  of 10 dB about 0.2 dB.
* stream: noise in blocks of 16 ms through hparams/flashformer-streaming.yaml
  (the time does not depend on the weights), as fast as possible: torch with one
  and two threads; traced torch, onnxruntime and onnxruntime with int8 weights
  with one; each in its own process. The first run then processes another hour
  in blocks of 1 s, to measure its memory. Load is computing time over audio
  time. Columns with ``cpu`` count CPU time only, which depends less on other
  programs (``machine load``). ``old stream over new`` is the time of a block at
  the end of the run relative to that of a new stream.
* length: real-time factor and extra peak memory of ``separate_to_files`` for 1
  minute to 2 hours of noise, each in its own process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from records import megabytes, write_csv

from speechbrain_flashformer import build
from speechbrain_flashformer.inference import FlashFormerSeparation
from speechbrain_flashformer.inference.export import (
    export_onnx,
    export_streaming_onnx,
    onnx_session,
)
from speechbrain_flashformer.inference.runtime import OnnxSteps
from speechbrain_flashformer.nnet.step import CompiledSteps
from speechbrain_flashformer.training.metrics import si_snr

RESULTS = Path(__file__).resolve().parent / "results"
# For whole.
SECONDS, RUNS = (4, 20), 9
# For stream.
BLOCK = 16  # milliseconds
BLOCKS_TO_COMPARE = 5000
RUNTIMES = (
    ("torch", 1),
    ("torch", 2),
    ("torch, traced", 1),
    ("onnxruntime", 1),
    ("onnxruntime, int8", 1),
)
# For length.
MINUTES = (1, 10, 60, 120)


def main(words=None):
    """Run one measurement and write its rows."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("whole", "stream", "length"))
    parser.add_argument("model", nargs="?")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if (options.model is None) != (options.what == "stream"):
        parser.error("whole and length want a MODEL, stream takes none")
    if options.job:
        measure = {"stream": stream, "length": length}[options.what]
        words, numbers = json.loads(options.job)
        print(json.dumps(measure(*words, **numbers)))
        return
    if options.what == "whole":
        rows = whole(options.model, options.threads)
    elif options.what == "stream":
        rows = (
            run_alone("stream", *each, options.minutes) for each in RUNTIMES
        )
    else:
        rows = (run_alone("length", options.model, n) for n in MINUTES)
    measured = []
    for row in rows:
        print(row, flush=True)
        measured.append(row)
    write_csv(RESULTS / f"inference_speed_{options.what}.csv", measured)


def run_alone(what, *words, **numbers):
    """Return a row that is measured in its own process."""
    job = json.dumps([words, numbers])
    model = ["any"] if what == "length" else []
    command = [sys.executable, __file__, what, *model, "--job", job]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


# --- whole -------------------------------------------------------------------


def whole(model, numbers):
    """Yield a row for each runtime, length and number of threads."""
    model = FlashFormerSeparation.from_hparams(model)
    with tempfile.TemporaryDirectory() as folder:
        plain = export_onnx(model, Path(folder) / "model.onnx")
        small = export_onnx(model, Path(folder) / "int8.onnx", int8=True)
        for threads in numbers:
            torch.set_num_threads(threads)
            runners = {
                "torch": model.separate_batch,
                "onnx": onnx_separator(plain, threads),
                "onnx int8": onnx_separator(small, threads),
            }
            for seconds in SECONDS:
                for name, row in time_in_turns(model, runners, seconds):
                    start = {"threads": threads, "seconds": seconds}
                    yield {**start, "runner": name, **row}


def time_in_turns(model, runners, seconds):
    """Yield the name and the figures of each runner."""
    torch.manual_seed(0)
    mixture = 0.1 * torch.randn(1, seconds * model.hparams.sample_rate)
    times = {name: [] for name in runners}
    for _ in range(RUNS):
        for name, run in runners.items():
            start = time.perf_counter()
            run(mixture)
            times[name].append(time.perf_counter() - start)
    expected = model.separate_batch(mixture)
    for name, run in runners.items():
        rtf = statistics.median(times[name]) / seconds
        likeness = si_snr(expected, run(mixture)).mean().item()
        yield (
            name,
            {"rtf": f"{rtf:.5f}", "si-snr to torch": f"{likeness:.1f}"},
        )


def onnx_separator(path, threads):
    """Return an onnxruntime session as a function [B, T] -> [B, T, S]."""
    run = onnx_session(path, threads).run

    def separate(mixture):
        return torch.from_numpy(run(None, {"mixture": mixture.numpy()})[0])

    return separate


# --- a stream ----------------------------------------------------------------


def stream(runtime, threads, minutes, block_ms=BLOCK, **numbers):
    """Feed a stream block by block; return a row of figures."""
    torch.set_num_threads(threads)
    rate, duration = 8000, block_ms / 1000
    model = FlashFormerSeparation(
        dict(build("streaming", **numbers).eval().named_children()),
        {"num_spks": 2, "sample_rate": rate},
    )
    streams = torch_streams(model, runtime == "torch, traced")
    if runtime.startswith("onnxruntime"):
        streams = onnx_streams(model, threads, block_ms, "int8" in runtime)
    feed = next(streams)
    block = 0.1 * torch.randn(1, round(duration * rate))
    for _ in range(300):
        feed(block)
    times, cpu = [], []
    for _ in range(round(60 * minutes / duration)):
        start = time.perf_counter(), time.process_time()
        feed(block)
        times.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    # Alternate, because the speed of the machine varies over minutes.
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
        "load": round(statistics.mean(times) / duration, 4),
        "cpu load": round(statistics.mean(cpu) / duration, 4),
        "median block (ms)": milliseconds(statistics.median(times)),
        "cpu median (ms)": milliseconds(statistics.median(cpu)),
        "99.9th percentile (ms)": milliseconds(percentile(times)),
        "cpu 99.9th percentile (ms)": milliseconds(percentile(cpu)),
        "old stream over new": round(
            statistics.median(old) / statistics.median(new), 3
        ),
        "hour's memory (MB)": (
            hour(feed, rate)
            if (runtime, threads) == RUNTIMES[0] and not numbers
            else ""
        ),
        "machine load": round(os.getloadavg()[0], 1),
    }


def milliseconds(seconds):
    """Convert to milliseconds, rounded for the table."""
    return round(1000 * seconds, 3)


def percentile(times):
    """Return the 99.9th percentile."""
    return statistics.quantiles(times, n=1000)[-1]


def torch_streams(model, traced):
    """Yield the ``feed`` of new streams in torch."""
    steps = CompiledSteps(model.make_stream().step) if traced else None
    while True:
        stream = model.make_stream()
        stream.run = steps
        yield stream.feed


def onnx_streams(model, threads, block_ms, int8):
    """Yield the ``feed`` of new streams in onnxruntime."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "step.onnx")
        export_streaming_onnx(model, path, block=block_ms, int8=int8)
        session = onnx_session(path, threads)
    size = round(block_ms * model.hparams.sample_rate / 1000)
    run = OnnxSteps(session, model.make_stream().step, size)
    while True:
        yield model.make_stream(run=run).feed


def hour(feed, rate):
    """Return the memory growth over one hour of audio, in MB."""
    block = 0.1 * torch.randn(1, rate)
    for _ in range(60):
        feed(block)
    before = megabytes("VmHWM")
    for _ in range(3600):
        feed(block)
    return round(megabytes("VmHWM") - before, 1)


# --- over the length ---------------------------------------------------------


def length(model, minutes):
    """Return time, and memory beyond the loaded model."""
    model = FlashFormerSeparation.from_hparams(model)
    rate = model.hparams.sample_rate
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mixture.wav"
        rng = np.random.default_rng(0)
        with soundfile.SoundFile(path, "w", rate, 1, "PCM_16") as file:
            for _ in range(minutes):
                file.write(0.1 * rng.standard_normal(60 * rate))
        model.separate_audio(torch.randn(1, rate))  # warm-up
        before = megabytes("VmHWM")
        start = time.perf_counter()
        model.separate_to_files(path, folder)
        seconds = time.perf_counter() - start
    return {
        "minutes": minutes,
        "threads": torch.get_num_threads(),
        "rtf": round(seconds / (60 * minutes), 5),
        "extra peak memory (MB)": round(megabytes("VmHWM") - before),
    }


if __name__ == "__main__":
    main()
