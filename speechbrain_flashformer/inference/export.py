"""ONNX: the whole way from mixture to sources as one graph.

Either for mixtures of any length, or for one block of a stream.
"""

import logging
import warnings
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch

from speechbrain_flashformer.inference.files import written_beside
from speechbrain_flashformer.nnet.separator import (
    MODULES,
    Separator,
    unwrapped,
)
from speechbrain_flashformer.nnet.step import StreamingStep
from speechbrain_flashformer.nnet.streaming import StreamingSeparator

# Where torch's exporter tells that torchvision is not there.
EXPORTER_LOG = logging.getLogger("torch.onnx._internal.exporter._registration")
OPTIONS = {"opset_version": 18, "dynamo": True, "verbose": False}
# Largest difference from torch that an export may show, relative to the peak.
TOLERANCE = 1e-4
# The same in int8: how far the error is to lie below the sources, in dB. At 20
# it takes 0.4 dB from a model that separates to 10; on noise 30 are usual.
INT8_DISTANCE = 20
# Blocks of a stream that an export is compared over.
CHECKED_BLOCKS = 30
# Of a protocol buffer, with room for the graph, bytes.
MOST_BYTES = 2**31 - 2**24


def export_onnx(model, path, overwrite=False, int8=False):
    """Write a model as ONNX and check it against torch.

    The graph takes ``mixture`` [B, T] at the model's rate, T at least the
    encoder's kernel, and gives ``sources`` [B, T, S]; B and T are dynamic. Its
    metadata hold ``sample_rate`` and ``num_spks``.

    Arguments
    ---------
    model : FlashFormerSeparation
        A loaded model.
    path : str or Path
        The file to write, all at once.
    overwrite : bool
        Whether an existing file is replaced.
    int8 : bool
        Whether the weights of linear layers are integers of 8 bits: a smaller
        file and, on most processors, a quicker one, that is less exact.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ImportError
        When the extra onnx is missing.
    FileExistsError
        When the file exists.
    RuntimeError
        When onnxruntime and torch disagree.
    """
    _check_can_write(path, overwrite)
    network = Separator(*networks_on_cpu(model)).eval()
    rate = model.hparams.sample_rate
    any_size = torch.export.Dim.DYNAMIC
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            network,
            # Long enough for several blocks of attention: a size of one
            # would be taken for a constant.
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

    The graph takes ``mixture`` [B, n], the next samples, and the state of the
    stream; it gives ``sources`` [B, n, S] and the new state, whose outputs are
    in the order of the inputs and called ``new_`` and the input's name. All
    sizes but B are fixed, so that it runs for ever. A state begins with zeros,
    but for ``samples``, which are the first of the stream; ``mixture`` goes on
    from there. The metadata hold ``sample_rate``, ``num_spks``, ``latency``
    (as in ``StreamingSeparator``, with the block, in samples) and ``delay``
    (the samples that come out first and mean nothing).

    Arguments
    ---------
    model : FlashFormerSeparation
        A loaded causal model.
    path : str or Path
        The file to write, all at once.
    overwrite : bool
        Whether an existing file is replaced.
    block : float
        Milliseconds, a multiple of a token.
    int8 : bool
        As in ``export_onnx``.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ImportError
        When the extra onnx is missing.
    FileExistsError
        When the file exists.
    ValueError
        When the model is not causal, or a block is no whole number of tokens.
    RuntimeError
        When onnxruntime and torch disagree.
    """
    _check_can_write(path, overwrite)
    model.make_stream()  # or tell why not
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
            # Two streams: a size of one would be taken for a constant.
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
    """Encoder, masknet and decoder, apart from the model, on the CPU."""
    networks = [unwrapped(model.mods[name]) for name in MODULES]
    weights = sum(p.nbytes for net in networks for p in net.parameters())
    if weights > MOST_BYTES:
        raise ValueError(
            f"the model has {weights / 1e9:.1f} GB of weights, more than one "
            "ONNX file can hold: export a smaller one"
        )
    return [deepcopy(network).cpu().eval() for network in networks]


def _check_can_write(path, overwrite):
    """Raise now what would otherwise be raised after the export."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise ImportError(
            f"export needs {error.name}: pip install "
            "'speechbrain-flashformer[onnx]'"
        ) from error
    if Path(path).exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists: remove it, or overwrite it "
            "(--overwrite, in Python overwrite=True)"
        )


@contextmanager
def _quiet(log=EXPORTER_LOG):
    """Without what torch and onnxruntime say of themselves and others."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(level)


def _write(program, path, model, properties, check, int8):
    """Write what torch.onnx gave, once ``check(session)`` has passed."""
    import onnx

    graph, path = program.model_proto, Path(path)
    # Where in the source each node came from: more bytes than the weights.
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
            # Seven bits: where a processor has no instruction for sums of
            # such products, eight overflow.
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )


def onnx_session(path, threads=0):
    """A session of onnxruntime on the CPU; 0 threads are its own choice."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"]
    )


def _check(network, session, rate, int8=False):
    """Compare the graph with torch at other sizes than it was traced with."""
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
    """Compare the graph with a stream in torch, from its beginning.

    Arguments
    ---------
    networks : list of torch.nn.Module
        Encoder, masknet and decoder, on the CPU.
    session : onnxruntime.InferenceSession
        Of a step of so many tokens.
    tokens : int
        In a block.
    blocks : int
        How many are compared.
    int8 : bool
        Whether its weights are.

    Raises
    ------
    RuntimeError
        When they differ.
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
