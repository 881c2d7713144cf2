"""The experiments that vary flashformer.yaml: each loads, trains and packs."""

import csv
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_flashformer.inference import FlashFormerSeparation
from speechbrain_flashformer.inference.pack import pack
from speechbrain_flashformer.nnet import layers
from speechbrain_flashformer.nnet.separator import separate

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes/WSJ0Mix/separation"
HPARAMS = RECIPE / "hparams"
SMALL = "{d_model: 32, num_layers: 1, nhead: 2, d_ffn: 32, d_frame: 16}"

spec = importlib.util.spec_from_file_location(
    "experiments", HPARAMS / "experiments.py"
)
experiments = importlib.util.module_from_spec(spec)
spec.loader.exec_module(experiments)
NAMES = list(experiments.EXPERIMENTS)
OURS = [name for name in NAMES if name.startswith("flashformer")]


def small(name):
    """Options that make the model of an experiment small."""
    if name in OURS:
        return ["--model", SMALL]
    sizes = {"N_encoder_out": 16, "nhead": 2, "d_ffn": 16, "chunk_size": 40}
    sizes |= {"num_layers": 1, "transformer_layers": 1}
    return [word for k, v in sizes.items() for word in (f"--{k}", v)]


def parse(name, *options):
    """Hyperparameters as a command line gives them."""
    file, _, overrides = sb.parse_arguments(
        [str(HPARAMS / f"{name}.yaml"), *map(str, options)]
    )
    with open(file, encoding="utf-8") as stream:
        return load_hyperpyyaml(stream, overrides), file, overrides


def model(hparams):
    return [hparams[part] for part in ("Encoder", "MaskNet", "Decoder")]


def test_the_files_are_what_flashformer_yaml_gives_now(tmp_path):
    experiments.write_experiments(tmp_path)
    for name in NAMES:
        written = (tmp_path / f"{name}.yaml").read_text()
        told = "run python hparams/experiments.py"
        assert written == (HPARAMS / f"{name}.yaml").read_text(), told


def test_a_key_that_flashformer_yaml_has_lost_is_told(monkeypatch, tmp_path):
    lost = {"flashformer-x": ("x\n", "/x", {"no_such_key": "no_such_key: 1\n"})}
    monkeypatch.setattr(experiments, "EXPERIMENTS", lost)
    with pytest.raises(ValueError, match="0 keys no_such_key, not 1"):
        experiments.write_experiments(tmp_path)


