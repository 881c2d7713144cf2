"""What runs the steps of a stream: torch, or onnxruntime.

The exported step stays in a folder of the user's cache: an export takes as long
as many seconds of sound.
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

# Blocks that a graph of the cache is compared with torch over.
CHECKED_BLOCKS = 4
# By model, their sessions by file and threads.
SESSIONS = weakref.WeakKeyDictionary()
PLAIN = (bool, int, float, str, tuple, list, type(None))


def choose_steps(model, runtime="auto", block=None, tell=log.warning):
    """What a model's streams are to be run by.

    Arguments
    ---------
    model : FlashFormerSeparation
        A causal one.
    runtime : str
        ``torch``; ``onnx``, which exports a step that is not in the cache;
        ``auto``, which is onnxruntime where it can run live sound at once,
        else torch.
    block : float, optional
        Seconds that are heard at once; by default as many as a stream takes at
        once of a recording.
    tell : callable, optional
        Called with a text before what takes long.

    Returns
    -------
    OnnxSteps or None
        ``run`` of ``StreamingSeparator``; None for torch.

    Raises
    ------
    ImportError
        When the extra onnx is missing, and onnx was asked for.
    OSError
        When an exported step cannot be kept.
    ValueError
        When the model is not causal or, with onnx, is not in float32 on the
        CPU, has been changed by torch's tools, or has hooks.

    Example
    -------
    >>> from speechbrain_flashformer import FlashFormerSeparation, build
    >>> parts = build("streaming", num_layers=1).named_children()
    >>> hparams = {"num_spks": 2, "sample_rate": 8000}
    >>> model = FlashFormerSeparation(dict(parts), hparams)
    >>> choose_steps(model, "torch") is None
    True
    """
    step = model.make_stream().step  # or tell why not
    # onnxruntime is not even imported where it has not been used before; for a
    # recording it takes longer to begin than it wins.
    unasked = runtime == "auto" and (block is None or not _has_cache())
    if runtime == "torch" or unasked:
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
    # All streams of a model share a session that was checked.
    kept = SESSIONS.setdefault(model, {})
    key = path, torch.get_num_threads()
    session = kept.get(key) or _cached_session(model, path, tokens)
    if session is None and runtime == "onnx":
        _check_can_keep(path.parent)
        tell(
            f"exporting the model for onnxruntime, once: {path} will be taken "
            "from now on"
        )
        milliseconds = 1000 * tokens * step.token / model.hparams.sample_rate
        export_streaming_onnx(model, path, True, milliseconds)
        session = onnx_session(path, torch.get_num_threads())
    if session is None:
        return None
    kept[key] = session
    # A trace is worth it for the few sizes of live sound.
    others = step if block is None else traced_steps(model)
    return OnnxSteps(session, others, tokens * step.token)


class OnnxSteps:
    """Steps in onnxruntime, for blocks of one size; others are those of torch.

    A step costs about the same for a token as for several: blocks of a
    multiple of the size are not cut, since torch takes them at once in less
    time.

    Arguments
    ---------
    session : onnxruntime.InferenceSession
        Of what ``export_streaming_onnx`` writes.
    others : callable
        ``StreamingStep`` or ``CompiledSteps`` of the same network.
    size : int
        Samples of a block.
    """

    def __init__(self, session, others, size):
        self.session, self.others, self.size = session, others, size
        _, *self.names = (each.name for each in session.get_inputs())

    def __call__(self, mixture, *state):
        """Sources [B, n, S] of mixtures [B, n], and the new state."""
        kind = mixture.device.type, mixture.dtype
        # A model may be brought elsewhere while it streams.
        if mixture.shape[1] != self.size or kind != ("cpu", torch.float32):
            return self.others(mixture, *state)
        feeds = dict(zip(self.names, (part.numpy() for part in state)))
        feeds["mixture"] = mixture.contiguous().numpy()
        return [*map(torch.from_numpy, self.session.run(None, feeds))]


def traced_steps(model):
    """Steps of torch whose traces all streams of a model share."""
    step, steps = model.make_stream().step, model.__dict__.get("_steps")
    if steps is None or steps.step.masknet is not step.masknet:
        steps = model.__dict__["_steps"] = CompiledSteps(step)
    return steps


def cache_folder():
    """The folder ``flashformer`` in the user's cache; it need not be there.

    Example
    -------
    >>> cache_folder().name
    'flashformer'
    """
    name, usual = "XDG_CACHE_HOME", ".cache"
    if os.name == "nt":
        name, usual = "LOCALAPPDATA", "AppData/Local"
    folder = Path(os.environ.get(name, ""))
    # The standard says that a relative one does not count.
    if not folder.is_absolute():
        folder = Path("~", usual).expanduser()
    return folder / "flashformer"


def _has_cache():
    try:
        return os.path.isdir(cache_folder())
    except RuntimeError:  # no home
        return False


def _check_can_keep(folder):
    """Raise now what would otherwise be raised after the export."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"no right to write in {folder}")
    except OSError as error:
        raise type(error)(
            f"the exported model cannot be kept in {folder}: {error}; set "
            "XDG_CACHE_HOME to another folder, or give --runtime torch"
        ) from error


def _why_not(step):
    """Why onnxruntime cannot run a step: an error and its text, or None."""
    state = step.state_dict().values()
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    if not all(isinstance(x, torch.Tensor) for x in state):
        return ValueError, "takes no quantised model: give --runtime torch"
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
    """A hash of all that a graph depends on."""
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
    """A session of a file of the cache; None if it is not there, or broken."""
    if not os.path.isfile(path):
        return None
    # The caller's random numbers are not those of a check.
    with torch.random.fork_rng(devices=()):
        try:
            session = onnx_session(path, torch.get_num_threads())
            networks = networks_on_cpu(model)
            check_streaming(networks, session, tokens, blocks=CHECKED_BLOCKS)
        # onnxruntime has an error of its own for each way to be broken.
        except Exception as error:
            log.info("%s cannot be used: %s", path, error)
            return None
    return session
