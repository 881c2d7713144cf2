"""Data sets: cuts line up across signals, and workers may be spawned."""

import csv
import itertools
import pickle

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_flashformer.training.data import (
    EpochSampler,
    choose_cut,
    dataio_prep,
    load_dataset,
    training_loader_options,
)


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
    return {
        "data_folder": str(tmp_path),
        "num_spks": 2,
        "sample_rate": 8000,
        "seed": 3,
        "dynamic_mixing": False,
        "dynamic_batching": False,
        "limit_training_signal_len": False,
        "max_batch_length": 1.0,
        "num_buckets": 3,
        "dataloader_opts": {"batch_size": 2, "shuffle": True},
    }


def test_cuts_are_at_one_place_in_all_signals(csv_file, hparams):
    dataset = load_dataset(csv_file, hparams, crop=1000)
    starts = set()
    for epoch in range(5):
        item = dataset[epoch * len(dataset)]
        assert item["id"] == "item0"
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


@pytest.mark.parametrize("limit, longest", [(True, 1000), (False, 4000)])
def test_only_training_items_are_cut(csv_file, hparams, limit, longest):
    for part in ("train", "valid", "test"):
        hparams[f"{part}_data"] = csv_file
    hparams |= {
        "limit_training_signal_len": limit,
        "training_signal_len": 1000,
    }
    sizes = [len(part[0]["mix_sig"]) for part in dataio_prep(hparams)]
    assert sizes == [longest, 4000, 4000]


def test_mixtures_made_on_the_fly_are_not_shuffled(hparams):
    """They are drawn at random already."""
    for dynamic in (True, False):
        hparams["dynamic_mixing"] = dynamic
        sampler = training_loader_options(hparams, None, 50)["sampler"]
        assert (list(sampler) == list(range(50))) == dynamic


def test_every_cut_is_inside_and_both_ends_are_reached():
    cuts = [choose_cut("0.0005", n, 3, 8000, seed=1) for n in range(200)]
    assert set(cuts) == {(0, 3), (1, 4)}
    assert cuts == [
        choose_cut("0.0005", n, 3, 8000, seed=1) for n in range(200)
    ]
    assert cuts != [
        choose_cut("0.0005", n, 3, 8000, seed=2) for n in range(200)
    ]


def test_a_set_without_rows_is_refused(csv_file, hparams):
    csv_file.write_text(csv_file.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="set.csv has no rows"):
        load_dataset(csv_file, hparams)


def test_workers_can_be_spawned(csv_file, hparams):
    copy = pickle.loads(pickle.dumps(load_dataset(csv_file, hparams)))
    assert copy[1]["mix_sig"].shape == (900,)


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_epoch_is_new_and_repeatable(shuffle):
    sampler = EpochSampler(50, shuffle)
    epochs = []
    for epoch in (1, 2, 3, 1):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert len(sampler) == 50
        items = [n % 50 for n in epochs[-1]]
        assert sorted(items) == list(range(50))
        assert (items != sorted(items)) == shuffle
    assert epochs[0] == epochs[3]
    for a, b in itertools.combinations(epochs[:3], 2):
        assert not set(a) & set(b)
        assert ([n % 50 for n in a] != [n % 50 for n in b]) == shuffle
    other = EpochSampler(50, shuffle, seed=1)
    other.set_epoch(1)
    assert (list(other) != epochs[0]) == shuffle


def test_batches_by_length_hold_all_items_and_little_padding(hparams, tmp_path):
    rng = np.random.default_rng(0)
    seconds = rng.uniform(0.2, 2.0, 60)
    path = tmp_path / "long.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ID", "duration", "mix_wav", "s1_wav", "s2_wav"])
        for i, duration in enumerate(seconds):
            writer.writerow([f"{i:02}", duration, "m", "a", "b"])
    dataset = load_dataset(path, hparams)
    hparams |= {"dynamic_batching": True, "max_batch_length": 6.0}
    options = training_loader_options(hparams, dataset, 60)
    assert "batch_size" not in options and "shuffle" not in options
    sampler, epochs = options["batch_sampler"], []
    for epoch in (1, 2, 1):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        numbers = sorted(n for batch in batches for n in batch)
        assert numbers == list(range(epoch * 60, epoch * 60 + 60))
        epochs.append([[n % 60 for n in batch] for batch in batches])
    assert epochs[0] == epochs[2] != epochs[1]
    # Of items that are cut more fit into a batch.
    cut = {"limit_training_signal_len": True, "training_signal_len": 8000}
    options = training_loader_options(hparams | cut, dataset, 60)
    assert len(options["batch_sampler"]) < len(sampler)
    # Without a shuffle the shortest come first.
    hparams["dataloader_opts"] = {"shuffle": False}
    options = training_loader_options(hparams, dataset, 60)
    longest = [max(seconds[batch]) for batch in options["batch_sampler"]]
    assert longest == sorted(longest)
    spoken = padded = 0
    for batch in epochs[0]:
        longest = max(seconds[batch])
        assert len(batch) == 1 or len(batch) * longest <= 6.0
        spoken += sum(seconds[batch])
        padded += len(batch) * longest
    in_order = sum(
        3 * max(seconds[i : i + 3]) for i in range(0, 60, 3)
    )  # as many in a batch, as they come
    assert padded / spoken < 1.25 < in_order / spoken


def test_batches_by_length_of_mixtures_made_on_the_fly_are_refused(hparams):
    hparams |= {"dynamic_batching": True, "dynamic_mixing": True}
    with pytest.raises(ValueError, match="set one of them to False"):
        training_loader_options(hparams, None, 10)
