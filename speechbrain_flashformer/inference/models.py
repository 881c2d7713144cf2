"""Load model folders: check the yaml, build the model, load the weights.

A folder holds hyperparams.yaml and one checkpoint for each of ``MODULES``.
Unless the caller trusts it, its yaml may only contain what ``flashformer pack``
writes.
"""

import io
import re
from pathlib import Path
from types import SimpleNamespace

import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML, Loader
from ruamel.yaml.nodes import MappingNode

from speechbrain_flashformer.inference.folders import YAML_FILE, find_file
from speechbrain_flashformer.inference.recordings import Recordings
from speechbrain_flashformer.inference.trust import (
    WITHOUT_SPEECHBRAIN,
    PackedLoader,
    refusal,
    untrusted,
)
from speechbrain_flashformer.inference.weights import (
    MEND,
    check_readable,
    load_weights,
    one_line,
)
from speechbrain_flashformer.nnet.separator import MODULES, encoder_frame

# Module paths in older yamls -> those of today.
MOVED = {
    r"(!\w+:speechbrain_flashformer\.)(filterbank|streaming)\.": r"\1nnet.\2.",
    r"(!\w+:speechbrain_flashformer\.)masknet\.": r"\1nnet.flashformer.",
}


def load_model(
    source,
    hparams_file=YAML_FILE,
    overrides=None,
    overrides_must_match=True,
    savedir=None,
    local_strategy=None,
    fetch_config=None,
    trust=False,
    download_only=False,
    without_speechbrain=False,
):
    """Build a packed model on the CPU and load its weights.

    Arguments
    ---------
    source, hparams_file, overrides, overrides_must_match, savedir
        As in ``FlashFormerSeparation.from_hparams``.
    local_strategy, fetch_config, trust, download_only
        As in ``FlashFormerSeparation.from_hparams``.
    without_speechbrain : bool
        Whether modules of SpeechBrain are replaced by equivalent ones that
        need only torch. It has no effect with trust.

    Returns
    -------
    dict
        The hyperparameters of the yaml. Its ``modules`` have their weights,
        except with download_only.

    Raises
    ------
    OSError, ValueError
        As in ``FlashFormerSeparation.from_hparams``.

    Example
    -------
    >>> from speechbrain_flashformer.inference.folders import built_in_model
    >>> load_model(built_in_model())["sample_rate"]
    8000
    """

    def _find(name):
        return find_file(name, source, savedir, local_strategy, fetch_config)

    path = _find(hparams_file)
    hparams = build_model(
        read_yaml(path),
        path,
        overrides,
        overrides_must_match,
        trust,
        without_speechbrain,
    )
    hparams["savedir"] = savedir
    pretrainer = hparams["pretrainer"]
    if trust and hasattr(pretrainer, "collect_files"):
        _load_trusted(pretrainer, _find, fetch_config, download_only)
        return hparams
    for name, module in pretrainer.loadables.items():
        found = _find(f"{name}.ckpt")
        if not download_only:
            load_weights(module, found)
    return hparams


def _load_trusted(pretrainer, find, fetch_config, download_only):
    """Load weights from the paths of a trusted yaml, or from its folder."""
    from speechbrain.utils.fetching import FetchConfig

    for name in pretrainer.loadables:
        if name not in pretrainer.paths and pretrainer.is_loadable(name):
            found = find(f"{name}.ckpt").absolute()
            pretrainer.add_paths({name: found.as_posix()})
    pretrainer.set_collect_in(None)
    pretrainer.collect_files(fetch_config=fetch_config or FetchConfig())
    if not download_only:
        hooks = dict.fromkeys(pretrainer.loadables, load_weights)
        pretrainer.add_custom_hooks({**hooks, **pretrainer.custom_hooks})
        pretrainer.load_collected()


