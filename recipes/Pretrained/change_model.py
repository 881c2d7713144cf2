#!/usr/bin/env python3
"""Average packed models, resize or deepen one, or make one causal.

> python change_model.py average A B OUT --share 0.2
> python change_model.py resize MODEL OUT --num_layers 12 --d_ffn 384
> python change_model.py deepen MODEL OUT --times 2
> python change_model.py causal MODEL OUT

average: averages the weights of two models. OUT has SHARE (0 to 1) of B and the
rest of A. One of the two must have been trained from the other, or both from a
third. The card and the model numbers are those of B. Source: model soups
(arXiv:2203.05482).

resize: changes the number of layers and the width of the feed-forwards. Train a
larger model further with ``--start_from OUT --model "{num_layers: 12, d_ffn:
384}"``. The outputs of new layers and units are initialized to zero, so a
larger OUT separates exactly as MODEL does. New layers are inserted evenly after
old ones; reducing the number of layers removes the same ones. Numbers that are
not given stay as they are. The card is that of MODEL. Source: Net2Net
(arXiv:1511.05641), with zeros instead of copies.

deepen: replaces each layer by TIMES copies of it, each with 1 / TIMES of its
output on the residual path. OUT separates about as well as MODEL, and the new
layers are useful from the first step of a training on. Source: layers as steps
of an ordinary differential equation, which smaller steps solve too (multi-level
ResNets, arXiv:1710.10348).

causal: removes everything that uses the future: the FSMN memories keep only
their past taps, attention looks back only, and the input norm covers the last
500 tokens. The result is a starting point for training a streaming model.
"""

import argparse
import contextlib
import io
import shutil
import sys
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML

from speechbrain_flashformer import FlashFormer
from speechbrain_flashformer.inference import FlashFormerSeparation
from speechbrain_flashformer.nnet.separator import MODULES

SEED = 0
# The output projections of the residual branches of a layer.
OUTS = ("attention.out", "fsmn.out", "ffn.out")
# The last weights of the residual branches: the scale, where there is one.
LAST = ("scale_attention", "fsmn.out", "scale_ffn")


