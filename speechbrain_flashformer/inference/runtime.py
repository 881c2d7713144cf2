"""Choose the runtime of a stream: torch or onnxruntime.

An export takes ten seconds or more, so the exported step is stored in the cache
folder of the user.
"""

import hashlib
import logging
import os
import weakref
from pathlib import Path

import torch

from speechbrain_flashformer import __version__
from speechbrain_flashformer.inference.export import (
    check_streaming,
    export_streaming_onnx,
    networks_on_cpu,
    onnx_session,
)
from speechbrain_flashformer.nnet.step import CompiledSteps
from speechbrain_flashformer.nnet.streaming import MOST_TOKENS

log = logging.getLogger(__name__)

# Number of blocks in which a cached graph is compared with torch.
CHECKED_BLOCKS = 4
# Model -> {(file, number of threads): session}.
SESSIONS = weakref.WeakKeyDictionary()
# Types of module attributes that the cache key depends on.
PLAIN = (bool, int, float, str, tuple, list, type(None))


def choose_steps(model, runtime="auto", block=None, tell=log.warning):
    """Choose what runs the steps of a model's streams.

    Arguments
    ---------
    model : FlashFormerSeparation or RecordingSeparator
        A causal model.
    runtime : str
        ``torch``: PyTorch. ``onnx``: onnxruntime; the step is exported if it
        is not in the cache. ``auto``: onnxruntime for live audio if the step
        is in the cache, else torch.
    block : float, optional
        Length of a block of live audio in seconds. By default, for a
        recording, the longest block that a stream runs at once.
    tell : callable, optional
        Called with a message before an export, which takes long.

    Returns
    -------
    OnnxSteps or None
        The argument ``run`` of ``StreamingSeparator``; None for torch.

    Raises
    ------
    ImportError
        With onnx, when the extra onnx is not installed.
    OSError
        When an exported step cannot be stored.
    RuntimeError
        With onnx, when the outputs of onnxruntime and torch differ, or the user
        has no home folder.
    ValueError
        When the model is not causal. With onnx also when it is not in float32
        on the CPU, is quantized or has hooks.

    Example
    -------
    >>> from speechbrain_flashformer import FlashFormerSeparation, build
    >>> parts = build("streaming", num_layers=1).named_children()
    >>> hparams = {"num_spks": 2, "sample_rate": 8000}
    >>> model = FlashFormerSeparation(dict(parts), hparams)
    >>> choose_steps(model, "torch") is None
    True
    """
    step = model.make_stream().step  # raises if the model is not causal
    # With auto, do not even import onnxruntime if it was never used here. For
    # a recording its start takes longer than it saves.
    no_onnx = runtime == "auto" and (block is None or not _has_cache())
    if runtime == "torch" or no_onnx:
        return None
    problem = _why_not(step)
    if problem and runtime == "auto":
        return None
    if problem:
        kind, text = problem
        raise kind(f"runtime onnx {text}")
    tokens = MOST_TOKENS
    if block is not None:
        tokens = int(block * model.hparams.sample_rate / step.token + 1e-6)
        tokens = min(max(1, tokens), MOST_TOKENS)
    path = cache_folder() / f"step-{_key(model, tokens)}.onnx"
    # All streams of a model share a session, which is checked once.
    sessions = SESSIONS.setdefault(model, {})
    key = path, torch.get_num_threads()
    session = sessions.get(key) or _cached_session(model, path, tokens)
    if session is None and runtime == "onnx":
        _check_can_store(path.parent)
        tell(
            "exporting the model for onnxruntime; this is done once, later "
            f"runs use {path}"
        )
        milliseconds = 1000 * tokens * step.token / model.hparams.sample_rate
        export_streaming_onnx(model, path, True, milliseconds)
        session = onnx_session(path, torch.get_num_threads())
    if session is None:
        return None
    sessions[key] = session
    # Tracing pays off for live audio, which has few different block sizes.
    others = step if block is None else traced_steps(model)
    return OnnxSteps(session, others, tokens * step.token)


