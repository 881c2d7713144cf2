#!/usr/bin/env python3
"""What a trained network leans on: its quality with a part taken away.

> python benchmarks/lesions.py MODEL NAME=FOLDER [NAME=FOLDER ...]

MODEL and sets are as for evaluate_model.py. Nothing is trained again: a network
that never had the part might do without it, so this does not measure what a
part is worth, but a part that is hardly missed is idle. Writes
results/lesions.csv, a row for each change: mean SI-SNRi in dB.
"""

import csv
import sys
from functools import partial
from pathlib import Path

from evaluate_model import score
from models import WITHOUT

from speechbrain_flashformer.inference import FlashFormerSeparation

OUT = Path(__file__).parent / "results" / "lesions.csv"
WINDOWS = (12, 31, 62, 125)  # tokens to each side


def narrow(masknet, tokens):
    """Let attention see so many tokens to each side."""
    for layer in masknet.layers:
        layer.attention.window = (tokens, tokens)


def lesions():
    """What is done to a masknet, by name; nothing first."""
    found = {"none": lambda masknet: None}
    for tokens in WINDOWS:
        seconds = tokens / 125
        found[f"window of {seconds:.2g} s"] = partial(narrow, tokens=tokens)
    return found | {f"without {name}": take for name, take in WITHOUT.items()}


def main(source, sets):
    """Score each lesion on each set, write the rows."""
    rows = []
    for name, change in lesions().items():
        model = FlashFormerSeparation.from_hparams(source)
        change(model.mods.masknet)
        row = {"lesion": name}
        for word in sets:
            title, _, folder = word.partition("=")
            row[title] = score(model, Path(folder))["si-snr_i"]
        rows.append(row)
        print(row, flush=True)
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
