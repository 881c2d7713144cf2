#!/usr/bin/env python3
"""Give a packed model more layers and wider feed-forwards, to train it on.

> python benchmarks/grow_model.py MODEL OUT --num_layers 12 --d_ffn 384

OUT separates as MODEL does: what is new adds nothing until it has learned to.
New layers stand after old ones, evenly. The card of OUT is that of MODEL. Train
it with ``--start_from OUT --model "{num_layers: 12, d_ffn: 384}"``. Source:
Net2Net (arXiv:1511.05641), but with zeros behind what is new in place of
copies.
"""

import argparse
import io
import sys
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml
from records import copied_whole
from ruamel.yaml import YAML

from speechbrain_flashformer import FlashFormer
from speechbrain_flashformer.inference import FlashFormerSeparation

SEED = 0
# The last product of each part of a layer, added to what comes in.
OUTS = ("attention.out", "fsmn.out", "ffn.out")


def main(model, out, num_layers=None, d_ffn=None):
    """Write OUT, all at once; a number not given stays."""
    old = FlashFormerSeparation.from_hparams(model).mods.masknet
    if not isinstance(old, FlashFormer):
        raise ValueError(f"the masknet of {model} is no FlashFormer")
    numbers = {
        "num_layers": num_layers or len(old.layers),
        "d_ffn": d_ffn or old.layers[0].ffn.out.in_features,
    }
    hparams = enlarge((model / "hyperparams.yaml").read_text("utf-8"), numbers)
    torch.manual_seed(SEED)
    new = load_hyperpyyaml(hparams)["masknet"]
    grow(old, new)
    with copied_whole(model, out) as partial:
        (partial / "hyperparams.yaml").write_text(hparams, encoding="utf-8")
        weights = partial / "masknet.ckpt"
        kept = torch.load(weights, weights_only=True)["masks.weight"].dtype
        state = new.state_dict()
        torch.save({k: v.to(kept) for k, v in state.items()}, weights)


def enlarge(hparams, numbers):
    """The text of a hyperparams.yaml with other numbers of the masknet."""
    yaml, text = YAML(), io.StringIO()
    yaml.indent(mapping=4, sequence=4, offset=2)
    tree = yaml.load(hparams)
    tree["masknet"].update(numbers)
    yaml.dump(tree, text)
    return text.getvalue()


@torch.no_grad()
def grow(old, new):
    """Let the masknet ``new`` do what ``old`` does, in weights of its own."""
    few, many = len(old.layers), len(new.layers)
    narrow, wide = (net.layers[0].ffn.out.in_features for net in (old, new))
    for name, least, number in (
        ("num_layers", few, many),
        ("d_ffn", narrow, wide),
    ):
        if number < least:
            raise ValueError(f"{name} is {least} or more, what the model has")
    rest = old.state_dict()
    rest = {k: v for k, v in rest.items() if not k.startswith("layers.")}
    new.load_state_dict(rest, strict=False)
    for layer in new.layers:
        for name in OUTS:
            part = layer.get_submodule(name)
            part.weight.zero_()
            part.bias.zero_()
    for i, layer in enumerate(old.layers):
        widen(layer, new.layers[i * many // few])


def widen(old, new):
    """Take over a layer; what its feed-forward has more of adds nothing."""
    narrow, wide = old.ffn.out.in_features, new.ffn.out.in_features
    state = new.state_dict()
    for key, value in old.state_dict().items():
        if key.startswith("ffn.expand"):
            # Gates, then values.
            mine = state[key].unflatten(0, (2, wide))
            mine[:, :narrow] = value.unflatten(0, (2, narrow))
        elif key == "ffn.out.weight":
            state[key][:, :narrow] = value
        else:
            state[key].copy_(value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num_layers", type=int)
    parser.add_argument("--d_ffn", type=int)
    try:
        main(**vars(parser.parse_args()))
    except (OSError, ValueError) as error:
        sys.exit(f"grow_model.py: {error}")
