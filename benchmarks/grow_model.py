#!/usr/bin/env python3
"""Give a packed model more layers and wider feed-forwards, to train it on.

> python benchmarks/grow_model.py MODEL OUT LAYERS D_FFN

OUT separates exactly as MODEL does: what is new adds nothing until it has
learned to. New layers stand evenly between the old ones. The recipe trains OUT
with ``--start_from OUT --model "{num_layers: LAYERS, d_ffn: D_FFN}"``. Source:
Net2Net (arXiv:1511.05641), but with zeros behind what is new in place of
copies.
"""

import re
import shutil
import sys
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml

SEED = 0
# The last product of each part of a layer that is added to what comes in.
OUTS = ("attention.out", "fsmn.out", "ffn.out")


def main(model, out, layers, d_ffn):
    """Write OUT, all at once."""
    if out.exists():
        raise FileExistsError(f"{out} exists: remove it or name another")
    yaml = (model / "hyperparams.yaml").read_text(encoding="utf-8")
    old = load_hyperpyyaml(yaml)["masknet"]
    old.load_state_dict(torch.load(model / "masknet.ckpt", weights_only=True))
    for key, number in (("num_layers", layers), ("d_ffn", d_ffn)):
        yaml = re.sub(rf"(?m)^( +{key}: ).*$", rf"\g<1>{number}", yaml)
    torch.manual_seed(SEED)
    new = load_hyperpyyaml(yaml)["masknet"]
    grow(old, new)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(model, partial)
        (partial / "hyperparams.yaml").write_text(yaml, encoding="utf-8")
        state = {key: value.half() for key, value in new.state_dict().items()}
        torch.save(state, partial / "masknet.ckpt")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@torch.no_grad()
def grow(old, new):
    """Let the masknet ``new`` do what ``old`` does, in weights of its own."""
    few, many = len(old.layers), len(new.layers)
    narrow, wide = (net.layers[0].ffn.out.in_features for net in (old, new))
    for name, less, more in (
        ("LAYERS", few, many),
        ("D_FFN", narrow, wide),
    ):
        if more < less:
            raise ValueError(f"{name} is {less} or more, what the model has")
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
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    try:
        main(*map(Path, sys.argv[1:3]), *map(int, sys.argv[3:]))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
