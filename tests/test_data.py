"""Data sets: cuts line up across signals, and workers may be spawned."""

import csv
import pickle

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_flashformer.data import choose_cut, load_dataset


@pytest.fixture
def csv_file(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for index, samples in enumerate((4000, 900)):
        sources = rng.normal(size=(2, samples)) * 0.1
        row = {"ID": f"item{index}", "duration": samples / 8000}
        for name, signal in zip(
            ("mix", "s1", "s2"), (sources.sum(0), *sources)
        ):
            path = tmp_path / f"{name}_{index}.wav"
            soundfile.write(path, signal, 8000, "FLOAT")
            row[f"{name}_wav"] = f"$data_root/{path.name}"
            row[f"{name}_wav_format"] = "wav"
            row[f"{name}_wav_opts"] = None
        rows.append(row)
    path = tmp_path / "set.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def hparams(tmp_path):
    return {"data_folder": str(tmp_path), "num_spks": 2, "sample_rate": 8000}


def test_cuts_are_at_one_place_in_all_signals(csv_file, hparams):
    dataset = load_dataset(csv_file, hparams, crop=1000)
    starts = set()
    for _ in range(5):
        item = dataset[0]
        assert item["mix_sig"].shape == (1000,)
        torch.testing.assert_close(
            item["mix_sig"], item["s1_sig"] + item["s2_sig"]
        )
        starts.add(item["mix_sig"][0].item())
    assert len(starts) > 1
    assert dataset[1]["mix_sig"].shape == (900,)


def test_without_a_crop_files_come_whole(csv_file, hparams):
    dataset = load_dataset(csv_file, hparams)
    assert [len(item["mix_sig"]) for item in dataset] == [4000, 900]
    assert dataset[0]["id"] == "item0"


def test_every_cut_is_inside_and_both_ends_are_reached():
    starts = [choose_cut("0.0005", 3, 8000)[0] for _ in range(200)]
    assert set(starts) == {0, 1}


def test_workers_can_be_spawned(csv_file, hparams):
    copy = pickle.loads(pickle.dumps(load_dataset(csv_file, hparams)))
    assert copy[1]["mix_sig"].shape == (900,)
