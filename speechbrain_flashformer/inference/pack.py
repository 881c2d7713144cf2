"""Pack a training run into a model folder, and start training from one."""

import math
from io import StringIO
from pathlib import Path

import torch
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarbool import ScalarBoolean
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_flashformer.inference.card import model_card
from speechbrain_flashformer.inference.files import written_beside
from speechbrain_flashformer.inference.models import (
    build_model,
    compose_yaml,
    read_yaml,
)
from speechbrain_flashformer.inference.trust import untrusted
from speechbrain_flashformer.inference.weights import (
    fit_weights,
    one_line,
    read_weights,
)
from speechbrain_flashformer.nnet.separator import MODULES
from speechbrain_flashformer.nnet.streaming import lookahead_tokens
from speechbrain_flashformer.training.checkpoints import (
    averaged_weights,
    output_gain,
    validated,
)

LOOKAHEAD = "!apply:speechbrain_flashformer.nnet.streaming.lookahead_tokens"
PACKED = {"hyperparams.yaml", "README.md", *(f"{m}.ckpt" for m in MODULES)}

TAIL = """
modules:
    encoder: !ref <encoder>
    masknet: !ref <masknet>
    decoder: !ref <decoder>

pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables: !ref <modules>
"""


def pack(run, out, half=False, overwrite=False, last=False):
    """Pack the best or the last checkpoints of a training run into a folder.

    With ``avg_checkpoints`` in the yaml of the run, the weights are averaged
    over that number of best checkpoints, or last ones.

    The folder loads with ``FlashFormerSeparation.from_hparams`` and with
    SpeechBrain's ``SepformerSeparation.from_hparams``. SI-SNR does not depend
    on the scale and polarity of the outputs. So the weights of the decoder are
    multiplied by a gain that sets, on average over the validation set, the
    level and polarity of the sources.

    Arguments
    ---------
    run : str or Path
        The output folder of a training run.
    out : str or Path
        The model folder with hyperparams.yaml, encoder.ckpt, masknet.ckpt,
        decoder.ckpt and README.md, written atomically.
    half : bool
        Whether the weights are stored in half precision. They run in float32.
    overwrite : bool
        Whether an existing model folder is replaced. A folder with other files
        is never replaced.
    last : bool
        Whether the last checkpoints are packed, not those of the lowest
        validation loss. At the end of a training whose learning rate decreases
        to zero they are often better, if the validation set is small. The card
        then has no test results, because the training tested the best ones.

    Returns
    -------
    Path
        The model folder.

    Raises
    ------
    FileNotFoundError
        When the run has no hyperparams.yaml or no validated checkpoint.
    FileExistsError
        When out exists and may not be replaced.
    ValueError
        When a file of the run is broken or does not match the others, or a
        weight is too large for half precision.
    """
    run, out = Path(run).resolve(), Path(out).resolve()
    source = run / "hyperparams.yaml"
    if not source.is_file():
        raise FileNotFoundError(
            f"no hyperparams.yaml in {run}: give the output folder of a "
            "training"
        )
    if out.exists():
        if not overwrite:
            raise FileExistsError(
                f"{out} exists: remove it, or overwrite it "
                "(--overwrite, in Python overwrite=True)"
            )
        held = {f.name for f in out.iterdir()} if out.is_dir() else None
        # Replace an empty folder or a model; a README.md alone is not a model.
        if held is None or (
            held and not {"hyperparams.yaml"} <= held <= PACKED
        ):
            raise FileExistsError(
                f"{out} is more than a packed model and is not replaced: "
                "choose another folder"
            )
    text = read_yaml(source)
    compose_yaml(text, source)  # raises if the yaml is broken
    tree = YAML().load(text)
    hyperparams = _hyperparams(tree, source)
    # Do not build, and so do not check, a masknet of an unknown class: that
    # needs trust.
    odd = untrusted(compose_yaml(hyperparams, source))
    modules = None if odd else build_model(hyperparams, source)["modules"]
    count = tree.get("avg_checkpoints", 1)
    chosen = _choose_checkpoints(run / "save", count, last)
    with written_beside(out) as partial:
        partial.mkdir()
        (partial / "hyperparams.yaml").write_text(hyperparams, "utf-8")
        parameters = 0
        for name in MODULES:
            state = _weights(chosen, name)
            parameters += sum(value.numel() for value in state.values())
            file = chosen[0].path / f"{name}.ckpt"
            if modules is not None:
                fit_weights(modules[name], state, file)
            if half:
                state = _halved(state, file)
            torch.save(state, partial / f"{name}.ckpt")
        numbers = {key: tree[key] for key in ("num_spks", "sample_rate")}
        numbers["parameters"] = parameters / 1e6
        meta = chosen[0].meta
        card = model_card(out.name, numbers, run, meta, bool(odd), not last)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return out