def read_yaml(path):
    """Read a yaml file, with old module paths replaced by those of today.

    Arguments
    ---------
    path : str or Path
        The file.

    Returns
    -------
    str

    Raises
    ------
    OSError
        When the file cannot be read.
    ValueError
        When the file is empty or not UTF-8 text.
    """
    check_readable(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {MEND}") from error
    for old, new in MOVED.items():
        text = re.sub(old, new, text)
    return text


def build_model(
    text,
    path,
    overrides=None,
    overrides_must_match=True,
    trust=False,
    without_speechbrain=False,
):
    """Build the model of a yaml, with random weights.

    Arguments
    ---------
    text : str
        The yaml.
    path : str or Path
        Where the yaml is from, for messages and for ``!include:``.
    overrides, overrides_must_match
        As in ``load_hyperpyyaml``.
    trust, without_speechbrain : bool
        As in ``load_model``.

    Returns
    -------
    dict
        The hyperparameters of the yaml.

    Raises
    ------
    ValueError
        When the yaml is broken, lacks a key or needs trust, or when its
        modules do not match each other.
    """
    if not trust and (odd := untrusted(compose_yaml(text, path))):
        raise ValueError(refusal(odd, path))
    if without_speechbrain and not trust:
        for old, new in WITHOUT_SPEECHBRAIN.items():
            text = re.sub(rf"{re.escape(old)}(?=\s)", new, text)
    stream = io.StringIO(text)
    stream.name = str(path)  # base of the paths in !include:
    try:
        hparams = load_hyperpyyaml(
            stream,
            overrides,
            overrides_must_match,
            loader=Loader if trust else PackedLoader,
        )
    # A constructor may raise any exception for its arguments.
    except Exception as error:
        mend = "" if overrides else f": {MEND}"
        raise ValueError(
            f"cannot build the model of {path}: {one_line(error)}{mend}"
        ) from error
    _check_keys(hparams, path)
    _check_fit(hparams, path)
    return hparams


def compose_yaml(text, path):
    """Parse a yaml into a tree of nodes, without constructing objects.

    Arguments
    ---------
    text : str
        The yaml.
    path : str or Path
        Where the yaml is from, for messages.

    Returns
    -------
    ruamel.yaml.nodes.MappingNode
        The root.

    Raises
    ------
    ValueError
        When the text is not a yaml with keys.

    Example
    -------
    >>> len(compose_yaml("sample_rate: 8000", "hyperparams.yaml").value)
    1
    """
    try:
        root = YAML().compose(text)
    # Syntax errors, and a RecursionError if the yaml is nested too deeply.
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        line = f" from line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path} is not valid yaml{line}: {MEND}") from error
    if not isinstance(root, MappingNode):
        raise ValueError(f"{path} has no keys: {MEND}")
    return root


def _check_keys(hparams, path):
    """Raise a ValueError if a key or module is missing or of a wrong type."""
    needed = ("num_spks", "sample_rate", "modules", "pretrainer")
    if lacking := [key for key in needed if key not in hparams]:
        raise ValueError(f"{path} has no {', '.join(lacking)}: {MEND}")
    for key in ("num_spks", "sample_rate"):
        value = hparams[key]
        if type(value) is not int or value < 1:
            raise ValueError(
                f"{path}: {key} must be a whole number, 1 or more, not "
                f"{value!r}"
            )
    modules, pretrainer = hparams["modules"], hparams["pretrainer"]
    if not isinstance(getattr(pretrainer, "loadables", None), dict):
        raise ValueError(f"{path}: pretrainer is not a Pretrainer: {MEND}")
    for name in MODULES:
        module = modules.get(name) if isinstance(modules, dict) else None
        if not isinstance(module, torch.nn.Module):
            raise ValueError(f"{path}: modules have no {name}: {MEND}")
        if pretrainer.loadables.get(name) is not module:
            raise ValueError(f"{path}: pretrainer loads no {name}: {MEND}")
    for name, module in (modules | pretrainer.loadables).items():
        if not isinstance(module, torch.nn.Module):
            raise ValueError(f"{path}: {name} is not a module: {MEND}")


def _check_fit(hparams, path):
    """Raise a ValueError if encoder, masknet and decoder do not match."""
    encoder, masknet, decoder = (hparams["modules"][name] for name in MODULES)
    kinds = torch.nn.Conv1d, torch.nn.ConvTranspose1d
    convs = [
        next((m for m in module.modules() if isinstance(m, kind)), None)
        for module, kind in zip((encoder, decoder), kinds)
    ]
    if None in convs:
        raise ValueError(f"{path}: encoder or decoder is none: {MEND}")
    analysis, synthesis = convs
    channels = analysis.out_channels
    frame = encoder_frame(encoder)
    for what, one, other in (
        ("channels of encoder and decoder", channels, synthesis.in_channels),
        (
            "kernel and stride of encoder and decoder",
            frame,
            (synthesis.kernel_size[0], synthesis.stride[0]),
        ),
        (
            "channels of encoder and masknet",
            channels,
            getattr(masknet, "in_channels", channels),
        ),
        (
            "num_spks of model and masknet",
            hparams["num_spks"],
            getattr(masknet, "num_spks", hparams["num_spks"]),
        ),
    ):
        if one != other:
            raise ValueError(f"{path}: {what} are {one} and {other}: {MEND}")


class RecordingSeparator(Recordings):
    """A packed model that does not import SpeechBrain; for the command line.

    It separates as ``FlashFormerSeparation`` does. Importing SpeechBrain takes
    longer than separating a short recording, so it is imported only if the
    yaml of the model needs it.

    Arguments
    ---------
    source : str or Path
        A model folder, or ``hf:OWNER/NAME``.
    device : str
        Device of the networks, such as ``cuda:0``.
    trust : bool
        Whether the yaml of the model may call any code.

    Raises
    ------
    OSError, ValueError
        As in ``FlashFormerSeparation.from_hparams``.

    Example
    -------
    >>> from speechbrain_flashformer.inference.folders import built_in_model
    >>> model = RecordingSeparator(built_in_model())
    >>> model.separate_audio(torch.randn(8000)).shape
    torch.Size([1, 8000, 2])
    """

    def __init__(self, source, device="cpu", trust=False):
        hparams = load_model(source, trust=trust, without_speechbrain=True)
        self.hparams = SimpleNamespace(**hparams)
        self.mods = torch.nn.ModuleDict(hparams["modules"]).to(device).eval()
        self.mods.requires_grad_(False)
