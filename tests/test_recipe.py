"""The recipe from end to end: train, stop, resume, test; and its failures."""

import csv
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_flashformer.training.voices import make_voices

RECIPE = Path(__file__).parent.parent / "recipes/WSJ0Mix/separation"
SMALL = [
    "--model",
    "{d_model: 64, num_layers: 2, nhead: 2, d_ffn: 96, d_frame: 32}",
    "--num_workers",
    "0",
    "--device",
    "cpu",
    "--noprogressbar",
]


def command(yaml, output, *options):
    output = str(output)
    return [
        sys.executable,
        "train.py",
        f"hparams/{yaml}.yaml",
        *([] if "--output_folder" in options else ["--output_folder", output]),
        *SMALL,
        *map(str, options),
    ]


def train(*arguments, ok=True):
    done = subprocess.run(
        command(*arguments), cwd=RECIPE, capture_output=True, text=True
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stderr + done.stdout  # SpeechBrain logs to stdout


def epochs(output, what="valid si-snr"):
    """Epoch -> loss, from the log."""
    found = re.findall(
        rf"epoch: (\d+),.*{what}: (-?[\d.e+-]+)",
        (output / "train_log.txt").read_text(),
    )
    return {int(epoch): float(value) for epoch, value in found}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "voices"
    return make_voices(
        folder, sizes=(48, 4, 4), utterances=1, progressbar=False
    )


def test_train_stop_resume_and_test(data, tmp_path):
    output = tmp_path / "run"
    options = ["flashformer-demo", output, "--data_folder", data]
    options += [
        "--ckpt_interval_minutes",
        0,
        "--ckpt_interval_steps",
        2,
        "--lr",
        0.002,
    ]
    # Stop it for good after its first epoch, wherever it then is.
    process = subprocess.Popen(command(*options, "--N_epochs", 6), cwd=RECIPE)
    log = output / "train_log.txt"
    while process.poll() is None and not (
        log.is_file() and "epoch: 1" in log.read_text()
    ):
        time.sleep(0.1)
    time.sleep(1)
    process.kill()
    process.wait()
    before = epochs(output)
    assert before and max(before) < 6

    text = train(*options, "--N_epochs", 6)
    after = epochs(output)
    assert list(after) == [1, 2, 3, 4, 5, 6]
    assert {epoch: after[epoch] for epoch in before} == before
    # A training begun anew would give the same: its first epoch, twice.
    assert log.read_text().count("epoch: 1,") == 1
    learning = epochs(output, "train loss")
    assert learning[6] < learning[1] - 1

    # Results: a row per test mixture, then what sums them up.
    with open(output / "test_results.csv", newline="") as file:
        *rows, mean, _, _ = csv.DictReader(file)
    assert list(mean) == ["snt_id", "sdr", "sdr_i", "si-snr", "si-snr_i"]
    names = {p.stem for p in (data / "wav8k/min/tt/mix").iterdir()}
    assert {row["snt_id"] for row in rows} == names
    assert mean["snt_id"] == "avg"
    for column in ("sdr", "si-snr_i"):
        average = sum(float(row[column]) for row in rows) / len(rows)
        assert float(mean[column]) == pytest.approx(average)
    assert "SI-SNRi" in text

    # Audio: estimates at the level of their source, nothing clipped.
    for name in names:
        parts = {
            part: soundfile.read(
                output / "audio_results" / f"{name}_{part}.wav"
            )
            for part in ("mix", "s1", "s2", "s1hat", "s2hat")
        }
        for i in "12":
            clean, rate = parts[f"s{i}"]
            estimate, _ = parts[f"s{i}hat"]
            assert rate == 8000 and len(clean) == len(estimate)
            assert clean.std() == pytest.approx(estimate.std(), rel=0.05)
            assert abs(estimate).max() < 1
    for name in ("results.png", "evaluation.png"):
        picture = (output / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    # Of four mixtures all are among the five worst.
    assert len(list((output / "audio_worst").glob("*_mix.wav"))) == 4
    assert not list(output.rglob("*.partial"))

    # Testing again gives the same from the checkpoint alone.
    (output / "test_results.csv").unlink()
    train(*options, "--N_epochs", 6, "--test_only")
    with open(output / "test_results.csv", newline="") as file:
        again = list(csv.DictReader(file))[-3]
    assert float(again["si-snr"]) == pytest.approx(
        float(mean["si-snr"]), abs=1e-3
    )
    assert list(epochs(output)) == [1, 2, 3, 4, 5, 6]


def test_train_with_dynamic_mixing_then_pack_and_separate(data, tmp_path):
    output, model = tmp_path / "run", tmp_path / "model"
    part = data / "wav8k/min/tr"
    options = ["--data_folder", data]
    options += ["--dynamic_mixing", True, "--base_folder_dm", part / "s1"]
    # Files are called NAME_SPEAKER_OTHER.wav.
    options += ["--dm_speaker", "_([^_]+)_", "--dm_effects"]
    options += ["{noise: {share: 0.5}}"]
    train("flashformer-demo", output, *options, "--N_epochs", 2)
    assert list(epochs(output)) == [1, 2]

    # Nothing of the recipe and no network is needed to separate.
    (mixture, *_) = sorted((data / "wav8k/min/tt/mix").glob("*.wav"))

    def flashformer(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "speechbrain_flashformer.cli", *arguments],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    flashformer("pack", output, model)
    written = flashformer("separate", mixture, "-o", tmp_path, "--model", model)
    for i in "12":
        tested, _ = soundfile.read(
            output / "audio_results" / f"{mixture.stem}_s{i}hat.wav"
        )
        # The test has put the speakers in the order of the sources.
        likeness = []
        for path in written:
            source, _ = soundfile.read(path)
            norms = np.linalg.norm(source) * np.linalg.norm(tested)
            # What is saved has the sign of its source, a network but one sign:
            # this one has learned too little for them to agree.
            likeness.append(abs(source @ tested) / norms)
        assert max(likeness) > 0.999

    # Trained on at a rate of 0 it is what it was.
    options += ["--start_from", model, "--N_epochs", 1, "--lr", 0]
    train("flashformer-demo", tmp_path / "more", *options)
    flashformer("pack", tmp_path / "more", tmp_path / "same")
    for name in ("encoder.ckpt", "masknet.ckpt"):
        before, after = (
            torch.load(folder / name) for folder in (model, tmp_path / "same")
        )
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_starter_set_is_made_when_asked_for_and_says_so(tmp_path):
    output = tmp_path / "run"
    text = train(
        "flashformer",
        output,
        "--data_folder",
        "voices",
        "--starter_train",
        6,
        "--starter_valid",
        2,
        "--starter_test",
        2,
        "--N_epochs",
        1,
        "--training_signal_len",
        8000,
    )
    assert "Training on synthetic voices in" in text
    assert "not comparable with those on WSJ0-mix" in text
    assert (output / "voices" / "wav8k" / "min" / "tr" / "mix").is_dir()
    assert list(epochs(output)) == [1]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data_folder", "."], "neither wav8k/min/tr/mix"),
        (["--num_spks", "3"], "tr/s3 (3 speakers)"),
        (["--n_audio_to_save", "0"], "plot_results draws saved audio"),
        (["--precision", "fp16"], "fp16"),
        (["--more_metrics", "[mos]"], "no measure 'mos'"),
        (
            ["--more_metrics", "[pesq]", "--sample_rate", "44100"],
            "not at 44100",
        ),
        (["--output_folder", "/dev/null/run"], "/dev/null"),
        (["--batch_size", "49"], "an epoch has 0 batches"),
        (["--grad_accumulation_factor", "7"], "gather 7 for a step"),
        (["--start_from", "nowhere"], "no nowhere/encoder.ckpt to start from"),
    ],
)
def test_bad_input_stops_before_training(data, tmp_path, options, message):
    if "--data_folder" not in options:
        options = [*options, "--data_folder", data]
    text = train("flashformer-demo", tmp_path / "run", *options, ok=False)
    assert message in text.strip().splitlines()[-1]
    assert not (tmp_path / "run" / "train_log.txt").exists()


def test_testing_what_was_never_trained_is_an_error(data, tmp_path):
    text = train(
        "flashformer-demo",
        tmp_path / "run",
        "--data_folder",
        data,
        "--test_only",
        ok=False,
    )
    assert "no checkpoint in" in text.strip().splitlines()[-1]
    assert not (tmp_path / "run" / "test_results.csv").exists()


@pytest.mark.parametrize("yaml", sorted((RECIPE / "hparams").glob("*.yaml")))
def test_recipe_yaml_separates(yaml, tmp_path):
    with open(yaml, encoding="utf-8") as file:
        hparams = load_hyperpyyaml(file, {"output_folder": str(tmp_path)})
    parts = hparams["modules"]
    assert hparams["Encoder"] is parts["encoder"]
    mix_w = parts["encoder"](torch.randn(1, 8000))
    masks = parts["masknet"](mix_w)
    assert masks.shape == (hparams["num_spks"], *mix_w.shape)
