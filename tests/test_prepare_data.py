"""Preparation: both layouts, and every way a folder can be wrong."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

RECIPE = Path(__file__).parent.parent / "recipes/WSJ0Mix/separation"
sys.path.insert(0, str(RECIPE))

import prepare_data  # noqa: E402
from prepare_data import prepare_wsjmix  # noqa: E402

LAYOUTS = {
    "wsj": ("wav8k/min", ("tr", "cv", "tt"), ("mix", "s1", "s2", "s3")),
    "custom": (
        ".",
        ("train", "valid", "test"),
        ("mixture", "source1", "source2", "source3"),
    ),
}


def make(folder, layout="wsj", num_spks=2):
    root, parts, names = LAYOUTS[layout]
    for part in parts:
        for index in range(2):
            for name in names[: num_spks + 1]:
                path = folder / root / part / name / f"{part}{index}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                signal = np.random.default_rng(index).normal(size=4000) * 0.1
                soundfile.write(path, signal, 8000)
    return folder


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_spks", [2, 3])
def test_columns_durations_and_order(tmp_path, layout, num_spks):
    data = make(tmp_path / "data", layout, num_spks)
    prepare_wsjmix(data, tmp_path / "save", num_spks)
    for name, part in zip(("tr", "cv", "tt"), LAYOUTS[layout][1]):
        rows = read(tmp_path / "save" / f"wsj_{name}.csv")
        assert [row["ID"] for row in rows] == [f"{part}0", f"{part}1"]
        for row in rows:
            assert float(row["duration"]) == 0.5
            for signal in ["mix", *(f"s{i + 1}" for i in range(num_spks))]:
                path = row[f"{signal}_wav"].replace("$data_root", str(data))
                assert Path(path).is_file()
                assert row[f"{signal}_wav_format"] == "wav"
                assert row[f"{signal}_wav_opts"] == ""


@pytest.mark.parametrize(
    "damage, error, message",
    [
        ("folder", FileNotFoundError, "no data folder .*data"),
        ("layout", FileNotFoundError, "neither wav8k/min/tr/mix .* nor train"),
        ("part", FileNotFoundError, "no folder .*cv.s2"),
        ("source", FileNotFoundError, "no file .*s2.tr1.wav"),
        ("empty", FileNotFoundError, "no wav file in .*tt.mix"),
        ("length", ValueError, "s1.cv0.wav has 3999 samples"),
        ("rate", ValueError, "s2.tt1.wav has 16000 Hz, sample_rate is 8000"),
        ("channels", ValueError, "mix.tr0.wav has 2 channels"),
        ("unreadable", ValueError, "cannot read .*s1.tr0.wav"),
        ("nothing", ValueError, "mix.tr0.wav is empty"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, damage, error, message):
    data = tmp_path / "data"
    if damage != "folder":
        make(data)
    root = data / "wav8k" / "min"
    if damage == "layout":
        (data / "wav8k").rename(data / "wav")
    elif damage == "part":
        (root / "cv" / "s2").rename(root / "cv" / "s9")
    elif damage == "source":
        (root / "tr" / "s2" / "tr1.wav").unlink()
    elif damage == "empty":
        for path in (root / "tt" / "mix").iterdir():
            path.unlink()
    elif damage == "length":
        soundfile.write(root / "cv" / "s1" / "cv0.wav", np.zeros(3999), 8000)
    elif damage == "rate":
        soundfile.write(root / "tt" / "s2" / "tt1.wav", np.zeros(4000), 16000)
    elif damage == "channels":
        path = root / "tr" / "mix" / "tr0.wav"
        soundfile.write(path, np.zeros((4000, 2)), 8000)
    elif damage == "unreadable":
        (root / "tr" / "s1" / "tr0.wav").write_bytes(b"not audio")
    elif damage == "nothing":
        soundfile.write(root / "tr" / "mix" / "tr0.wav", np.zeros(0), 8000)
    with pytest.raises(error, match=message):
        prepare_wsjmix(data, tmp_path / "save")
    assert not list(tmp_path.glob("save/*.csv"))


def test_a_changed_folder_is_seen_again(tmp_path):
    data = make(tmp_path / "data")
    prepare_wsjmix(data, tmp_path / "save")
    for name in ("mix", "s1", "s2"):
        folder = data / "wav8k" / "min" / "tr" / name
        (folder / "tr0.wav").rename(folder / "other.wav")
    prepare_wsjmix(data, tmp_path / "save")
    rows = read(tmp_path / "save" / "wsj_tr.csv")
    assert [row["ID"] for row in rows] == ["other", "tr1"]


def test_a_voice_without_a_target_is_refused(tmp_path):
    data = make(tmp_path / "data", num_spks=3)
    with pytest.raises(ValueError, match="s3 exists, but num_spks is 2"):
        prepare_wsjmix(data, tmp_path / "save", n_spks=2)


def test_an_interrupted_preparation_leaves_nothing_to_use(
    tmp_path, monkeypatch
):
    save = tmp_path / "save"
    prepare_wsjmix(make(tmp_path / "a"), save)
    written = []

    def fail_at_second(path, *rest):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        path.write_text("half")

    monkeypatch.setattr(prepare_data, "_write_csv", fail_at_second)
    with pytest.raises(KeyboardInterrupt):
        prepare_wsjmix(make(tmp_path / "b"), save)
    with pytest.raises(FileNotFoundError, match="skip_prep"):
        prepare_wsjmix(tmp_path / "b", save, skip_prep=True)


def test_skipping_what_was_never_prepared_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="skip_prep"):
        prepare_wsjmix(tmp_path, tmp_path / "save", skip_prep=True)
