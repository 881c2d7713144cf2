"""Export a model to ONNX as one graph from mixture to sources.

The graph takes mixtures of any length, or one block of a stream.

Axes: B batch, T and n samples, S speakers.
"""

import logging
import warnings
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch

from speechbrain_flashformer.inference.files import written_beside
from speechbrain_flashformer.nnet.separator import MODULES, Separator, unwrapped
from speechbrain_flashformer.nnet.step import StreamingStep
from speechbrain_flashformer.nnet.streaming import StreamingSeparator

# Logger in which torch's exporter reports that torchvision is missing.
EXPORTER_LOG = logging.getLogger("torch.onnx._internal.exporter._registration")
OPTIONS = {"opset_version": 18, "dynamo": True, "verbose": False}
# Largest allowed difference from torch, relative to the peak of the output.
TOLERANCE = 1e-4
# Minimum SNR in dB of int8 outputs relative to those of torch, with noise as
# the input. The pretrained model has 20 to 22 dB.
INT8_DISTANCE = 15
# Number of blocks in which an exported stream is compared with torch.
CHECKED_BLOCKS = 30
# Most bytes of weights: the limit of a protocol buffer, less the graph.
MOST_BYTES = 2**31 - 2**24


def export_onnx(model, path, overwrite=False, int8=False):
    """Write a model as ONNX and check it against torch.

    The graph maps ``mixture`` [B, T] at the model's rate to ``sources``
    [B, T, S]. B and T are dynamic; T must be at least the kernel size of the
    encoder. The metadata hold ``sample_rate`` and ``num_spks``.

    Arguments
    ---------
    model : FlashFormerSeparation or RecordingSeparator
        A loaded model.
    path : str or Path
        The file, written atomically.
    overwrite : bool
        Whether an existing file is replaced.
    int8 : bool
        Whether the weights of linear layers are quantized to 8 bits: half the
        file size, faster on one thread, less exact (docs/export.md).

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ImportError
        When the extra onnx is not installed.
    FileExistsError
        When the file exists.
    ValueError
        When the weights are too large for one ONNX file.
    RuntimeError
        When the outputs of onnxruntime and torch differ.
    """
    _check_can_write(path, overwrite)
    network = Separator(*networks_on_cpu(model)).eval()
    rate = model.hparams.sample_rate
    any_size = torch.export.Dim.DYNAMIC
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            network,
            # Long enough for several attention blocks: the exporter treats a
            # size of one as a constant.
            (torch.randn(2, 5 * rate + 1),),
            dynamic_shapes=({0: any_size, 1: any_size},),
            input_names=["mixture"],
            output_names=["sources"],
            **OPTIONS,
        )
    check = partial(_check, network, rate=rate, int8=int8)
    return _write(program, path, model, {}, check, int8)


