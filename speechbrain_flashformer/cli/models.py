"""Model options of the commands; the commands pack, info and export."""

import os
from pathlib import Path

from speechbrain_flashformer.cli.messages import OK, UsageError
from speechbrain_flashformer.inference.options import (
    CHOICES,
    SeparationOptions,
)

TRUST = (
    "let the yaml of the model run any code. Use it only if you trust the "
    "author (default: only the classes that 'flashformer pack' writes are "
    "allowed)"
)


def add_model_options(add):
    """Add --model, --trust and --device.

    Arguments
    ---------
    add : callable
        ``add_argument`` of a parser.
    """
    add(
        "--model",
        help="folder of a packed model, or hf:OWNER/NAME for a model on the "
        "Hugging Face hub (default: the model of this package; for streaming "
        "its causal model)",
    )
    add("--trust", action="store_true", help=TRUST)
    add(
        "--device",
        help="cpu, cuda, cuda:1, ... (default: a GPU if there is one, else "
        "cpu)",
    )


def add_runtime(add):
    """Add --runtime.

    Arguments
    ---------
    add : callable
        ``add_argument`` of a parser.
    """
    add(
        "--runtime",
        default=SeparationOptions.runtime,
        choices=CHOICES["runtime"],
        help="runtime for streaming. torch: PyTorch. onnx: onnxruntime on the "
        "CPU; the first run exports the model, in ten seconds or more. auto "
        "(default): onnx for live audio if the model was exported before, "
        "else torch",
    )


def model_folder(name, streaming=False):
    """Return the requested model, or the folder of the built-in one.

    Arguments
    ---------
    name : str or None
        Value of --model.
    streaming : bool
        Whether the default is the causal model.

    Returns
    -------
    str

    Raises
    ------
    FileNotFoundError
        When no model is given and the package has none.

    Example
    -------
    >>> model_folder("hf:owner/name")
    'hf:owner/name'
    """
    from speechbrain_flashformer.inference.folders import built_in_model

    return name or str(built_in_model(streaming))


def find_device(name):
    """Return the requested device, or the default one.

    Arguments
    ---------
    name : str or None
        Value of --device. By default the accelerator of this process (number
        ``LOCAL_RANK`` under torchrun), or the CPU if there is none.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        When torch cannot use the device.

    Example
    -------
    >>> find_device("cpu")
    'cpu'
    """
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
    """Load a model onto a device.

    Arguments
    ---------
    name, device : str or None
        Values of --model and --device.
    trust : bool
        Whether the yaml of the model may call any code.
    threads : int, optional
        Number of threads of torch; unchanged by default.
    streaming : bool
        Whether the default model is the causal one.

    Returns
    -------
    RecordingSeparator

    Raises
    ------
    OSError
        When a file is missing or cannot be read.
    ValueError
        When the model is broken or needs trust, or torch cannot use the
        device.
    """
    import torch

    from speechbrain_flashformer.inference.models import RecordingSeparator

    if threads:
        torch.set_num_threads(threads)
    folder = model_folder(name, streaming)
    return RecordingSeparator(folder, find_device(device), trust)


def _add_pack(add):
    add(
        "run_folder",
        metavar="RUN_DIR",
        type=Path,
        help="output folder of a training run",
    )
    add(
        "out",
        metavar="OUT_DIR",
        type=Path,
        help="folder to create for the packed model",
    )
    add(
        "--half",
        action="store_true",
        help="store the weights in half precision; they run in float32",
    )
    add(
        "--last",
        action="store_true",
        help="pack the last checkpoints, not those of the lowest validation "
        "loss; often better if the validation set is small and the learning "
        "rate decreased to zero",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace OUT_DIR if it is a packed model",
    )


def _pack(parsed):
    from speechbrain_flashformer.inference.pack import pack

    out = pack(
        parsed.run_folder,
        parsed.out,
        half=parsed.half,
        overwrite=parsed.overwrite,
        last=parsed.last,
    )
    print(out)
    return OK


def _add_info(add):
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder of a packed model, or hf:OWNER/NAME (default: the model "
        "of this package)",
    )
    add("--trust", action="store_true", help=TRUST)


def _info(parsed):
    described = load_separator(parsed.model, trust=parsed.trust).describe()
    for name, value in {
        "model": model_folder(parsed.model),
        **described,
    }.items():
        print(f"{name:24}{value}")
    if parsed.model is None:
        print(f"{'model for live streams':24}{model_folder(None, True)}")
    return OK


def _add_export(add):
    add(
        "model",
        metavar="MODEL",
        help="folder of a packed model, or hf:OWNER/NAME",
    )
    add("out", metavar="OUT.onnx", type=Path, help="file to write")
    add("--trust", action="store_true", help=TRUST)
    add(
        "--streaming",
        action="store_true",
        help="export one streaming step with its state as inputs and outputs; "
        "needs a causal model",
    )
    add(
        "--block",
        type=float,
        metavar="MS",
        help="block size of the step in milliseconds, with --streaming "
        "(default 16); a multiple of a token",
    )
    add(
        "--int8",
        action="store_true",
        help="store the weights of linear layers as 8-bit integers: half the "
        "file size, faster on one thread, with an error (docs/export.md)",
    )
    add("--overwrite", action="store_true", help="replace an existing OUT.onnx")


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
        "make a self-contained model folder from a training run",
    ),
    (
        "info",
        _info,
        _add_info,
        "show the size, cost and attention backend of a model",
    ),
    (
        "export",
        _export,
        _add_export,
        "write a model as ONNX (needs the extra onnx)",
    ),
)
