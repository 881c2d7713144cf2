"""Model folders: checked, built, and given their weights strictly.

A folder holds hyperparams.yaml and one checkpoint for each of ``MODULES``.
Unless the caller trusts it, its yaml may only ask for what ``flashformer
pack`` writes.
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

# Where older yamls look for what is in nnet now.
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
    """Build a packed model on the CPU and give it its weights.

    Arguments and errors are those of ``FlashFormerSeparation.from_hparams``.
    ``without_speechbrain`` takes modules on torch alone in the place of
    SpeechBrain's that do the same; a trusted yaml is built as it is.

    Returns
    -------
    dict
        What the yaml describes; ``modules`` hold their weights, except with
        download_only.

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
        _load_as_told(pretrainer, _find, fetch_config, download_only)
        return hparams
    for name, module in pretrainer.loadables.items():
        found = _find(f"{name}.ckpt")
        if not download_only:
            load_weights(module, found)
    return hparams


def _load_as_told(pretrainer, find, fetch_config, download_only):
    """Load weights from where a trusted yaml says, else from where it is."""
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
    """The text of a yaml file, with today's names of the network's parts.

    Raises
    ------
    OSError
        When it cannot be read.
    ValueError
        When it is no text.
    """
    check_readable(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {MEND}") from error
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
    """What a model's yaml describes, with random weights.

    Arguments
    ---------
    text : str
        The yaml.
    path : str or Path
        Where it is from, for messages and what it includes.
    overrides, overrides_must_match
        As in ``load_hyperpyyaml``.
    trust, without_speechbrain : bool
        As in ``load_model``.

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        When it is broken, lacks a key, or may run code that is not trusted.
    """
    if not trust and (odd := untrusted(compose_yaml(text, path))):
        raise ValueError(refusal(odd, path))
    if without_speechbrain and not trust:
        for old, new in WITHOUT_SPEECHBRAIN.items():
            text = re.sub(rf"{re.escape(old)}(?=\s)", new, text)
    stream = io.StringIO(text)
    stream.name = str(path)  # what !include: is relative to
    try:
        hparams = load_hyperpyyaml(
            stream,
            overrides,
            overrides_must_match,
            loader=Loader if trust else PackedLoader,
        )
    # Whatever a constructor says to what it is given.
    except Exception as error:
        mend = "" if overrides else f": {MEND}"
        raise ValueError(
            f"cannot build the model of {path}: {one_line(error)}{mend}"
        ) from error
    _check_keys(hparams, path)
    _check_fit(hparams, path)
    return hparams


def compose_yaml(text, path):
    """The tree of nodes of a yaml; nothing is constructed.

    Raises
    ------
    ValueError
        When it is no yaml of keys and values; names its path.
    """
    try:
        root = YAML().compose(text)
    # Beside errors of syntax, Python's when it is nested without end.
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        line = f" from line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path} is no yaml{line}: {MEND}") from error
    if not isinstance(root, MappingNode):
        raise ValueError(f"{path} has no keys: {MEND}")
    return root


def _check_keys(hparams, path):
    needed = ("num_spks", "sample_rate", "modules", "pretrainer")
    if lacking := [key for key in needed if key not in hparams]:
        raise ValueError(f"{path} has no {', '.join(lacking)}: {MEND}")
    for key in ("num_spks", "sample_rate"):
        value = hparams[key]
        if type(value) is not int or value < 1:
            raise ValueError(
                f"{path}: {key} is a whole number from 1, not {value!r}"
            )
    modules, pretrainer = hparams["modules"], hparams["pretrainer"]
    if not isinstance(getattr(pretrainer, "loadables", None), dict):
        raise ValueError(f"{path}: pretrainer is no Pretrainer: {MEND}")
    for name in MODULES:
        module = modules.get(name) if isinstance(modules, dict) else None
        if not isinstance(module, torch.nn.Module):
            raise ValueError(f"{path}: modules have no {name}: {MEND}")
        if pretrainer.loadables.get(name) is not module:
            raise ValueError(f"{path}: pretrainer loads no {name}: {MEND}")
    for name, module in (modules | pretrainer.loadables).items():
        if not isinstance(module, torch.nn.Module):
            raise ValueError(f"{path}: {name} is no module: {MEND}")


def _check_fit(hparams, path):
    """Encoder, masknet and decoder have the same channels and frames."""
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
    """A packed model without SpeechBrain around it: the command line's.

    It separates as ``FlashFormerSeparation`` does. SpeechBrain, whose import
    takes longer than separating a short recording, is imported only when the
    model's yaml asks for it.

    Arguments
    ---------
    source : str or Path
        A packed folder, or ``hf:OWNER/NAME``.
    device : str
        Where it runs.
    trust : bool
        Whether the model's yaml may call anything.

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