class OnnxSteps:
    """Runs blocks of one size in onnxruntime, and other blocks in torch.

    A step of one token costs about as much as one of several tokens. So a block
    of a multiple of the size is not cut: torch runs it as a whole in less time.

    Arguments
    ---------
    session : onnxruntime.InferenceSession
        Session of a graph from ``export_streaming_onnx``.
    others : callable
        ``StreamingStep`` or ``CompiledSteps`` of the same network, for blocks
        of other sizes.
    size : int
        Samples per block of the graph.
    """

    def __init__(self, session, others, size):
        self.session, self.others, self.size = session, others, size
        _, *self.names = (each.name for each in session.get_inputs())

    def __call__(self, mixture, *state):
        """Separate mixtures [B, n]; return [sources [B, n, S], *new state]."""
        kind = mixture.device.type, mixture.dtype
        # A model can be moved to another device while it streams.
        if mixture.shape[1] != self.size or kind != ("cpu", torch.float32):
            return self.others(mixture, *state)
        feeds = dict(zip(self.names, (part.numpy() for part in state)))
        feeds["mixture"] = mixture.contiguous().numpy()
        return [*map(torch.from_numpy, self.session.run(None, feeds))]


def traced_steps(model):
    """Return steps in torch whose traces all streams of a model share.

    Arguments
    ---------
    model : FlashFormerSeparation or RecordingSeparator
        A causal model.

    Returns
    -------
    CompiledSteps

    Raises
    ------
    ValueError
        When the model is not causal.
    """
    step, steps = model.make_stream().step, model.__dict__.get("_steps")
    if steps is None or steps.step.masknet is not step.masknet:
        steps = model.__dict__["_steps"] = CompiledSteps(step)
    return steps


def cache_folder():
    """Return the cache folder of this package; it may not exist.

    Returns
    -------
    Path
        ``flashformer`` in the cache folder of the user.

    Raises
    ------
    RuntimeError
        When the user has no home folder.

    Example
    -------
    >>> cache_folder().name
    'flashformer'
    """
    name, usual = "XDG_CACHE_HOME", ".cache"
    if os.name == "nt":
        name, usual = "LOCALAPPDATA", "AppData/Local"
    folder = Path(os.environ.get(name, ""))
    # The XDG standard says to ignore a relative path.
    if not folder.is_absolute():
        folder = Path("~", usual).expanduser()
    return folder / "flashformer"


def _has_cache():
    try:
        return os.path.isdir(cache_folder())
    except RuntimeError:  # no home folder
        return False


def _check_can_store(folder):
    """Raise an OSError before the export instead of after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"no right to write in {folder}")
    except OSError as error:
        raise type(error)(
            f"the exported model cannot be stored in {folder}: {error}; set "
            "XDG_CACHE_HOME to another folder, or give --runtime torch"
        ) from error


def _why_not(step):
    """Why onnxruntime cannot run a step: (exception class, text), or None."""
    state = step.state_dict().values()
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    if not all(isinstance(x, torch.Tensor) for x in state):
        return ValueError, "takes no quantized model: give --runtime torch"
    if any(getattr(m, name) for m in step.modules() for name in hooks):
        return ValueError, "would call no hooks: give --runtime torch"
    kinds = {(p.dtype, p.device.type) for p in step.parameters()}
    if kinds != {(torch.float32, "cpu")}:
        found = " and ".join(sorted(f"{kind} on {at}" for kind, at in kinds))
        return ValueError, (
            f"takes float32 on the CPU, the model is {found}: give --device "
            "cpu, or --runtime torch"
        )
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return ImportError, (
            "needs onnxruntime: pip install 'speechbrain-flashformer[onnx]'"
        )
    return None


def _key(model, tokens):
    """Hash everything that an exported graph depends on."""
    import onnxruntime

    digest = hashlib.sha256()
    versions = __version__, torch.__version__, onnxruntime.__version__
    size = tokens, model.hparams.sample_rate, model.hparams.num_spks
    digest.update(repr((versions, size)).encode())
    step = model.make_stream().step
    for name, module in step.named_modules():
        plain = [
            (key, value)
            for key, value in sorted(vars(module).items())
            if isinstance(value, PLAIN)
        ]
        digest.update(repr((name, type(module).__name__, plain)).encode())
    for name, tensor in step.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _cached_session(model, path, tokens):
    """Open and check a cached graph; None if it is missing or broken."""
    if not os.path.isfile(path):
        return None
    # The check must not advance the random number generator of the caller.
    with torch.random.fork_rng(devices=()):
        try:
            session = onnx_session(path, torch.get_num_threads())
            networks = networks_on_cpu(model)
            check_streaming(networks, session, tokens, blocks=CHECKED_BLOCKS)
        # onnxruntime raises many different exceptions for broken files.
        except Exception as error:
            log.info("%s cannot be used: %s", path, error)
            return None
    return session
