#!/usr/bin/env python3
"""What a trained network leans on: its quality with a part taken away.

> python benchmarks/lesions.py MODEL NAME=FOLDER [NAME=FOLDER ...]

MODEL and sets are as for evaluate_model.py. Nothing is trained again: a network
that never had the part might do without it, so this does not measure what a
part is worth, but a part that is hardly missed is idle. Not for causal models.
Writes results/lesions.csv, a row for each change: mean SI-SNRi in dB.
"""

import tempfile
from functools import partial
from pathlib import Path

from evaluate_model import command, find_sets, score
from models import WITHOUT
from records import write_csv

from speechbrain_flashformer.inference import FlashFormerSeparation
from speechbrain_flashformer.nnet.separator import encoder_frame

OUT = Path(__file__).parent / "results" / "lesions.csv"
WINDOWS = (0.1, 0.25, 0.5, 1)  # seconds to each side


def narrow(masknet, tokens):
    """Let attention see at most so many tokens to each side."""
    for layer in masknet.layers:
        layer.attention.window = tuple(
            tokens if side < 0 else min(side, tokens)
            for side in layer.attention.window
        )


def lesions(token_rate):
    """What is done to a masknet, by name; nothing first."""
    found = {"none": lambda masknet: None}
    for seconds in WINDOWS:
        tokens = round(seconds * token_rate)
        found[f"window of {seconds} s"] = partial(narrow, tokens=tokens)
    return found | {f"without {name}": take for name, take in WITHOUT.items()}


def main(source, sets):
    """Score each lesion on each set, write the rows."""
    model = FlashFormerSeparation.from_hparams(source)
    if model.mods.masknet.causal:
        raise ValueError(f"{source} is causal: its windows have no two sides")
    _, stride = encoder_frame(model.mods.encoder)
    token = stride * model.mods.masknet.token_stride
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        sets = find_sets(sets, Path(scratch))
        for name, change in lesions(model.hparams.sample_rate / token).items():
            model = FlashFormerSeparation.from_hparams(source)
            change(model.mods.masknet)
            row = {"lesion": name}
            for title, folder in sets:
                row[title] = score(model, folder)["si-snr_i"]
            rows.append(row)
            print(row, flush=True)
    write_csv(OUT, rows)


if __name__ == "__main__":
    command(__doc__, main)