def start_from(folder, modules):
    """Load the weights of a packed model into modules, to continue training.

    Arguments
    ---------
    folder : str or Path
        A model folder made by ``pack``.
    modules : dict of torch.nn.Module
        ``encoder``, ``masknet`` and ``decoder``.

    Raises
    ------
    FileNotFoundError
        When a checkpoint is missing.
    ValueError
        When the weights are those of another network.
    """
    for name in MODULES:
        path = Path(folder) / f"{name}.ckpt"
        if not path.is_file():
            raise FileNotFoundError(
                f"no {path} to start from: give a folder made by 'flashformer "
                "pack'"
            )
        fit_weights(
            modules[name],
            read_weights(path),
            path,
            "use the hyperparameters of the hyperparams.yaml beside it",
        )


def _choose_checkpoints(save, count, last):
    """Find the last checkpoints, or those of the lowest validation loss."""
    if type(count) is not int or count < 1:
        raise ValueError(
            f"avg_checkpoints of {save.parent / 'hyperparams.yaml'} must be a "
            f"whole number, 1 or more, not {count!r}"
        )
    chosen = []
    order = {"ckpt_predicate": validated} if last else {"min_key": "si-snr"}
    if save.is_dir():
        try:
            chosen = Checkpointer(save).find_checkpoints(
                **order, max_num_checkpoints=count
            )
        # A CKPT.yaml that is missing, is not yaml or lacks a key.
        except Exception as error:
            raise ValueError(
                f"a checkpoint in {save} has a broken CKPT.yaml "
                f"({one_line(error)}): move it away"
            ) from error
    if not chosen:
        raise FileNotFoundError(f"no validated checkpoint in {save}")
    for checkpoint in chosen:
        if not math.isfinite(checkpoint.meta["si-snr"]):
            raise ValueError(
                f"the validation loss of {checkpoint.path} is not finite: move "
                "that folder away to pack another checkpoint"
            )
    return chosen


def _weights(checkpoints, name):
    """Weights of one module for inference, averaged over checkpoints."""
    for checkpoint in checkpoints:
        try:
            read_weights(checkpoint.path / f"{name}.ckpt")
        except ValueError as error:
            raise ValueError(
                f"{name}.ckpt is broken in {checkpoint.path}: move that folder "
                "away to pack another checkpoint"
            ) from error
    state = averaged_weights(checkpoints, name)
    # Training on several GPUs adds this prefix to every key.
    state = {k.removeprefix("module."): v for k, v in state.items()}
    if name == "decoder":
        gain = output_gain(checkpoints)
        state = {k: v * gain for k, v in state.items()}
    return state


def _halved(state, path):
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in state.items()
    }
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError(
            f"{path} has weights too large for half precision: pack without "
            "--half"
        )
    return state


def _hyperparams(tree, path):
    """Yaml of what inference needs, without includes, as text."""
    keys = ("num_spks", "sample_rate", "modules")
    if lacking := [key for key in keys if key not in tree]:
        raise ValueError(
            f"{path} has no {', '.join(lacking)}: give the output folder of a "
            "training"
        )
    kept = {name: _plain(tree[name]) for name in ("num_spks", "sample_rate")}
    for name in MODULES:
        modules = tree["modules"]
        node = modules.get(name) if isinstance(modules, dict) else None
        if not _tag(node).startswith("!new:"):
            raise ValueError(
                f"{path}: modules have no {name} with its class: give the "
                "output folder of a training"
            )
        kept[name] = _plain(node)
    yaml, text = YAML(), StringIO()
    yaml.indent(mapping=4, sequence=4, offset=2)
    yaml.dump(kept, text)
    head = "# The model of a training run, flattened.\n\n"
    return head + text.getvalue() + TAIL


def _tag(node):
    tag = getattr(node, "tag", None)
    return str(tag.value or "") if tag is not None else ""


def _plain(node):
    """Copy a yaml node with its tags, without comments and anchors."""
    if _tag(node) == LOOKAHEAD:
        # The recipes compute this number. A packed yaml may not call functions.
        return lookahead_tokens(**node)
    if isinstance(node, CommentedMap):
        copy = CommentedMap((k, _plain(v)) for k, v in node.items())
    elif isinstance(node, CommentedSeq):
        copy = CommentedSeq(_plain(v) for v in node)
        copy.fa.set_flow_style()
    else:
        # Numbers and strings can have an anchor, too.
        kinds = {ScalarBoolean: bool, str: str, int: int, float: float}
        for kind, plain in kinds.items():
            if isinstance(node, kind) and not isinstance(node, bool):
                return plain(node)
        return node
    if node.tag.value:
        copy.yaml_set_ctag(node.tag)
    return copy