@contextlib.contextmanager
def copied_whole(folder, out):
    """Yield a temporary copy of a folder; it is renamed to ``out`` at the end.

    Raises
    ------
    FileExistsError
        If ``out`` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: remove it or name another")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield shutil.copytree(folder, partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_masknet(model):
    """Load the masknet of MODEL; raises a ValueError for another network."""
    masknet = FlashFormerSeparation.from_hparams(model).mods.masknet
    if not isinstance(masknet, FlashFormer):
        raise ValueError(f"the masknet of {model} is not a FlashFormer")
    return masknet


# --- average -----------------------------------------------------------------


def average(a, b, out, share):
    """Write the average of two models to OUT, atomically."""
    if not 0 <= share <= 1:
        raise ValueError(f"--share must be from 0 to 1, got {share}")
    with copied_whole(b, out) as partial:
        for name in MODULES:
            first, second = (
                torch.load(folder / f"{name}.ckpt", weights_only=True)
                for folder in (a, b)
            )
            mean = average_states(first, second, share)
            torch.save(mean, partial / f"{name}.ckpt")


def average_states(first, second, share):
    """Average two state dicts; the dtypes are those of the second."""
    shapes, others = (
        {key: value.shape for key, value in state.items()}
        for state in (first, second)
    )
    if shapes != others:
        raise ValueError("the two models are not the same network")
    return {
        key: torch.lerp(first[key].float(), value.float(), share).to(value)
        for key, value in second.items()
    }


# --- resize ------------------------------------------------------------------


def resize(model, out, num_layers=None, d_ffn=None):
    """Write MODEL with other numbers to OUT, atomically; None: unchanged."""
    old = load_masknet(model)
    numbers = {"num_layers": num_layers, "d_ffn": d_ffn}
    numbers = {key: n for key, n in numbers.items() if n is not None}
    if any(n < 1 for n in numbers.values()):
        raise ValueError("--num_layers and --d_ffn must be 1 or more")
    hparams = (model / "hyperparams.yaml").read_text("utf-8")
    hparams = with_numbers(hparams, numbers)
    torch.manual_seed(SEED)
    new = load_hyperpyyaml(hparams)["masknet"]
    take_over(old, new)
    with copied_whole(model, out) as partial:
        (partial / "hyperparams.yaml").write_text(hparams, encoding="utf-8")
        weights = partial / "masknet.ckpt"
        kept = torch.load(weights, weights_only=True)["masks.weight"].dtype
        state = new.state_dict()
        torch.save({k: v.to(kept) for k, v in state.items()}, weights)


def with_numbers(hparams, numbers):
    """Return the text of a hyperparams.yaml with other masknet numbers."""
    yaml, text = YAML(), io.StringIO()
    yaml.indent(mapping=4, sequence=4, offset=2)
    tree = yaml.load(hparams)
    tree["masknet"].update(numbers)
    yaml.dump(tree, text)
    return text.getvalue()


# --- deepen ------------------------------------------------------------------


def deepen(model, out, times):
    """Write MODEL with each layer in TIMES smaller steps to OUT, atomically."""
    old = load_masknet(model)
    if times < 1:
        raise ValueError(f"--times must be 1 or more, got {times}")
    text = (model / "hyperparams.yaml").read_text("utf-8")
    text = with_numbers(text, {"num_layers": times * len(old.layers)})
    with copied_whole(model, out) as partial:
        (partial / "hyperparams.yaml").write_text(text, encoding="utf-8")
        path = partial / "masknet.ckpt"
        state = torch.load(path, weights_only=True)
        torch.save(deepened(state, times), path)


def deepened(state, times):
    """Return the state dict of a masknet with TIMES as many layers."""
    more = {}
    for key, value in state.items():
        if not key.startswith("layers."):
            more[key] = value
            continue
        _, layer, name = key.split(".", 2)
        if name.startswith(LAST):
            value = value / times
        for step in range(times):
            more[f"layers.{times * int(layer) + step}.{name}"] = value.clone()
    return more


# --- causal ------------------------------------------------------------------


def causal(model, out):
    """Write a causal copy of MODEL to OUT, atomically."""
    old = load_masknet(model)
    if old.causal:
        raise ValueError(f"the masknet of {model} is causal already")
    text = (model / "hyperparams.yaml").read_text("utf-8")
    masknet = YAML().load(text)["masknet"]
    left, _ = old.layers[0].attention.window
    norm_span = 500 * old.token_stride
    changes = {"causal": True, "lookahead": 0, "norm_span": norm_span}
    text = with_numbers(text, {**changes, "window": (window := f"({left}, 0)")})
    # HyperPyYAML does not parse a quoted tuple.
    text = text.replace(f"'{window}'", window)
    past = 1 + masknet["lookback"]
    with copied_whole(model, out) as partial:
        (partial / "hyperparams.yaml").write_text(text, encoding="utf-8")
        path = partial / "masknet.ckpt"
        state = torch.load(path, weights_only=True)
        for key, value in state.items():
            if ".memory." in key:
                state[key] = value[..., :past].clone()
        torch.save(state, path)


@torch.no_grad()
def take_over(old, new):
    """Copy the weights of masknet ``old`` to ``new``, as far as they fit."""
    rest = old.state_dict()
    rest = {k: v for k, v in rest.items() if not k.startswith("layers.")}
    new.load_state_dict(rest, strict=False)
    for layer in new.layers:
        for name in OUTS:
            part = layer.get_submodule(name)
            part.weight.zero_()
            part.bias.zero_()
    few, many = sorted((old.layers, new.layers), key=len)
    for i in range(len(few)):
        # Index of this layer of the smaller network in the larger one.
        place = i * len(many) // len(few)
        mine, theirs = (i, place) if few is new.layers else (place, i)
        take_over_layer(old.layers[theirs], new.layers[mine])


def take_over_layer(old, new):
    """Copy a layer; output weights of added feed-forward units stay zero."""
    widths = [layer.ffn.out.in_features for layer in (old, new)]
    both, wide = min(widths), widths[1]
    state = new.state_dict()
    for key, value in old.state_dict().items():
        if key.startswith("ffn.expand"):
            # The first half are gates, the second half values.
            mine = state[key].unflatten(0, (2, wide))
            mine[:, :both] = value.unflatten(0, (2, widths[0]))[:, :both]
        elif key == "ffn.out.weight":
            state[key][:, :both] = value[:, :both]
        else:
            state[key].copy_(value)


def main(words=None):
    """Run the command line ``words``."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("average")
    command.set_defaults(run=average)
    for name in ("a", "b", "out"):
        command.add_argument(name, type=Path)
    command.add_argument("--share", type=float, required=True)
    command = commands.add_parser("resize")
    command.set_defaults(run=resize)
    for name in ("model", "out"):
        command.add_argument(name, type=Path)
    for name in ("--num_layers", "--d_ffn"):
        command.add_argument(name, type=int)
    command = commands.add_parser("deepen")
    command.set_defaults(run=deepen)
    for name in ("model", "out"):
        command.add_argument(name, type=Path)
    command.add_argument("--times", type=int, required=True)
    command = commands.add_parser("causal")
    command.set_defaults(run=causal)
    for name in ("model", "out"):
        command.add_argument(name, type=Path)
    options = vars(parser.parse_args(words))
    run = options.pop("run")
    try:
        run(**options)
    except (OSError, ValueError) as error:
        sys.exit(f"change_model.py: {error}")


if __name__ == "__main__":
    main()
