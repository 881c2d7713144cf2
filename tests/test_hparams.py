"""The yaml files: each size loads alone, fits its budget, drops in anywhere."""

import importlib.util
import io
from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_flashformer import FlashFormer, build
from speechbrain_flashformer.nnet.macs import count_macs
from speechbrain_flashformer.nnet.separator import separate
from speechbrain_flashformer.nnet.streaming import StreamingSeparator

ROOT = Path(__file__).parent.parent
# GMAC per second of 8 kHz audio.
BUDGET = {"tiny": 0.4, "streaming": 0.4, "base": 4.0, "large": 20.0}


def load(path, overrides=None):
    with open(path, encoding="utf-8") as file:
        return load_hyperpyyaml(file, overrides)


def size(name):
    return ROOT / "hparams" / f"flashformer-{name}.yaml"


@pytest.mark.parametrize("name", BUDGET)
def test_each_size_loads_alone_and_fits_its_budget(name):
    hparams = load(size(name))
    assert isinstance(hparams["MaskNet"], FlashFormer)
    assert hparams["num_spks"] == 2 and hparams["sample_rate"] == 8000
    model = [hparams[part] for part in ("Encoder", "MaskNet", "Decoder")]
    seconds = 16
    mixture = torch.randn(1, seconds * 8000)
    macs = count_macs(separate, mixture, *model) / 1e9 / seconds
    assert macs <= BUDGET[name]
    count = sum(p.numel() for part in model for p in part.parameters()) / 1e6
    row = f"| {name} | {count:.1f} | {macs:.2f} |"
    assert row in (ROOT / "docs/architecture.md").read_text("utf-8")


@pytest.mark.parametrize("name", BUDGET)
def test_each_size_begins_as_a_fourier_transform_and_back(name):
    hparams = load(size(name))
    mixture = torch.randn(1, 1600)
    back = hparams["Decoder"](hparams["Encoder"](mixture))
    inner = slice(16, -16)
    torch.testing.assert_close(
        back[:, inner], mixture[:, inner], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", BUDGET)
def test_every_number_can_be_overridden(name):
    numbers = {
        "num_spks": 3,
        "sample_rate": 16000,
        "N_encoder_out": 68,
        "kernel_size": 32,
        "d_model": 32,
        "num_layers": 1,
        "nhead": 2,
        "d_ffn": 40,
        "d_frame": 16,
        "token_stride": 4,
        "window": None,
        "lookback": 3,
        "lookahead": 1,
        "dilations": [1],
        "dropout": 0.1,
        "attention_backend": "sdpa",
        "checkpointing": True,
        "causal": True,
        "lookahead_ms": 8,
        "norm_span": 1000,
    }
    hparams = load(size(name), numbers)
    for key, value in numbers.items():
        assert hparams[key] == value
    model = [hparams[part] for part in ("Encoder", "MaskNet", "Decoder")]
    assert separate(torch.randn(1, 500), *model).shape == (1, 500, 3)
    # A token is 4 frames of 16 samples, 4 ms.
    assert hparams["MaskNet"].future_tokens == 2
    # And nothing else is a number of the model.
    plain = {key for key, value in hparams.items() if not callable(value)}
    assert plain == {*numbers, "kernel_stride", "future_tokens"}


def test_the_streaming_size_answers_within_16_ms():
    hparams = load(size("streaming"))
    parts = (hparams[part] for part in ("Encoder", "MaskNet", "Decoder"))
    latency = StreamingSeparator(*parts).latency
    assert latency / hparams["sample_rate"] <= 0.016


@pytest.mark.parametrize("lookahead_ms", [0, 8, 24])
def test_lookahead_is_latency(lookahead_ms):
    hparams = load(size("streaming"), {"lookahead_ms": lookahead_ms})
    parts = (hparams[part] for part in ("Encoder", "MaskNet", "Decoder"))
    latency = StreamingSeparator(*parts).latency
    assert 1000 * latency / hparams["sample_rate"] == 10 + lookahead_ms


@pytest.mark.parametrize("lookahead_ms", [10, -8, 0.5])
def test_lookahead_is_whole_tokens(lookahead_ms):
    with pytest.raises(ValueError, match="a token is 8 ms: take"):
        load(size("streaming"), {"lookahead_ms": lookahead_ms})


def test_one_include_drops_the_masknet_into_another_recipe(tmp_path):
    recipe = io.StringIO(
        f"flashformer: !include:{size('tiny')} {{N_encoder_out: 64}}\n"
        "MaskNet: !ref <flashformer[MaskNet]>\n"
        "Encoder: !new:speechbrain.lobes.models.dual_path.Encoder\n"
        "    kernel_size: 16\n"
        "    out_channels: 64\n"
    )
    recipe.name = str(tmp_path / "recipe.yaml")
    hparams = load_hyperpyyaml(recipe)
    masks = hparams["MaskNet"](hparams["Encoder"](torch.randn(1, 800)))
    assert masks.shape == (2, 1, 64, 99)


def test_the_yaml_files_are_in_the_package():
    spec = importlib.util.find_spec("speechbrain_flashformer.hparams")
    folder = Path(next(iter(spec.submodule_search_locations)))
    for name in BUDGET:
        packed = folder / f"flashformer-{name}.yaml"
        assert packed.read_text() == size(name).read_text()


def test_inference_yaml_is_what_speechbrain_loads():
    hparams = load(ROOT / "hparams" / "inference.yaml")
    parts = {"encoder", "masknet", "decoder"}
    assert set(hparams["modules"]) == parts
    assert set(hparams["pretrainer"].loadables) == parts
    for part in parts:
        assert hparams["pretrainer"].loadables[part] is hparams["modules"][part]
    assert hparams["num_spks"] == 2 and hparams["sample_rate"] == 8000


def test_build_makes_what_the_yaml_says(tmp_path):
    torch.manual_seed(0)
    model = build("tiny", num_spks=3, num_layers=1).eval()
    path = tmp_path / "mine.yaml"
    path.write_text(size("tiny").read_text())
    torch.manual_seed(0)
    same = build(path, num_spks=3, num_layers=1).eval()
    assert len(model.masknet.layers) == 1
    mixture = torch.randn(2, 4000)
    lengths = torch.tensor([1.0, 0.5])
    sources = model(mixture, lengths)
    assert sources.shape == (2, 4000, 3)
    assert torch.equal(sources, same(mixture, lengths))
    parts = model.encoder, model.masknet, model.decoder
    assert torch.equal(sources, separate(mixture, *parts, lengths))


def test_build_names_what_is_wrong():
    with pytest.raises(ValueError, match="no size 'huge': give one of tiny"):
        build("huge")
    with pytest.raises(ValueError, match="Override 'layers' not found"):
        build("tiny", layers=3)


def test_the_masknet_is_base_by_default():
    theirs, ours = build("base").masknet, FlashFormer()
    shapes = [
        {name: value.shape for name, value in net.state_dict().items()}
        for net in (theirs, ours)
    ]
    assert shapes[0] == shapes[1]
    assert ours.receptive_field == theirs.receptive_field
