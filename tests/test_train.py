"""The command line of the recipe: its options, and what data it accepts."""

import shutil
import sys
from pathlib import Path

import pytest
import speechbrain as sb
import torch
from speechbrain.nnet.schedulers import WarmCoolDecayLRSchedule

from speechbrain_flashformer import FlashFormer
from speechbrain_flashformer.training import locks
from speechbrain_flashformer.training.data import EpochSampler
from speechbrain_flashformer.training.schedules import (
    steps_per_epoch,
    stretch_schedule,
)

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes/WSJ0Mix/separation"
YAMLS = sorted((RECIPE / "hparams").glob("*.yaml"))
sys.path.insert(0, str(RECIPE))

import train  # noqa: E402


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the recipe where it must not come as far as the training."""

    def start(*arguments, yaml="flashformer"):
        path = RECIPE / "hparams" / f"{yaml}.yaml"
        monkeypatch.setattr(sys, "argv", ["train.py", str(path), *arguments])
        train.main()

    def stop(*args, **kwargs):
        raise AssertionError("it has begun")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.sb, "create_experiment_directory", stop)
    return start


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "data_folder is empty: give --data_folder PATH"),
        (["--data_folder", ""], "data_folder is empty: give --data_folder"),
        (["--data_folder="], "data_folder is empty: give --data_folder PATH"),
        (
            ["--data_folder", "nowhere"],
            "is no data_folder nowhere: give --data",
        ),
        (["--data_folder", "here"], "data_folder here is empty: give"),
        (["--data_folder", "2024"], "is no data_folder 2024: give"),
        (["--data_foldr", "here"], "'data_foldr' not found in"),
        (["--output_folder", "caf\udce9"], r"output_folder 'caf\udce9' is not"),
        (["--model", "{a: "], "cannot read the options: "),
    ],
)
def test_no_data_ends_it_in_one_line(run, tmp_path, options, message):
    (tmp_path / "here").mkdir()
    with pytest.raises(SystemExit) as raised:
        run(*options)
    assert message in raised.value.code
    assert len(raised.value.code.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_metric_that_there_is_not_ends_it_in_one_line(run, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a").touch()
    with pytest.raises(SystemExit, match=r"flashformer.yaml: .*mos"):
        run("--data_folder", "here", "--more_metrics", "[mos]")


def test_an_option_without_a_value_ends_it(run, capsys):
    # What the shell leaves of --data_folder $UNSET.
    with pytest.raises(SystemExit):
        run("--data_folder", "--seed", "1")
    assert "--data_folder: expected one argument" in capsys.readouterr().err


def test_a_folder_that_is_called_voices_has_a_path(run, tmp_path):
    (tmp_path / "voices").mkdir()
    with pytest.raises(SystemExit) as raised:
        run("--data_folder", "./voices")
    assert "data_folder ./voices is empty" in raised.value.code
    # Never synthetic voices in place of somebody's own.
    with pytest.raises(SystemExit) as raised:
        run("--data_folder", "voices")
    assert "say ./voices to train on it" in raised.value.code
    (tmp_path / "voices").rmdir()
    with pytest.raises(AssertionError, match="it has begun"):
        run("--data_folder", "voices")


def test_speech_that_cannot_be_listed_ends_it_in_one_line(
    run, tmp_path, monkeypatch, noise_mixtures
):
    (tmp_path / "speech.csv").write_bytes(b"wav,speaker\na.wav,Jos\xe9\n")
    (tmp_path / "run/save").mkdir(parents=True)
    monkeypatch.setattr(
        train.sb, "create_experiment_directory", lambda **_: None
    )
    told = []
    monkeypatch.setattr(train.logger, "error", told.append)
    with pytest.raises(SystemExit):
        run(
            *("--data_folder", str(noise_mixtures), "--output_folder", "run"),
            *("--dynamic_mixing", "True", "--base_folder_dm", "speech.csv"),
        )
    assert "speech.csv is not UTF-8 text" in str(told[0])


@pytest.mark.skipif(locks.fcntl is None, reason="no locks of folders here")
def test_a_folder_has_one_training(run, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a").touch()
    options = "--data_folder", "here", "--output_folder", "run"
    (tmp_path / "run/save").mkdir(parents=True)
    with locks.locked(tmp_path / "run/save"):
        with pytest.raises(SystemExit) as raised:
            run(*options)
    assert "another training is writing into run/save: " in raised.value.code
    for _ in range(2):  # an earlier training has released the folder
        with pytest.raises(AssertionError, match="it has begun"):
            run(*options)


@pytest.mark.parametrize("yaml", YAMLS, ids=lambda path: path.stem)
def test_only_the_demo_makes_voices_unasked(run, yaml):
    demo = yaml.stem == "flashformer-demo"
    with pytest.raises(AssertionError if demo else SystemExit):
        run(yaml=yaml.stem)


@pytest.mark.parametrize(
    "name", ["2024", "007", "1e3", "no", "~", "a: b", "a=b", "x #1", "[1]"]
)
def test_paths_are_taken_as_they_were_typed(name, tmp_path, monkeypatch):
    options = [str(YAMLS[0]), "--batch_size", "3"]
    for key in train.PATHS:
        options += [f"--{key}", name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / name / "wav8k").mkdir(parents=True)
    file, _, overrides = train.parse_arguments(options)
    hparams = train.load_settings(file, overrides)
    assert {hparams[key] for key in train.PATHS} == {name}
    assert hparams["save_folder"] == f"{name}/save"
    assert hparams["batch_size"] == 3


class Dataset(list):
    """Whose items are numbers, as torch needs them."""


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("gathered", [1, 2])
@pytest.mark.parametrize("items, ranks", [(10, 1), (12, 1), (19, 2)])
def test_a_schedule_ends_with_the_last_step(
    monkeypatch, items, ranks, gathered, drop_last
):
    brain = sb.Brain(
        {"layer": torch.nn.Linear(1, 1)},
        torch.optim.SGD,
        hparams={},
        run_opts={"device": "cpu", "grad_accumulation_factor": gathered},
    )
    if ranks > 1:
        brain.distributed_launch, brain.rank = True, 0
        monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    loader = brain.make_dataloader(
        Dataset(range(items)),
        sb.Stage.TRAIN,
        sampler=EpochSampler(items),
        batch_size=4,
        drop_last=drop_last,
    )
    steps = sum(1 for _ in loader) // gathered
    assert steps
    assert steps_per_epoch(loader, gathered) == steps
    schedule = WarmCoolDecayLRSchedule(
        lr=1.0, warmup=1, cooldown=75, total_steps=100
    )
    stretch_schedule(schedule, 3 * steps)
    assert schedule.total_steps == 3 * steps


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_only_gloo_is_not_waited_for(monkeypatch, backend):
    ended = []
    monkeypatch.setattr(train, "get_backend", lambda: backend)
    monkeypatch.setattr(
        train, "destroy_process_group", lambda: ended.append("group")
    )
    monkeypatch.setattr(train.logging, "shutdown", lambda: None)
    monkeypatch.setattr(train.os, "_exit", ended.append)
    train.leave_group()
    assert ended == ["group"] + [0] * (backend == "gloo")


def test_a_recipe_that_was_moved_says_what_it_lacks(tmp_path):
    moved = tmp_path / "mine.yaml"
    shutil.copy(RECIPE / "hparams/flashformer-demo.yaml", moved)
    model = ROOT / "hparams/flashformer-tiny.yaml"
    with pytest.raises(SystemExit, match=f"or include {model}"):
        train.load_settings(moved, {})
    # Which mends it.
    text = moved.read_text()
    place = "../../../../hparams/flashformer-tiny.yaml"
    assert place in text
    moved.write_text(text.replace(place, str(model)))
    output = {"output_folder": str(tmp_path / "run")}
    assert train.load_settings(moved, output)["modules"]
    with pytest.raises(SystemExit, match="^no file .*none.yaml"):
        train.load_settings(str(tmp_path / "none.yaml"), {})


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "avx2"])
def test_a_cpu_trains_in_bfloat16_where_it_has_it(monkeypatch, name):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True})
    ours = FlashFormer(16, d_model=32, num_layers=1, nhead=2)
    half = name != "avx2"
    assert train.default_precision("cpu", ours) == ("bf16" if half else "fp32")
    assert train.default_precision("cpu", torch.nn.Identity()) == "fp32"
