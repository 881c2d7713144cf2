"""From a training run to a folder that needs nothing else, and back."""

import csv
import os
import shutil
from pathlib import Path

import torch
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarbool import ScalarBoolean
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_flashformer import __version__
from speechbrain_flashformer.checkpoints import averaged_weights, misfits
from speechbrain_flashformer.scores import SUMMARY
from speechbrain_flashformer.separate import MODULES

PACKED = {"hyperparams.yaml", "README.md", *(f"{m}.ckpt" for m in MODULES)}

TAIL = """
modules:
    encoder: !ref <encoder>
    masknet: !ref <masknet>
    decoder: !ref <decoder>

pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables: !ref <modules>
"""

CARD = """\
---
library_name: speechbrain
pipeline_tag: audio-to-audio
tags:
  - speech-separation
  - speechbrain
  - flashformer
---

# {name}

Separates single-channel recordings of {num_spks} speakers at {sample_rate} Hz;
{parameters:.1f} million parameters. Made by speechbrain-flashformer {version}.

## Use

```sh
pip install speechbrain-flashformer
flashformer separate mixture.wav -o separated --model {name}
```

```python
from speechbrain_flashformer.inference import FlashFormerSeparation

model = FlashFormerSeparation.from_hparams("{name}")
sources = model.separate_file("mixture.wav")  # [1, time, speakers]
```

`{name}` is this folder, or its name on a model hub.
{results}
## Training

The training and its data are described by who ran it: write here what the
model heard, under which licences, and what it is not good at.
"""


def pack(run, out, half=False, overwrite=False):
    """Pack the best checkpoint of a training run.

    The folder loads with ``FlashFormerSeparation.from_hparams`` and with
    SpeechBrain's own ``SepformerSeparation.from_hparams``. SI-SNR leaves the
    scale of the outputs free, and their sign, so the decoder is given the gain
    that brings them, on average over the validation set, to the level and
    polarity of their sources.

    Arguments
    ---------
    run : str or Path
        The output folder of a training.
    out : str or Path
        Gets hyperparams.yaml, encoder.ckpt, masknet.ckpt, decoder.ckpt and
        README.md, all at once.
    half : bool
        Store the weights in half precision; they are used in float32.
    overwrite : bool
        Whether an existing packed folder is replaced; one that holds
        anything else never is.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    FileNotFoundError
        When the run lacks its hyperparams.yaml or a checkpoint.
    FileExistsError
        When the folder exists.
    """
    run, out = Path(run).resolve(), Path(out).resolve()
    if not (run / "hyperparams.yaml").is_file():
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
        # Nothing, or a model; a card alone is somebody's text.
        if held is None or (
            held and not {"hyperparams.yaml"} <= held <= PACKED
        ):
            raise FileExistsError(
                f"{out} is more than a packed model and is not replaced: "
                "choose another folder"
            )
    tree = YAML().load(run / "hyperparams.yaml")
    best = []
    if (run / "save").is_dir():
        best = Checkpointer(run / "save").find_checkpoints(
            min_key="si-snr",
            max_num_checkpoints=tree.get("avg_checkpoints", 1),
        )
    if not best:
        raise FileNotFoundError(f"no validated checkpoint in {run / 'save'}")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    old = partial.with_suffix(".old")
    partial.mkdir(parents=True)
    try:
        with (partial / "hyperparams.yaml").open("w", encoding="utf-8") as file:
            _write_hyperparams(tree, file)
        parameters = 0
        for name in MODULES:
            state = averaged_weights(best, name)
            # Trained on several GPUs, every key has this in front.
            state = {k.removeprefix("module."): v for k, v in state.items()}
            if name == "decoder":
                gain = 10 ** (-best[0].meta.get("level_db", 0.0) / 20)
                gain *= best[0].meta.get("polarity", 1)
                state = {k: v * gain for k, v in state.items()}
            parameters += sum(value.numel() for value in state.values())
            if half:
                state = {k: v.half() for k, v in state.items()}
            torch.save(state, partial / f"{name}.ckpt")
        card = CARD.format(
            name=out.name,
            num_spks=tree["num_spks"],
            sample_rate=tree["sample_rate"],
            parameters=parameters / 1e6,
            version=__version__,
            results=_results(run, best[0].meta),
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            os.replace(out, old)
        os.replace(partial, out)
    finally:
        if old.exists() and not out.exists():
            os.replace(old, out)
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)
    return out


def start_from(folder, modules):
    """Give modules the weights of a packed model, to train on.

    Arguments
    ---------
    folder : str or Path
        Made by ``pack``.
    modules : dict
        The encoder, masknet and decoder, by name.

    Raises
    ------
    FileNotFoundError
        When the folder lacks one of them.
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
        state = torch.load(path, map_location="cpu", weights_only=True)
        if wrong := misfits(state, modules[name]):
            raise ValueError(
                f"{path} does not fit the {name} of the yaml in {len(wrong)} "
                f"weights, such as {wrong[0]}: take over the numbers of the "
                "hyperparams.yaml beside it"
            )
        modules[name].load_state_dict(state)


def _write_hyperparams(tree, file):
    """Only what inference needs, with nothing to include."""
    file.write("# The model of a training run, flattened.\n\n")
    yaml = YAML()
    yaml.indent(mapping=4, sequence=4, offset=2)
    kept = {name: _plain(tree[name]) for name in ("num_spks", "sample_rate")}
    kept |= {name: _plain(tree["modules"][name]) for name in MODULES}
    yaml.dump(kept, file)
    file.write(TAIL)


def _plain(node):
    """A copy of a yaml node with its tags, without comments and anchors."""
    if isinstance(node, CommentedMap):
        copy = CommentedMap((k, _plain(v)) for k, v in node.items())
    elif isinstance(node, CommentedSeq):
        copy = CommentedSeq(_plain(v) for v in node)
        copy.fa.set_flow_style()
    else:
        # Numbers and strings may carry an anchor too.
        kinds = {ScalarBoolean: bool, str: str, int: int, float: float}
        for kind, plain in kinds.items():
            if isinstance(node, kind) and not isinstance(node, bool):
                return plain(node)
        return node
    if node.tag.value:
        copy.yaml_set_ctag(node.tag)
    return copy


def _results(run, meta):
    """What the run says of its quality, as a section of the card."""
    when = f" at epoch {meta['epoch']}" if "epoch" in meta else ""
    lines = [f"- validation: SI-SNR {-meta['si-snr']:.2f} dB{when}"]
    file = run / "test_results.csv"
    if file.is_file():
        with file.open(newline="", encoding="utf-8") as rows:
            table = {row["snt_id"]: row for row in csv.DictReader(rows)}
        mean = table["avg"]
        lines.append(
            f"- test, {len(table) - len(SUMMARY)} mixtures: "
            f"SI-SNRi {float(mean['si-snr_i']):.2f} dB, "
            f"SDRi {float(mean['sdr_i']):.2f} dB"
        )
    return "\n## Results\n\n" + "\n".join(lines) + "\n"
