#!/usr/bin/env python3
"""Write the yaml files that differ from another one in a few lines.

> python hparams/experiments.py

HyperPyYAML includes a file below a key, not as a whole, so each experiment is
written out in full: from flashformer.yaml (or flashformer-demo.yaml), with the
keys below replaced. Run it when one of these has changed.
"""

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
BASE = "flashformer.yaml"
# Those that are made from another.
BASES = {"flashformer-streaming": "flashformer-demo.yaml"}
# The data folder that flashformer.yaml takes as its example.
PLACE = "/path/to/wsj0-mix/2speakers"

# File -> its banner, its example, and the text of each key that differs.
EXPERIMENTS = {
    "flashformer-3mix": (
        """\
Model: FlashFormer-base for source separation
Dataset: WSJ0-3mix, or any set of three speakers

Unlike flashformer.yaml: three speakers.
""",
        "/path/to/wsj0-mix/3speakers",
        {"num_spks": "num_spks: 3\n"},
    ),
    "flashformer-wham": (
        """\
Model: FlashFormer-base for source separation
Dataset: WHAM! or WHAMR!, whichever data_folder holds

Unlike flashformer.yaml: mixtures of dynamic mixing have noise too; give it as
dm_noise_folder.
""",
        "/path/to/wham_original",
        {
            "data_options": (
                "data_options: {} # e.g. {mixture: mix_clean}, see README\n"
            ),
            # As loud as the corpus has it.
            "dm_noise_snr": (
                "dm_noise_snr: [-6, 3] # dB, loudest speaker to noise\n"
            ),
            "dm_noise_share": (
                "dm_noise_share: 1.0 # share of the mixtures with noise in "
                "them\n"
            ),
        },
    ),
    "flashformer-libri2mix": (
        """\
Model: FlashFormer-base for source separation
Dataset: Libri2Mix, or with num_spks: 3 Libri3Mix

Unlike flashformer.yaml: sample_rate may be 8000 or 16000; frames, tokens and
cuts are of the same seconds.
""",
        "/path/to/Libri2Mix",
        {
            "data_options": (
                "# E.g. {parts: [train-100, dev, test], mixture: mix_both}\n"
                "data_options: {}\n"
            ),
            "training_signal_len": (
                "training_signal_len: !ref <sample_rate> * 4 # samples: 4 s\n"
            ),
            "model": """\
model: !include:../../../../hparams/flashformer-base.yaml
    num_spks: !ref <num_spks>
    sample_rate: !ref <sample_rate>
    kernel_size: !ref <sample_rate> // 500 # samples: 2 ms
""",
        },
    ),
    "flashformer-large": (
        """\
Model: FlashFormer-large for source separation
Dataset: WSJ0-2mix, or any set in its layout

Unlike flashformer.yaml: the large model.
""",
        PLACE,
        {
            "model": """\
model: !include:../../../../hparams/flashformer-large.yaml
    num_spks: !ref <num_spks>
    sample_rate: !ref <sample_rate>
"""
        },
    ),
    "flashformer-streaming": (
        """\
Model: FlashFormer-streaming, separates live audio with 10 ms of latency
Dataset: WSJ0-2mix, or any set in its layout; on the starter set of
synthetic voices it learns in minutes, as the demo does

Unlike flashformer-demo.yaml: the streaming model. For a set of hours:
--N_epochs 100 --training_signal_len 32000
""",
        PLACE,
        {
            "data_folder": 'data_folder: "" # must be given\n',
            "model": """\
model: !include:../../../../hparams/flashformer-streaming.yaml
    num_spks: !ref <num_spks>
    sample_rate: !ref <sample_rate>
""",
        },
    ),
    "flashformer-original": (
        """\
Model: FlashFormer-base as it was first drawn, for source separation
Dataset: WSJ0-2mix, or any set in its layout

Unlike flashformer.yaml: attention over every frame, with no window. Eight
times the tokens, so slower and larger.
""",
        PLACE,
        {
            "model": """\
model: !include:../../../../hparams/flashformer-base.yaml
    num_spks: !ref <num_spks>
    sample_rate: !ref <sample_rate>
    token_stride: 1 # frames per token: 1000 tokens per second at 8 kHz
    window: null
"""
        },
    ),
}


def write_experiments(folder=HERE):
    """Write every experiment into a folder, from the base beside this file.

    Raises
    ------
    ValueError
        When the base has not the key that an experiment replaces.
    """
    for name, (banner, place, keys) in EXPERIMENTS.items():
        base = HERE / BASES.get(name, BASE)
        text = base.read_text(encoding="utf-8")
        text = _replace_banner(text, banner).replace(PLACE, place)
        keys = {"experiment_name": f"experiment_name: {name}\n", **keys}
        for key, block in keys.items():
            text = _replace_key(text, key, block)
        Path(folder, f"{name}.yaml").write_text(text, encoding="utf-8")


def _replace_banner(text, banner):
    rule = "# " + "#" * 32
    lines = "".join(f"# {line}".rstrip() + "\n" for line in banner.splitlines())
    _, rest = re.split(rf"\A{rule}\n(?:#.*\n)*?{rule}\n", text)
    return f"{rule}\n{lines}{rule}\n{rest}"


def _replace_key(text, key, block):
    """Put the text of a key of the first level in place of what is there."""
    there = re.compile(rf"^{key}:.*\n(?:[ \t]+\S.*\n)*", re.MULTILINE)
    text, count = there.subn(lambda _: block, text)
    if count != 1:
        raise ValueError(
            f"the yaml to start from has {count} keys {key}, not 1"
        )
    return text


if __name__ == "__main__":
    write_experiments()
