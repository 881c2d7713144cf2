#!/usr/bin/env python3
"""Parameters and MACs of every size in hparams/, as a Markdown table.

> python benchmarks/model_sizes.py

MACs of encoder, masknet and decoder, attention products included, per second
of 8 kHz audio.
"""

from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_flashformer.nnet.macs import count_macs
from speechbrain_flashformer.nnet.separator import separate

HPARAMS = Path(__file__).resolve().parent.parent / "hparams"
SECONDS = 16


def main():
    """Print a row for each size."""
    print("| size | parameters (M) | GMAC per second of 8 kHz audio |")
    print("|---|---|---|")
    for size in ("tiny", "streaming", "base", "large"):
        with open(HPARAMS / f"flashformer-{size}.yaml") as file:
            hparams = load_hyperpyyaml(file)
        model = [hparams[part] for part in ("Encoder", "MaskNet", "Decoder")]
        mixture = torch.randn(1, SECONDS * hparams["sample_rate"])
        macs = count_macs(separate, mixture, *model) / 1e9 / SECONDS
        count = sum(p.numel() for part in model for p in part.parameters())
        print(f"| {size} | {count / 1e6:.1f} | {macs:.2f} |")


if __name__ == "__main__":
    main()