@pytest.mark.parametrize("name", OURS)
def test_the_command_line_changes_what_it_says(name, tmp_path):
    plain, *_ = parse(name, "--output_folder", tmp_path)
    assert plain["experiment_name"] == name
    options = ["--num_spks", 3, "--batch_size", 7, "--lr", 0.5]
    options += ["--training_signal_len", 800, "--model", SMALL]
    options += ["--output_folder", tmp_path / "there"]
    hparams, *_ = parse(name, *options)
    changed = {
        "num_spks": 3,
        "batch_size": 7,
        "lr": 0.5,
        "training_signal_len": 800,
        "output_folder": str(tmp_path / "there"),
        "save_folder": str(tmp_path / "there" / "save"),
    }
    for key, value in changed.items():
        assert hparams[key] == value
    assert hparams["dataloader_opts"]["batch_size"] == 7
    assert hparams["optimizer"].keywords["lr"] == 0.5
    assert len(hparams["MaskNet"].layers) == 1
    # What was not named stays.
    assert hparams["N_epochs"] == plain["N_epochs"]
    assert hparams["model"]["window"] == plain["model"]["window"]
    assert hparams["modules"]["masknet"] is hparams["MaskNet"]
    mixture = torch.randn(2, 1000)
    assert separate(mixture, *model(hparams)).shape == (2, 1000, 3)
    with pytest.raises(KeyError, match="no_such_key"):
        parse(name, "--no_such_key", 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_goes_through_and_back(name, tmp_path):
    hparams, *_ = parse(name, "--output_folder", tmp_path, *small(name))
    spks = hparams["num_spks"]
    mixture, targets = torch.randn(2, 800), torch.randn(2, 800, spks)
    predictions = separate(mixture, *model(hparams))
    assert predictions.shape == targets.shape
    loss = hparams["loss"](targets, predictions, torch.tensor([1.0, 0.5]))
    loss.mean().backward()
    for module in hparams["modules"].values():
        for parameter in module.parameters():
            assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_what_a_run_leaves_can_be_packed(name, tmp_path):
    output = tmp_path / "run"
    options = ["--output_folder", output, *small(name)]
    hparams, file, overrides = parse(name, *options)
    sb.create_experiment_directory(output, file, overrides, save_env_desc=False)
    hparams["checkpointer"].save_checkpoint(meta={"si-snr": -9.5})
    packed = FlashFormerSeparation.from_hparams(
        str(pack(output, tmp_path / "model"))
    )
    mixture = torch.randn(1, 4000)
    expected = separate(mixture, *(m.eval() for m in model(hparams)))
    torch.testing.assert_close(packed.separate_batch(mixture), expected)


def test_three_speakers():
    assert parse("flashformer-3mix")[0]["num_spks"] == 3


def test_at_16_khz_libri2mix_has_the_same_frames_and_tokens(monkeypatch):
    sizes, real = {}, layers.attend
    for rate in (8000, 16000):
        tokens = []

        def attend(q, *rest, tokens=tokens, **options):
            tokens.append(q.shape[1])
            return real(q, *rest, **options)

        monkeypatch.setattr(layers, "attend", attend)
        options = ["--sample_rate", rate, "--model", SMALL]
        hparams, *_ = parse("flashformer-libri2mix", *options)
        assert hparams["training_signal_len"] == 4 * rate
        assert hparams["model"]["sample_rate"] == rate
        mixture = torch.randn(1, rate // 2)
        frames = hparams["Encoder"](mixture).shape[-1]
        assert separate(mixture, *model(hparams)).shape == (1, rate // 2, 2)
        sizes[rate] = frames, set(tokens)
    assert sizes[8000] == sizes[16000]


def test_the_original_attends_to_every_frame(monkeypatch):
    seen, real = [], layers.attend

    def attend(q, k, v, window=(-1, -1), *rest, **options):
        seen.append((q.shape[1], k.shape[1], window))
        return real(q, k, v, window, *rest, **options)

    monkeypatch.setattr(layers, "attend", attend)
    hparams, *_ = parse("flashformer-original", "--model", SMALL)
    # Longer than flashformer.yaml's window of 2 s.
    mix_w = hparams["Encoder"](torch.randn(1, 20000))
    hparams["MaskNet"](mix_w)
    frames = mix_w.shape[-1]
    assert set(seen) == {(frames, frames, (-1, -1))}


def test_the_large_model_is_the_large_one():
    with open(ROOT / "hparams" / "flashformer-large.yaml") as file:
        large = load_hyperpyyaml(file)
    hparams, *_ = parse("flashformer-large")
    assert hparams["MaskNet"].signature == large["MaskNet"].signature


def test_every_yaml_is_in_the_table_and_in_the_recipe_tests():
    there = {path.name for path in HPARAMS.glob("*.yaml")}
    readme = (RECIPE / "README.md").read_text()
    assert there == set(re.findall(r"^\| `(\S+\.yaml)` \|", readme, re.M))
    with open(ROOT / "tests/recipes/WSJ0Mix.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert there == {Path(row["Hparam_file"]).name for row in rows}
    assert len(rows) == len(there)
    for row in rows:
        for kind in ("Script", "Hparam", "Data_prep", "Readme"):
            assert (ROOT / row[f"{kind}_file"]).is_file()
        # Flags that the yaml does not know would raise.
        name = Path(row["Hparam_file"]).stem
        hparams, *_ = parse(name, *shlex.split(row["test_debug_flags"]))
        assert hparams["N_epochs"] == 2
