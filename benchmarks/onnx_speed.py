#!/usr/bin/env python3
"""Real-time factor of a model in torch, in onnxruntime, and there in int8.

> python benchmarks/onnx_speed.py MODEL

MODEL is a packed folder. Writes results/onnx_speed.csv: seconds of computing
per second of audio, medians of runs that take turns, and how far the int8
outputs are from those in float (SI-SNR in dB; a model of 10 dB loses 0.2 dB
to an error at 23 dB).
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from records import write_csv

from speechbrain_flashformer.inference import FlashFormerSeparation
from speechbrain_flashformer.inference.export import export_onnx
from speechbrain_flashformer.training.metrics import si_snr

SECONDS, THREADS, RUNS = (4, 20), (1, 2), 9
OUT = Path(__file__).parent / "results" / "onnx_speed.csv"


def session(path, threads):
    """An onnxruntime session as a function [B, T] -> [B, T, S]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    run = onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"]
    ).run

    def separate(mixture):
        return torch.from_numpy(run(None, {"mixture": mixture.numpy()})[0])

    return separate


def main(model):
    """Time all, write the rows."""
    model = FlashFormerSeparation.from_hparams(model)
    rate = model.hparams.sample_rate
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        plain = export_onnx(model, Path(folder) / "model.onnx")
        small = Path(folder) / "int8.onnx"
        quantize_dynamic(plain, small, weight_type=QuantType.QInt8)
        for threads in THREADS:
            torch.set_num_threads(threads)
            runners = {
                "torch": model.separate_batch,
                "onnx": session(plain, threads),
                "onnx int8": session(small, threads),
            }
            for seconds in SECONDS:
                torch.manual_seed(0)
                mixture = 0.1 * torch.randn(1, seconds * rate)
                times = {name: [] for name in runners}
                for _ in range(RUNS):
                    for name, run in runners.items():
                        start = time.perf_counter()
                        run(mixture)
                        times[name].append(time.perf_counter() - start)
                expected = model.separate_batch(mixture)
                for name, run in runners.items():
                    likeness = si_snr(expected, run(mixture)).mean().item()
                    row = {
                        "threads": threads,
                        "seconds": seconds,
                        "runner": name,
                        "rtf": statistics.median(times[name]) / seconds,
                        "si-snr to torch": likeness,
                    }
                    rows.append(row)
                    print(row)
    for row in rows:
        row["rtf"] = f"{row['rtf']:.5f}"
        row["si-snr to torch"] = f"{row['si-snr to torch']:.1f}"
    write_csv(OUT, rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
