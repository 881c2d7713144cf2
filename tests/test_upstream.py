"""What SpeechBrain's recipes and maintainers expect of ours.

The facts about SpeechBrain's own recipe were read in its 1.1: a wheel has no
recipes to run them from.
"""

import csv
import re
from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes/WSJ0Mix/separation"
YAMLS = sorted((RECIPE / "hparams").glob("*.yaml"))
PACKAGE = ROOT / "speechbrain_flashformer"

# Every name that SpeechBrain's WSJ0Mix/separation/train.py reads.
READ_UPSTREAM = """
    Encoder MaskNet Decoder modules optimizer loss lr_scheduler epoch_counter
    checkpointer train_logger num_spks sample_rate data_folder output_folder
    save_folder train_data valid_data test_data skip_prep dataloader_opts
    dynamic_mixing base_folder_dm use_speedperturb speed_perturb use_rand_shift
    min_shift max_shift use_wavedrop drop_freq drop_chunk threshold
    threshold_byloss loss_upper_lim clip_grad_norm limit_training_signal_len
    training_signal_len save_audio n_audio_to_save
""".split()


def names(yaml):
    return re.findall(r"^([A-Za-z]\w*):", yaml.read_text(), re.M)


def load(yaml, tmp_path, **overrides):
    overrides = {"output_folder": str(tmp_path), "data_folder": "x"} | overrides
    with open(yaml, encoding="utf-8") as file:
        return load_hyperpyyaml(file, overrides)


@pytest.mark.parametrize("yaml", YAMLS, ids=lambda path: path.stem)
def test_the_recipe_of_speechbrain_finds_all_that_it_reads(yaml, tmp_path):
    hparams = load(yaml, tmp_path)
    assert not set(READ_UPSTREAM) - set(hparams)
    # Its loop: unmasked loss of targets and predictions, one value per item.
    x = torch.randn(3, 800, hparams["num_spks"])
    assert hparams["loss"](x, x + 0.1).shape == (3,)
    assert hparams["optimizer"]([torch.nn.Parameter(x)])


def test_resetting_as_speechbrain_does_leaves_a_network_that_learns(
    reset, tmp_path
):
    hparams = load(YAMLS[0], tmp_path)
    masknet = hparams["MaskNet"]
    reset(masknet)
    mix_w = torch.rand(1, hparams["model"]["N_encoder_out"], 200)
    masks = masknet(mix_w)
    assert masks.isfinite().all() and masks.std() > 0
    masks.sum().backward()
    assert all(p.grad.isfinite().all() for p in masknet.parameters())


def test_every_setting_is_read_where_the_recipe_says():
    script = (RECIPE / "train.py").read_text()
    package = {p.stem: p.read_text() for p in PACKAGE.rglob("*.py")}
    (said,) = re.findall(r"# Where the package.*?\n\n", script, re.S)
    # "# data.dataio_prep: hparams.train_data, ...", over several lines.
    said = said.replace("\n#", " ")
    rooms = re.findall(r"(\w+)\.\w+: ((?:hparams\.\w+(?:,\s+)?)+)", said)
    assert sum(listed.count("hparams.") for _, listed in rooms) == said.count(
        "hparams."
    )
    for room, listed in rooms:
        for name in re.findall(r"hparams\.(\w+)", listed):
            assert re.search(rf'"{name}"|hparams\.{name}\b', package[room]), (
                f"{room}.py does not read {name}"
            )
    for yaml in YAMLS:
        text = yaml.read_text()
        for name in names(yaml):
            # The script reads starter_train as f"starter_{part}".
            quoted = name.removeprefix("starter_")
            used = (
                f'"{quoted}"' in script
                or re.search(rf"hparams\.{name}\b", script)
                or re.search(rf"<{name}\b", text)
                or name in BRAIN_OPTIONS
            )
            assert used, f"{yaml.name}: nobody reads {name}"


# Read by SpeechBrain's Brain itself.
BRAIN_OPTIONS = {
    "max_grad_norm",
    "skip_nonfinite_grads",
    "nonfinite_patience",
    "ckpt_interval_minutes",
    "__set_seed",
}


def test_recipe_table_lists_every_yaml_with_flags_and_files_that_exist():
    with open(ROOT / "tests/recipes/WSJ0Mix.csv", newline="") as file:
        rows = list(csv.DictReader(file, skipinitialspace=True))
    listed = {row["Hparam_file"] for row in rows}
    assert listed == {str(path.relative_to(ROOT)) for path in YAMLS}
    for row in rows:
        assert row["test_debug_flags"]
        for field in ("Script_file", "Hparam_file", "Readme_file"):
            assert (ROOT / row[field]).is_file()


def test_public_functions_say_what_they_do():
    """As SpeechBrain's own check: a docstring wherever a name is public."""
    missing = []
    for path in PACKAGE.rglob("*.py"):
        lines = path.read_text().splitlines()
        for i, line in enumerate(lines):
            match = re.match(r"\s*(?:def|class) ([a-zA-Z]\w*)[(:]", line)
            if not match:
                continue
            end = i
            while not lines[end].rstrip().endswith(":"):
                end += 1
            # Its check passes over lines with three dots.
            if '"""' not in lines[end + 1] or "..." in lines[end + 1]:
                missing.append(f"{path.name}: {match[1]}")
    assert not missing


# Yaml of other SpeechBrain recipes, with the lines that docs/swap.md changes.
SWAPS = re.findall(
    r"<!-- swap: (.*?), input (.*?) -->", (ROOT / "docs/swap.md").read_text()
)


def test_every_change_of_the_page_is_found():
    page = (ROOT / "docs/swap.md").read_text()
    assert len(SWAPS) == page.count("```diff") > 0


@pytest.mark.parametrize("recipe, batch", SWAPS)
def test_the_masknet_swaps_into_other_recipes(recipe, batch):
    page = (ROOT / "docs/swap.md").read_text()
    start = page.index(f"<!-- swap: {recipe}, input")
    diff = page[start:].split("```diff\n")[1].split("```")[0]
    lines = [line[1:] for line in diff.splitlines() if line[:1] in " +"]
    text = "\n".join(lines).replace("/path/to/FlashFormer/", f"{ROOT}/")
    hparams = load_hyperpyyaml(text)
    mix_w = hparams["Encoder"](torch.randn(*map(int, batch.split("x"))))
    masks = hparams["MaskNet"](mix_w)
    assert masks.shape == (hparams["num_spks"], *mix_w.shape)
    assert (masks >= 0).all()
    separated = hparams["Decoder"]((mix_w * masks).flatten(0, 1))
    assert separated.ndim == 2
    gradients = torch.autograd.grad(
        separated.square().sum(), list(hparams["MaskNet"].parameters())
    )
    assert all(gradient.isfinite().all() for gradient in gradients)
