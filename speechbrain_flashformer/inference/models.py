"""Model folders: found, checked, built, and given their weights strictly.

A folder holds hyperparams.yaml and one checkpoint for each of ``MODULES``.
Unless the caller trusts it, its yaml may only ask for what ``flashformer
pack`` writes.
"""

import filecmp
import io
import re
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML, Loader
from ruamel.yaml.nodes import MappingNode
from speechbrain.utils.fetching import (
    FetchConfig,
    FetchFrom,
    FetchSource,
    LocalStrategy,
    fetch,
    link_with_strategy,
)
from speechbrain.utils.parameter_transfer import Pretrainer

from speechbrain_flashformer.inference.trust import (
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

HUB = "hf:"
YAML_FILE = "hyperparams.yaml"
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
    local_strategy=LocalStrategy.SYMLINK,
    fetch_config=None,
    trust=False,
    download_only=False,
):
    """Build a packed model on the CPU and give it its weights.

    Arguments
    ---------
    source : str or Path
        A folder, or ``hf:OWNER/NAME`` for a model of the Hugging Face hub.
    hparams_file, overrides, overrides_must_match, download_only
        As in SpeechBrain's ``pretrained_from_hparams``.
    savedir, local_strategy, fetch_config
        As in ``find_file``.
    trust : bool
        Whether the yaml may call anything.

    Returns
    -------
    dict
        What the yaml describes; ``modules`` hold their weights, except with
        download_only.

    Raises
    ------
    OSError
        When a file is missing or cannot be read.
    ValueError
        When a file is broken, or two do not fit each other.

    Example
    -------
    >>> from speechbrain_flashformer.inference.interface import built_in_model
    >>> load_model(built_in_model())["sample_rate"]
    8000
    """

    def _find(name):
        return find_file(name, source, savedir, local_strategy, fetch_config)

    path = _find(hparams_file)
    hparams = build_model(
        read_yaml(path), path, overrides, overrides_must_match, trust
    )
    hparams["savedir"] = savedir
    pretrainer = hparams["pretrainer"]
    for name in pretrainer.loadables:
        if name not in pretrainer.paths and pretrainer.is_loadable(name):
            found = _find(f"{name}.ckpt").absolute()
            pretrainer.add_paths({name: found.as_posix()})
    # A model of one's own may take weights from elsewhere: its yaml says so.
    pretrainer.set_collect_in(None)
    pretrainer.collect_files(fetch_config=fetch_config or FetchConfig())
    if not download_only:
        hooks = dict.fromkeys(pretrainer.loadables, load_weights)
        pretrainer.add_custom_hooks({**hooks, **pretrainer.custom_hooks})
        pretrainer.load_collected()
    return hparams


def find_file(
    name,
    source,
    savedir=None,
    local_strategy=LocalStrategy.SYMLINK,
    fetch_config=None,
):
    """The path of one file of a model, fetched if the model is on a hub.

    Arguments
    ---------
    name : str
        Of the file.
    source : str or Path
        A folder, or ``hf:OWNER/NAME``.
    savedir : str or Path, optional
        Gets the file when it is fetched; what is in a folder stays there. A
        link is replaced, a file is not.
    local_strategy : LocalStrategy
        Whether savedir gets a link or a copy.
    fetch_config : FetchConfig, optional
        Of SpeechBrain's ``fetch``: revision, token, network and others.

    Returns
    -------
    Path

    Raises
    ------
    FileNotFoundError
        When there is no such folder, model or file.
    FileExistsError
        When savedir has another file of that name.
    ValueError
        When source is no name of a model.
    """
    if not str(source).startswith(HUB):
        folder = Path(source)
        if folder.is_file():
            raise NotADirectoryError(
                f"{folder} is a file: give the model folder that it is in"
            )
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no model folder {folder}: give one made by 'flashformer "
                f"pack', or a model on a hub as {HUB}OWNER/NAME"
            )
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no {name} in {folder}: is it a folder made by 'flashformer "
                "pack'?"
            )
        return folder / name
    owner_name = str(source).removeprefix(HUB)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", owner_name):
        raise ValueError(
            f"{source} is no model on a hub: give it as {HUB}OWNER/NAME"
        )
    remote = FetchSource(FetchFrom.HUGGING_FACE, owner_name)
    try:
        path = fetch(name, remote, fetch_config=fetch_config or FetchConfig())
    # Offline, unknown, private: the hub has an exception for each.
    except Exception as error:
        raise FileNotFoundError(
            f"cannot fetch {name} of {source}: {one_line(error)}"
        ) from error
    if savedir is None:
        return path
    kept = Path(savedir) / name
    if kept.is_file() and not kept.is_symlink():
        if not filecmp.cmp(path, kept, shallow=False):
            raise FileExistsError(
                f"{kept} is another file and is not replaced: choose another "
                "savedir"
            )
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    return link_with_strategy(path, kept, local_strategy)


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
    text, path, overrides=None, overrides_must_match=True, trust=False
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
    trust : bool
        Whether it may call anything.

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
    if not isinstance(pretrainer, Pretrainer):
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
