"""SpeechBrain's masknets in our recipe: by yaml alone, from data to audio."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import soundfile
import torch
import train
from speechbrain.lobes.models.dual_path import Decoder, Encoder

from speechbrain_flashformer.inference import FlashFormerSeparation
from speechbrain_flashformer.inference.pack import pack
from speechbrain_flashformer.nnet.separator import separate

HPARAMS = Path(train.__file__).parent / "hparams"
SEPFORMER = """\
MaskNet: !new:speechbrain.lobes.models.dual_path.Dual_Path_Model
    num_spks: 2
    in_channels: 16
    out_channels: 16
    num_layers: 1
    K: 40
    intra_model: !new:speechbrain.lobes.models.dual_path.SBTransformerBlock
        num_layers: 1
        d_model: 16
        nhead: 2
        d_ffn: 16
    inter_model: !new:speechbrain.lobes.models.dual_path.SBTransformerBlock
        num_layers: 1
        d_model: 16
        nhead: 2
        d_ffn: 16
"""
CONV_TASNET = """\
MaskNet: !new:speechbrain.lobes.models.conv_tasnet.MaskNet
    N: 16
    B: 16
    H: 16
    P: 3
    X: 2
    R: 1
    C: 2
    norm_type: gLN
    causal: False
    mask_nonlinear: relu
"""
MODULE = "speechbrain.lobes.models.resepformer"
RE_SEPFORMER = f"""\
MaskNet: !new:{MODULE}.ResourceEfficientSeparator
    input_dim: 16
    num_spk: 2
    causal: False
    unit: 16
    segment_size: 40
    layer: 1
    mem_type: av
    seg_model: !new:{MODULE}.SBTransformerBlock_wnormandskip
        num_layers: 1
        d_model: 16
        nhead: 2
        d_ffn: 16
    mem_model: !new:{MODULE}.SBTransformerBlock_wnormandskip
        num_layers: 1
        d_model: 16
        nhead: 2
        d_ffn: 16
"""
SKIM = f"""\
MaskNet: !new:{MODULE}.ResourceEfficientSeparator
    input_dim: 16
    num_spk: 2
    causal: False
    unit: 16
    segment_size: 40
    layer: 2
    mem_type: hc
    seg_model: !new:{MODULE}.SegLSTM
        input_size: 16
        hidden_size: 16
        bidirectional: True
        norm_type: gln
    mem_model: !new:{MODULE}.MemLSTM
        hidden_size: 16
        bidirectional: True
        norm_type: gln
        mem_type: hc
"""
MASKNETS = {
    "SepFormer": SEPFORMER,
    "Conv-TasNet": CONV_TASNET,
    "RE-SepFormer": RE_SEPFORMER,
    "SkiM": SKIM,
}


@pytest.fixture
def run(noise_mixtures, tmp_path, monkeypatch):
    """The recipe, in this process, with another masknet in its yaml."""
    spec = importlib.util.spec_from_file_location(
        "experiments", HPARAMS / "experiments.py"
    )
    experiments = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiments)

    def call(masknet, *options):
        text = (HPARAMS / "sepformer.yaml").read_text(encoding="utf-8")
        text = experiments._replace_key(text, "MaskNet", masknet)
        yaml, output = tmp_path / "other.yaml", tmp_path / "run"
        yaml.write_text(text, encoding="utf-8")
        words = ["train.py", yaml, "--output_folder", output]
        words += ["--data_folder", noise_mixtures, "--N_encoder_out", 16]
        words += ["--limit_training_signal_len", True]
        words += ["--training_signal_len", 4000, "--batch_size", 2]
        words += ["--num_workers", 0, "--device", "cpu", "--noprogressbar"]
        monkeypatch.setattr(sys, "argv", [*map(str, (*words, *options))])
        train.main()
        return output

    return call


@pytest.mark.parametrize("name", MASKNETS)
def test_it_trains_resumes_tests_and_packs(name, run, noise_mixtures, tmp_path):
    masknet = MASKNETS[name]
    run(masknet, "--N_epochs", 1)
    output = run(masknet, "--N_epochs", 2)
    log = (output / "train_log.txt").read_text().splitlines()
    assert [line.split(",")[0] for line in log if "train" in line] == [
        "epoch: 1",
        "epoch: 2",
    ]
    (output / "test_results.csv").unlink()
    run(masknet, "--N_epochs", 2, "--test_only")
    with open(output / "test_results.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 1 + 3

    model = FlashFormerSeparation.from_hparams(pack(output, tmp_path / "model"))
    (mixture, *_) = sorted((noise_mixtures / "wav8k/min/tt/mix").glob("*.wav"))
    # In chunks too, of which the last is short.
    sources = model.separate_file(mixture, chunk=1.0, overlap=0.2)
    frames = soundfile.info(mixture).frames
    assert sources.shape == (1, frames, 2) and sources.isfinite().all()
    with pytest.raises(ValueError, match="take 'chunk'"):
        model.separate_file(mixture, norm="recording")
    assert "GMAC" in model.describe()["compute"]


class Plain(torch.nn.Module):
    """Takes the encoder's output and nothing else, as SpeechBrain's do."""

    def forward(self, mix_w):
        return torch.stack([mix_w, mix_w]).sigmoid()


class Curious(Plain):
    """Takes what it is given beside that."""

    def forward(self, mix_w, lengths=None, statistics=None):
        self.given = lengths, statistics
        return super().forward(mix_w)


def test_a_masknet_is_given_what_it_takes():
    encoder = Encoder(kernel_size=16, out_channels=12)
    decoder = Decoder(12, 1, kernel_size=16, stride=8, bias=False)
    mixture, lengths = torch.randn(2, 800), torch.tensor([1.0, 0.5])
    statistics = torch.zeros(2), torch.ones(2)
    for options in ({}, {"lengths": lengths}, {"statistics": statistics}):
        plain, curious = Plain(), Curious()
        wrapped = torch.nn.DataParallel(curious)
        parts = [
            separate(mixture, encoder, masknet, decoder, **options)
            for masknet in (plain, curious, wrapped)
        ]
        assert all(torch.equal(parts[0], part) for part in parts)
        given_lengths, given_statistics = curious.given
        assert (given_lengths is not None) == ("lengths" in options)
        assert given_statistics is options.get("statistics")
    padded = separate(mixture, encoder, plain, decoder, lengths)
    assert not padded[1, 400:].any()
