#!/usr/bin/env python3
"""Generate the yaml files of experiments from a base yaml file.

> python hparams/experiments.py

HyperPyYAML can include a file only below a key. Each experiment is therefore a
complete file: flashformer.yaml (or flashformer-demo.yaml) with the keys below
replaced. Run this script after a change of a base file or of this script.
"""

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
BASE = "flashformer.yaml"
# Experiments with another base.
BASES = {"flashformer-streaming": "flashformer-demo.yaml"}
# The example of a data folder in flashformer.yaml.
PLACE = "/path/to/wsj0-mix/2speakers"

# File -> banner, example of a data folder, and the text of each changed key.
EXPERIMENTS = {
    "flashformer-3mix": (
        """\
Model: FlashFormer-base for source separation
Dataset: WSJ0-3mix, or any set of three speakers

Differences from flashformer.yaml: three speakers.
""",
        "/path/to/wsj0-mix/3speakers",
        {"num_spks": "num_spks: 3\n"},
    ),
    "flashformer-wham": (
        """\
Model: FlashFormer-base for source separation
Dataset: WHAM! or WHAMR!, as found in data_folder

Differences from flashformer.yaml: dynamic mixing adds noise, from recordings
in dm_noise_folder.
""",
        "/path/to/wham_original",
        {
            "data_options": (
                "data_options: {} # such as {mixture: mix_clean}, see README\n"
            ),
            # The levels of the corpus.
            "    noise": """\
    noise: !new:speechbrain_flashformer.training.effects.Noise
        share: 1.0
        snr_db: [-6, 3] # range of the ratio of loudest speaker to noise
        folder: !ref <dm_noise_folder>
""",
        },
    ),
    "flashformer-libri2mix": (
        """\
Model: FlashFormer-base for source separation
Dataset: Libri2Mix, or Libri3Mix with num_spks: 3

Differences from flashformer.yaml: sample_rate may be 8000 or 16000; frames,
tokens and excerpts have the same duration at both.
""",
        "/path/to/Libri2Mix",
        {
            "data_options": (
                "# Such as {parts: [train-100, dev, test], mixture: mix_both}\n"
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

Differences from flashformer.yaml: the large model.
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
Model: FlashFormer-streaming, for live audio with 10 ms of latency
Dataset: WSJ0-2mix, or any set in its layout; training on the starter set of
synthetic voices takes minutes, as in the demo

Differences from flashformer-demo.yaml: the streaming model. For hours of
data: --N_epochs 100 --training_signal_len 32000
""",
        PLACE,
        {
            "data_folder": 'data_folder: "" # required\n',
            "model": """\
model: !include:../../../../hparams/flashformer-streaming.yaml
    num_spks: !ref <num_spks>
    sample_rate: !ref <sample_rate>
""",
        },
    ),
    "flashformer-original": (
        """\
Model: FlashFormer-base in its original form, for source separation
Dataset: WSJ0-2mix, or any set in its layout

Differences from flashformer.yaml: attention over every frame, without a
window. Eight times as many tokens make it slower, and it needs more memory.
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
    "sepformer": (
        """\
Model: SpeechBrain's SepFormer (arXiv:2010.13154) for source separation
Dataset: WSJ0-2mix, or any set in its layout

Differences from flashformer.yaml: encoder, masknet and decoder, and the
training parameters, which are those of SpeechBrain's recipe. Other masknets of
SpeechBrain can be used in the same way.
""",
        PLACE,
        {
            "avg_checkpoints": "avg_checkpoints: 1\n",
            "batch_size": "batch_size: 1\n",
            "lr": "lr: 0.00015\n",
            "weight_decay": "weight_decay: 0\n",
            "warmup_steps": "warmup_steps: 0\n",
            "lr_patience": (
                "lr_patience: 2 # epochs without improvement until lr is "
                "halved\n"
            ),
            "dont_halve_until_epoch": "dont_halve_until_epoch: 85\n",
            "limit_training_signal_len": "limit_training_signal_len: False\n",
            "model": """\
# Model: change a parameter by its name, for example --num_layers 1
N_encoder_out: 256
kernel_size: 16
kernel_stride: !ref <kernel_size> // 2
num_layers: 2 # repetitions of both transformers
chunk_size: 250 # frames
transformer_layers: 8
nhead: 8
d_ffn: 1024
dropout: 0

# Transformers within chunks (intra) and across chunks (inter).
intra_model: !new:speechbrain.lobes.models.dual_path.SBTransformerBlock
    num_layers: !ref <transformer_layers>
    d_model: !ref <N_encoder_out>
    nhead: !ref <nhead>
    d_ffn: !ref <d_ffn>
    dropout: !ref <dropout>
    use_positional_encoding: True
    norm_before: True

inter_model: !new:speechbrain.lobes.models.dual_path.SBTransformerBlock
    num_layers: !ref <transformer_layers>
    d_model: !ref <N_encoder_out>
    nhead: !ref <nhead>
    d_ffn: !ref <d_ffn>
    dropout: !ref <dropout>
    use_positional_encoding: True
    norm_before: True
""",
            "Encoder": """\
Encoder: !new:speechbrain.lobes.models.dual_path.Encoder
    kernel_size: !ref <kernel_size>
    out_channels: !ref <N_encoder_out>

""",
            "MaskNet": """\
MaskNet: !new:speechbrain.lobes.models.dual_path.Dual_Path_Model
    num_spks: !ref <num_spks>
    in_channels: !ref <N_encoder_out>
    out_channels: !ref <N_encoder_out>
    num_layers: !ref <num_layers>
    K: !ref <chunk_size>
    intra_model: !ref <intra_model>
    inter_model: !ref <inter_model>
    norm: ln
    linear_layer_after_inter_intra: False
    skip_around_intra: True

""",
            "Decoder": """\
Decoder: !new:speechbrain.lobes.models.dual_path.Decoder
    in_channels: !ref <N_encoder_out>
    out_channels: 1
    kernel_size: !ref <kernel_size>
    stride: !ref <kernel_stride>
    bias: False
""",
            "optimizer": """\
# Optimizer, loss, schedule
optimizer: !name:torch.optim.Adam
    lr: !ref <lr>
    weight_decay: !ref <weight_decay>
""",
            "matrix_optimizer": "",
        },
    ),
}


def write_experiments(folder=HERE):
    """Write all experiments, from the base files next to this script.

    Arguments
    ---------
    folder : str or Path
        Folder for the yaml files.

    Raises
    ------
    ValueError
        If a base file lacks a key that an experiment replaces.
    """
    for name, (banner, place, keys) in EXPERIMENTS.items():
        base = HERE / BASES.get(name, BASE)
        text = base.read_text(encoding="utf-8")
        text = _replace_banner(text, banner).replace(PLACE, place)
        keys = {"experiment_name": f"experiment_name: {name}\n", **keys}
        for key, block in keys.items():
            text = _replace_key(text, key, block)
        text = re.sub(r"\n{3,}", "\n\n", text)
        Path(folder, f"{name}.yaml").write_text(text, encoding="utf-8")


def _replace_banner(text, banner):
    rule = "# " + "#" * 32
    lines = "".join(f"# {line}".rstrip() + "\n" for line in banner.splitlines())
    _, rest = re.split(rf"\A{rule}\n(?:#.*\n)*?{rule}\n", text)
    return f"{rule}\n{lines}{rule}\n{rest}"


def _replace_key(text, key, block):
    """Replace a key, with its indented lines, by a block of text.

    A block that starts with a comment also replaces the comment above the key.
    """
    above = r"(?:#.*\n)*" if block.startswith("#") else ""
    indent = " " * (len(key) - len(key.lstrip()))
    below = rf"(?:{indent}[ \t]+\S.*\n)*"
    pattern = re.compile(rf"^{above}{key}:.*\n{below}", re.MULTILINE)
    text, count = pattern.subn(lambda _: block, text)
    if count != 1:
        raise ValueError(
            f"the yaml to start from has {count} keys {key}, not 1"
        )
    return text


if __name__ == "__main__":
    write_experiments()
