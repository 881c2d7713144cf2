"""Which model a command runs; the commands pack, info and export."""

import os
from pathlib import Path

from speechbrain_flashformer.cli.messages import OK, UsageError
from speechbrain_flashformer.inference.options import (
    CHOICES,
    SeparationOptions,
)

TRUST = (
    "let the model's yaml run any code: only for one whose maker you trust "
    "(default: it may build what 'flashformer pack' writes)"
)


def add_model_options(add):
    """Add --model, --trust and --device."""
    add(
        "--model",
        help="a packed model's folder, or hf:OWNER/NAME on a model hub "
        "(default: the model that comes with the package, for streams its "
        "causal one)",
    )
    add("--trust", action="store_true", help=TRUST)
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if any)")


def add_runtime(add):
    """Add --runtime."""
    add(
        "--runtime",
        default=SeparationOptions.runtime,
        choices=CHOICES["runtime"],
        help="what runs a stream: torch; onnx, which is onnxruntime on the CPU "
        "and takes some seconds to export the model the first time; auto "
        "(default), which is onnx for live sound if that was done before, else "
        "torch",
    )


def model_folder(name, streaming=False):
    """The model asked for; else the one that comes with the package."""
    from speechbrain_flashformer.inference.folders import built_in_model

    return name or str(built_in_model(streaming))


def find_device(name):
    """The device asked for; else the one that SpeechBrain trains on here."""
    import torch

    if not name:
        if not torch.accelerator.is_available():
            return "cpu"
        kind = str(torch.accelerator.current_accelerator())
        rank = os.environ.get("LOCAL_RANK")
        return f"{kind}:{rank}" if rank else kind
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: {first}") from error
    return name


def load_separator(
    name, device=None, trust=False, threads=None, streaming=False
):
    """Load the model asked for onto the device asked for.

    Arguments
    ---------
    name, device : str or None
        As on the command line.
    trust : bool
        Whether the model's yaml may call anything.
    threads : int, optional
        Of torch.
    streaming : bool
        Whether a causal model is taken when none is asked for.

    Returns
    -------
    RecordingSeparator
    """
    import torch

    from speechbrain_flashformer.inference.models import RecordingSeparator

    if threads:
        torch.set_num_threads(threads)
    folder = model_folder(name, streaming)
    return RecordingSeparator(folder, find_device(device), trust)


def _add_pack(add):
    add("run_folder", metavar="RUN_DIR", type=Path)
    add("out", metavar="OUT_DIR", type=Path)
    add("--half", action="store_true", help="weights in half precision")
    add("--overwrite", action="store_true", help="replace OUT_DIR")


def _pack(parsed):
    from speechbrain_flashformer.inference.pack import pack

    out = pack(parsed.run_folder, parsed.out, parsed.half, parsed.overwrite)
    print(out)
    return OK


def _add_info(add):
    add("model", nargs="?", metavar="MODEL")
    add("--trust", action="store_true", help=TRUST)


def _info(parsed):
    described = load_separator(parsed.model, trust=parsed.trust).describe()
    for name, value in {
        "model": model_folder(parsed.model),
        **described,
    }.items():
        print(f"{name:24}{value}")
    return OK


def _add_export(add):
    add("model", metavar="MODEL")
    add("out", metavar="OUT.onnx", type=Path)
    add("--trust", action="store_true", help=TRUST)
    add(
        "--streaming",
        action="store_true",
        help="one step of a stream, with its state; needs a causal model",
    )
    add(
        "--block",
        type=float,
        metavar="MS",
        help="milliseconds of a step with --streaming (default 16)",
    )
    add(
        "--int8",
        action="store_true",
        help="weights of linear layers in 8 bits: half the file and a little "
        "less time, about 30 dB from exact",
    )
    add("--overwrite", action="store_true", help="replace OUT.onnx")


def _export(parsed):
    if parsed.block is not None and not parsed.streaming:
        raise UsageError("--block needs --streaming")
    from speechbrain_flashformer.inference import export

    model = load_separator(parsed.model, trust=parsed.trust)
    arguments = model, parsed.out, parsed.overwrite
    if parsed.streaming:
        block = 16.0 if parsed.block is None else parsed.block
        path = export.export_streaming_onnx(*arguments, block, int8=parsed.int8)
    else:
        path = export.export_onnx(*arguments, int8=parsed.int8)
    print(path)
    return OK


COMMANDS = (
    (
        "pack",
        _pack,
        _add_pack,
        "make a self-contained model folder of a training run",
    ),
    (
        "info",
        _info,
        _add_info,
        "show what a model is and how it runs here",
    ),
    (
        "export",
        _export,
        _add_export,
        "write a model as ONNX (needs the extra onnx)",
    ),
)
