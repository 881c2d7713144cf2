#!/usr/bin/env python3
"""Mean the weights of two packed models, of which one began as the other.

> python benchmarks/mean_weights.py A B OUT SHARE

OUT is then a packed model with SHARE (0 to 1) of the weights of B and the rest
of A; its card and numbers are those of B. Source: model soups
(arXiv:2203.05482).
"""

import sys
from pathlib import Path

import torch
from records import copied_whole

from speechbrain_flashformer.nnet.separator import MODULES


def main(a, b, out, share):
    """Write OUT, all at once."""
    if not 0 <= share <= 1:
        raise ValueError(f"SHARE is between 0 and 1, got {share}")
    with copied_whole(b, out) as partial:
        for name in MODULES:
            first, second = (
                torch.load(folder / f"{name}.ckpt", weights_only=True)
                for folder in (a, b)
            )
            torch.save(mean(first, second, share), partial / f"{name}.ckpt")


def mean(first, second, share):
    """State dict with a share of the second; types are the second's."""
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


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    try:
        main(*map(Path, sys.argv[1:4]), float(sys.argv[4]))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