def export_streaming_onnx(model, path, overwrite=False, block=16.0, int8=False):
    """Write one step of a stream as ONNX and check it against torch.

    The graph maps ``mixture`` [B, n], the next samples, and the state of the
    stream to ``sources`` [B, n, S] and the new state. The outputs of the new
    state are in the order of the inputs; their names are those of the inputs
    with ``new_`` in front. All sizes except B are fixed, so a stream can run
    without end. The initial state is zeros, except ``samples``: the first
    samples of the stream, which ``mixture`` continues. The metadata hold
    ``sample_rate``, ``num_spks``, ``latency`` (samples, as in
    ``StreamingSeparator`` but with the block) and ``delay`` (number of samples
    at the start of the output to discard).

    Arguments
    ---------
    model : FlashFormerSeparation or RecordingSeparator
        A loaded causal model.
    path : str or Path
        The file, written atomically.
    overwrite : bool
        Whether an existing file is replaced.
    block : float
        Block length in milliseconds, a multiple of a token.
    int8 : bool
        As in ``export_onnx``.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ImportError, FileExistsError, RuntimeError
        As in ``export_onnx``.
    ValueError
        When the model is not causal or its weights are too large for one ONNX
        file, or the block is not a whole number of tokens.
    """
    _check_can_write(path, overwrite)
    model.make_stream()  # raises if the model is not causal
    networks = networks_on_cpu(model)
    step = StreamingStep(*networks).eval()
    rate = model.hparams.sample_rate
    tokens = round(block * rate / 1000 / step.token)
    if tokens < 1 or abs(tokens * step.token / rate - block / 1000) > 1e-5:
        token = 1000 * step.token / rate
        below = max(1, int(block // token))
        raise ValueError(
            f"a block is {block:g} ms, but a token is {token:g} ms: take "
            f"{below * token:g} or {(below + 1) * token:g}"
        )
    size = tokens * step.token
    state = step.make_state(2)
    names = list(state)
    rows = {0: torch.export.Dim.AUTO}
    shapes = [{} if name == "tokens" else rows for name in names]
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            step,
            # Two streams: the exporter treats a size of one as a constant.
            (torch.randn(2, size), *state.values()),
            dynamic_shapes={
                "mixture": {0: torch.export.Dim("batch")},
                "state": tuple(shapes),
            },
            input_names=["mixture", *names],
            output_names=["sources", *(f"new_{name}" for name in names)],
            **OPTIONS,
        )
    latency = size + step.kernel - step.stride + step.delay
    properties = {"latency": latency, "delay": step.delay}
    check = partial(check_streaming, networks, tokens=tokens, int8=int8)
    return _write(program, path, model, properties, check, int8)


def networks_on_cpu(model):
    """Copy encoder, masknet and decoder of a model to the CPU.

    Arguments
    ---------
    model : FlashFormerSeparation or RecordingSeparator
        It is not changed.

    Returns
    -------
    list of torch.nn.Module
        In evaluation mode.

    Raises
    ------
    ValueError
        When the weights are too large for one ONNX file.
    """
    networks = [unwrapped(model.mods[name]) for name in MODULES]
    weights = sum(p.nbytes for net in networks for p in net.parameters())
    if weights > MOST_BYTES:
        raise ValueError(
            f"the model has {weights / 1e9:.1f} GB of weights, more than one "
            "ONNX file can hold: export a smaller one"
        )
    return [deepcopy(network).cpu().eval() for network in networks]


def _check_can_write(path, overwrite):
    """Raise errors before the export instead of after it."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise ImportError(
            f"export needs {error.name}: pip install "
            "'speechbrain-flashformer[onnx]'"
        ) from error
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file")
    if Path(path).exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists: remove it, or overwrite it "
            "(--overwrite, in Python overwrite=True)"
        )


@contextmanager
def _quiet(log=EXPORTER_LOG):
    """Silence warnings of torch and onnxruntime."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(level)


def _write(program, path, model, properties, check, int8):
    """Write the result of torch.onnx if ``check(session)`` raises nothing."""
    import onnx

    graph, path = program.model_proto, Path(path)
    # The metadata of the nodes, their places in the source code, need more
    # bytes than the weights.
    for node in graph.graph.node:
        node.ClearField("metadata_props")
    hparams = model.hparams
    properties = {
        "sample_rate": hparams.sample_rate,
        "num_spks": hparams.num_spks,
        **properties,
    }
    onnx.helper.set_model_props(
        graph, {name: str(value) for name, value in properties.items()}
    )
    with written_beside(path) as partial_path:
        if int8:
            _quantize(graph, partial_path)
        else:
            onnx.save(graph, str(partial_path))
        check(onnx_session(partial_path))
    return path


def _quantize(graph, path):
    """Write a graph with the weights of its linear layers in int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet(logging.getLogger()):
        quantize_dynamic(
            graph,
            path,
            # Convolutions in int8 are slower than in float.
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            # Seven bits: with eight, sums of products overflow on processors
            # without an instruction for them.
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )


def onnx_session(path, threads=0):
    """Open a session of onnxruntime on the CPU; 0 threads: it chooses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"]
    )


def _check(network, session, rate, int8=False):
    """Compare the graph with torch, also at sizes that were not traced."""
    for batch, samples in ((1, rate), (3, 3 * rate + 7), (1, 5 * rate + 1)):
        mixture = 0.1 * torch.randn(batch, samples)
        with torch.no_grad():
            expected = network(mixture)
        (sources,) = session.run(None, {"mixture": mixture.numpy()})
        what = f"{batch} x {samples} samples"
        _compare(torch.from_numpy(sources), expected, what, int8)


def check_streaming(
    networks, session, tokens, blocks=CHECKED_BLOCKS, int8=False
):
    """Compare a streaming graph with torch from the start of a stream.

    Arguments
    ---------
    networks : list of torch.nn.Module
        Encoder, masknet and decoder, on the CPU.
    session : onnxruntime.InferenceSession
        Session of the exported step.
    tokens : int
        Tokens per block of the step.
    blocks : int
        Number of blocks to compare.
    int8 : bool
        Whether the weights of the graph are quantized to 8 bits.

    Raises
    ------
    RuntimeError
        When the outputs differ.
    """
    for batch in (1, 3):
        stream = StreamingSeparator(*networks, batch)
        step = stream.step
        state = {k: v.numpy() for k, v in step.make_state(batch).items()}
        start, size = state["samples"].shape[1], tokens * step.token
        mixture = 0.1 * torch.randn(batch, start + blocks * size)
        state["samples"] = mixture[:, :start].numpy()
        expected, out = stream.feed(mixture), []
        for block in mixture[:, start:].split(size, 1):
            sources, *new = session.run(
                None, {"mixture": block.numpy(), **state}
            )
            state = dict(zip(state, new))
            out.append(torch.from_numpy(sources))
        out = torch.cat(out, 1)[:, step.delay :]
        what = f"{batch} streams of {blocks} blocks"
        _compare(out, expected, what, int8)


def _compare(sources, expected, what, int8=False):
    error = sources - expected
    worst, peak = error.abs().max(), expected.abs().max()
    near = worst <= TOLERANCE * peak
    if int8:
        distance = 10 * (expected.square().sum() / error.square().sum()).log10()
        near = distance >= INT8_DISTANCE
    if not near:
        raise RuntimeError(
            f"the graph differs from torch by {worst:.2g} (peak {peak:.2g}) "
            f"for {what}: nothing was written"
        )
