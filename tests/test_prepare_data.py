"""Preparation: what the CSVs hold, and every way a folder can be wrong."""

import csv
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from speechbrain.dataio.dataio import read_audio
from speechbrain.dataio.dataset import DynamicItemDataset

RECIPE = Path(__file__).parent.parent / "recipes/WSJ0Mix/separation"
sys.path.insert(0, str(RECIPE))

import prepare_data  # noqa: E402
from prepare_data import CSV_FILES, prepare_wsjmix  # noqa: E402

WSJ0 = "wav8k/min", ("tr", "cv", "tt"), ("mix", "s1", "s2", "s3")
CUSTOM = (
    ".",
    ("train", "valid", "test"),
    ("mixture", "source1", "source2", "source3"),
)


def make(folder, layout=WSJ0, num_spks=2, count=2):
    root, parts, names = layout
    for part in parts:
        for index in range(count):
            for number, name in enumerate(names[: num_spks + 1]):
                path = folder / root / part / name / f"{part}{index}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                rng = np.random.default_rng([index, number])
                soundfile.write(path, rng.normal(size=4000) * 0.1, 8000)
    return folder


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def count_reads(monkeypatch):
    """A list that grows by each file whose samples are read."""
    opened, real = [], soundfile.SoundFile

    def open_it(path, *how):
        if not how:
            opened.append(path)
        return real(path, *how)

    monkeypatch.setattr(soundfile, "SoundFile", open_it)
    return opened


# --- what is written ---------------------------------------------------------


@pytest.mark.parametrize("layout", [WSJ0, CUSTOM], ids=["wsj0", "custom"])
@pytest.mark.parametrize("num_spks", [1, 2, 3])
def test_columns_durations_and_order(tmp_path, layout, num_spks):
    data = make(tmp_path / "data", layout, num_spks)
    prepare_wsjmix(data, tmp_path / "save", num_spks)
    for name, part in zip(CSV_FILES, layout[1]):
        rows = read(tmp_path / "save" / name)
        assert [row["ID"] for row in rows] == [f"{part}0", f"{part}1"]
        signals = ["mix", *(f"s{i + 1}" for i in range(num_spks))]
        assert list(rows[0]) == ["ID", "duration"] + [
            f"{signal}_{what}"
            for signal in signals
            for what in ("wav", "wav_format", "wav_opts")
        ]
        for row in rows:
            assert float(row["duration"]) == 0.5
            for signal, folder in zip(signals, layout[2]):
                path = row[f"{signal}_wav"].replace("$data_root", str(data))
                assert Path(path).is_file() and Path(path).parts[-2] == folder
                assert row[f"{signal}_wav_format"] == "wav"
                assert row[f"{signal}_wav_opts"] == ""


@pytest.mark.parametrize("place", ["absolute", "relative", "here"])
def test_speechbrain_reads_the_csv_files(tmp_path, monkeypatch, place):
    data = make(tmp_path / "data")
    monkeypatch.chdir(data if place == "here" else tmp_path)
    folder = {"absolute": data, "relative": "data", "here": "."}[place]
    prepare_wsjmix(str(folder), str(tmp_path / "save"))
    dataset = DynamicItemDataset.from_csv(
        tmp_path / "save" / "wsj_cv.csv", replacements={"data_root": folder}
    )
    dataset.add_dynamic_item(read_audio, takes="s2_wav", provides="s2_sig")
    dataset.set_output_keys(["id", "s2_sig"])
    signal, _ = soundfile.read(data / "wav8k/min/cv/s2/cv1.wav")
    assert dataset[1]["id"] == "cv1"
    np.testing.assert_allclose(dataset[1]["s2_sig"], signal, atol=1e-6)


def test_the_same_folder_gives_the_same_bytes(tmp_path, monkeypatch):
    data = make(tmp_path / "data", count=5)
    real = os.listdir
    for save, order in (("a", False), ("b", True)):
        # File systems list their files in any order.
        monkeypatch.setattr(
            os,
            "listdir",
            lambda folder, order=order: sorted(real(folder), reverse=order),
        )
        prepare_wsjmix(data, tmp_path / save)
    for name in (*CSV_FILES, "data_report.md", "data_cache.json"):
        texts = [(tmp_path / save / name).read_bytes() for save in "ab"]
        assert texts[0] == texts[1]
    names = [row["ID"] for row in read(tmp_path / "a" / "wsj_tr.csv")]
    assert names == [f"tr{i}" for i in range(5)]


def test_the_report_counts(tmp_path, caplog):
    data = make(tmp_path / "data")
    names = ("01aa010b_0.97482_209a010p_-0.97482", "01ac020b_1_40na010x_-1")
    for folder in (data / "wav8k/min/tr").iterdir():
        for path, name in zip(sorted(folder.iterdir()), names):
            path.rename(path.with_name(f"{name}.wav"))
    names = ("4077-13754-0001_5142-33396-0065", "4077-13754-0002_61-1-1")
    for folder in (data / "wav8k/min/cv").iterdir():
        for path, name in zip(sorted(folder.iterdir()), names):
            path.rename(path.with_name(f"{name}.wav"))
    with caplog.at_level("INFO"):
        prepare_wsjmix(data, tmp_path / "save")
    report = (tmp_path / "save" / "data_report.md").read_text()
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:]
        for line in report.splitlines()
        if line.startswith("|")
    }
    hours = f"{2 * 0.5 / 3600:.2f}"
    seconds = "0.5 to 0.5"
    assert rows["tr"] == ["2", hours, seconds, "3", "8000", "0"]
    assert rows["cv"] == ["2", hours, seconds, "3", "8000", "0"]
    assert rows["tt"] == ["2", hours, seconds, "unknown", "8000", "0"]
    assert "| tr | 2 |" in caplog.text


# --- what is read again ------------------------------------------------------


def test_an_unchanged_folder_is_not_read_again(tmp_path, monkeypatch):
    data, save = make(tmp_path / "data"), tmp_path / "save"
    opened = count_reads(monkeypatch)
    prepare_wsjmix(data, save)
    assert len(opened) == 3 * 2 * 3
    before = [(save / name).read_bytes() for name in CSV_FILES]
    opened.clear()
    prepare_wsjmix(data, save)
    assert not opened
    assert before == [(save / name).read_bytes() for name in CSV_FILES]


def test_what_has_changed_is_read_again(tmp_path, monkeypatch):
    data, save = make(tmp_path / "data"), tmp_path / "save"
    prepare_wsjmix(data, save)
    opened = count_reads(monkeypatch)
    root = data / "wav8k" / "min"
    # Of the same size, but another time.
    for folder in ("mix", "s1", "s2"):
        changed = root / "cv" / folder / "cv0.wav"
        soundfile.write(changed, np.full(4000, 0.1), 8000)
        os.utime(changed, ns=(0, 0))
    prepare_wsjmix(data, save)
    assert {Path(path).name for path in opened} == {"cv0.wav"}
    # Of the same time, but another size.
    for folder in ("mix", "s1", "s2"):
        changed = root / "cv" / folder / "cv0.wav"
        soundfile.write(changed, np.full(2000, 0.1), 8000)
        os.utime(changed, ns=(0, 0))
    prepare_wsjmix(data, save)
    assert read(save / "wsj_cv.csv")[0]["duration"] == "0.25"
    # Renamed.
    for folder in ("mix", "s1", "s2"):
        path = root / "tr" / folder / "tr0.wav"
        path.rename(path.with_name("other.wav"))
    prepare_wsjmix(data, save)
    assert [r["ID"] for r in read(save / "wsj_tr.csv")] == ["other", "tr1"]


def test_what_is_remembered_is_judged_again(tmp_path):
    data, save = make(tmp_path / "data"), tmp_path / "save"
    prepare_wsjmix(data, save)
    (data / "wav8k").rename(data / "wav16k")
    for _ in range(2):
        with pytest.raises(ValueError, match="has 8000 Hz, sample_rate is 16"):
            prepare_wsjmix(data, save, fs=16000)
    (data / "wav16k").rename(data / "wav8k")
    prepare_wsjmix(data, save)
    assert len(read(save / "wsj_tr.csv")) == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1}', '{"version": 0, "files": {}}']
)
def test_a_broken_cache_is_not_used(tmp_path, monkeypatch, text):
    data, save = make(tmp_path / "data"), tmp_path / "save"
    prepare_wsjmix(data, save)
    (save / "data_cache.json").write_text(text)
    opened = count_reads(monkeypatch)
    prepare_wsjmix(data, save)
    assert len(opened) == 3 * 2 * 3


def test_after_a_failure_only_the_mended_files_are_read(tmp_path, monkeypatch):
    data, save = make(tmp_path / "data"), tmp_path / "save"
    bad = data / "wav8k/min/tr/s1/tr0.wav"
    good = bad.read_bytes()
    bad.write_bytes(b"not audio")
    with pytest.raises(ValueError, match="cannot read"):
        prepare_wsjmix(data, save)
    bad.write_bytes(good)
    opened = count_reads(monkeypatch)
    prepare_wsjmix(data, save)
    assert opened == [str(bad)]


# --- what is wrong -----------------------------------------------------------


def write(path, signal, rate=8000, subtype="PCM_16"):
    soundfile.write(path, signal, rate, subtype)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def table(folder, text):
    """Part 1 is the CSV file given, the others are in order."""
    rest = "ID,mix_wav,s1_wav,s2_wav\na,a.wav,a.wav,a.wav\n"
    for name, lines in (("train", text), ("valid", rest), ("test", rest)):
        (folder / f"{name}.csv").write_text(lines)
    write(folder / "a.wav", np.ones(10))
    return {"layout": "csv"}


HEADER = "ID,mix_wav,s1_wav,s2_wav\n"
# Problem, as the README calls it -> what makes it, with data folder, the
# folder of parts, and the save folder; may return options of the preparation.
DAMAGES = {
    "no data folder": lambda d, p, s: d.rename(d.with_name("away")) and None,
    "unknown layout": lambda d, p, s: p.parent.rename(d / "wav") and None,
    "other rate or mode only": lambda d, p, s: (
        (d / "wav16k").mkdir(),
        p.rename(d / "wav16k" / "max"),
    ),
    "two layouts in one folder": lambda d, p, s: (p / "tr/mix_both").mkdir(),
    "missing part": lambda d, p, s: (p / "cv").rename(p / "dev") and None,
    "fewer sources than `num_spks`": lambda d, p, s: {"n_spks": 3},
    "more sources than `num_spks`": lambda d, p, s: (p / "cv" / "s3").mkdir(),
    "`mix_single` with two speakers": lambda d, p, s: (
        (p / "tr" / "mix").rename(p / "tr" / "mix_single")
        and {"mixture": "mix_single"}
    ),
    "empty part": lambda d, p, s: [f.unlink() for f in p.glob("tt/mix/*")],
    "missing source": lambda d, p, s: (p / "tr/s2/tr1.wav").unlink(),
    "missing mixture": lambda d, p, s: (p / "tr/mix/tr1.wav").unlink(),
    "missing column": lambda d, p, s: table(d, "ID,mix_wav,s1_wav\na,b,c\n"),
    "missing cell": lambda d, p, s: table(
        d, HEADER + "a,a.wav,a.wav,a.wav\nb,a.wav,,a.wav\n"
    ),
    "two mixtures of one name": lambda d, p, s: table(
        d, HEADER + 2 * "a,a.wav,a.wav,a.wav\n"
    ),
    "unreadable file": lambda d, p, s: (p / "tr/s1/tr0.wav").write_text("no"),
    "truncated file": lambda d, p, s: cut(p / "tr/mix/tr0.wav"),
    "empty file": lambda d, p, s: write(p / "tr/mix/tr0.wav", np.zeros(0)),
    "other length": lambda d, p, s: write(p / "cv/s1/cv0.wav", np.ones(3999)),
    "other rate": lambda d, p, s: write(
        p / "tt/s2/tt1.wav", np.ones(4000), 16000
    ),
    "stereo": lambda d, p, s: write(p / "tr/mix/tr0.wav", np.ones((4000, 2))),
    "NaN": lambda d, p, s: write(
        p / "tr/s1/tr0.wav", np.r_[np.ones(3999), np.nan], subtype="FLOAT"
    ),
    "a source that is all zero": lambda d, p, s: write(
        p / "tr/s1/tr0.wav", np.zeros(4000)
    ),
    "a CSV in another encoding": lambda d, p, s: (
        table(d, HEADER)
        and (d / "train.csv").write_bytes(f"{HEADER}é,a,b,c\n".encode("cp1252"))
        and {"layout": "csv"}
    ),
    "a name that is not valid UTF-8": lambda d, p, s: [
        f.rename(f.with_name(os.fsdecode(b"caf\xe9.wav")))
        for f in p.glob("tr/*/tr0.wav")
    ],
    "a dollar in a name": lambda d, p, s: [
        f.rename(f.with_name("a$b.wav")) for f in p.glob("tr/*/tr0.wav")
    ],
    "CSV that would be overwritten": lambda d, p, s: {
        "parts": [str(s / name) for name in CSV_FILES]
    },
    "output folder that cannot be written": lambda d, p, s: s.write_text(""),
    "full disk": lambda d, p, s: (
        s.mkdir(),
        (s / f".wsj_cv.csv.{os.getpid()}.partial").symlink_to("/dev/full"),
    ),
    "`skip_prep` without CSV files": lambda d, p, s: {"skip_prep": True},
}


def documented():
    """Problem -> message, from the table in the README."""
    text = (RECIPE / "README.md").read_text(encoding="utf-8")
    section = text.split("### What is checked")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", section, re.MULTILINE)
    return dict(rows[1:])


def test_every_problem_that_is_documented_is_tested():
    assert set(documented()) == set(DAMAGES)


@pytest.mark.parametrize("problem", DAMAGES)
def test_what_is_wrong_is_told_as_documented(tmp_path, problem):
    data, save = make(tmp_path / "data"), tmp_path / "save"
    options = DAMAGES[problem](data, data / "wav8k" / "min", save)
    options = options if isinstance(options, dict) else {}
    # Capitals stand for a name, three dots for anything.
    message = re.escape(documented()[problem]).replace(r"\.\.\.", ".*")
    message = re.sub(r"\b(FILE|FOLDER|NAME)\b", r"\\S+", message)
    message = re.sub(r"\b(NAMES|REASON)\b", ".+", message)
    with pytest.raises((ValueError, OSError), match=message) as raised:
        prepare_wsjmix(data, save, **options)
    assert str(tmp_path) in str(raised.value)
    assert not (save / "wsj_cv.csv").is_file()
    assert not list(tmp_path.glob("**/*.partial"))


def test_every_block_of_a_file_is_heard(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "BLOCK", 1000)
    data, save = make(tmp_path / "data"), tmp_path / "save"
    place = data / "wav8k/min/tr/s1/tr0.wav"
    # Silent at its end, and elsewhere not.
    write(place, np.r_[np.ones(2000), np.zeros(2000)] / 2)
    prepare_wsjmix(data, save)
    assert read(save / "wsj_tr.csv")[0]["duration"] == "0.5"
    write(place, np.r_[np.nan, np.ones(3999)], subtype="FLOAT")
    with pytest.raises(ValueError, match="tr0.wav has samples that are NaN"):
        prepare_wsjmix(data, save)


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    data, save = make(tmp_path / "data", count=20), tmp_path / "save"
    root = data / "wav8k" / "min"
    for path in (root / "tr" / "s1").iterdir():
        path.write_bytes(b"not audio")
    (root / "tt" / "s2" / "tt7.wav").unlink()
    write(root / "cv" / "s1" / "cv3.wav", np.ones((4000, 2)))
    with pytest.raises(ValueError) as raised:
        prepare_wsjmix(data, save)
    first, *some, last = str(raised.value).splitlines()
    assert first == f"22 problems in {data}:" and len(some) == 10
    assert last == f"all of them are in {save / 'data_report.md'}"
    lines = (save / "data_report.md").read_text().splitlines()
    told = [line for line in lines if line.startswith("- ")]
    assert len(told) == 22 and some == [line[2:] for line in told[:10]]
    assert [p for p in told if "cv3.wav has 2 channels" in p]
    assert [p for p in told if "no file" in p and "tt7.wav" in p]
    counts = [line.split(" | ")[-1] for line in lines if line.startswith("| ")]
    assert counts == ["problems |", "20 |", "1 |", "1 |"]


def test_a_size_that_the_writer_could_not_know_is_no_problem(tmp_path):
    data = make(tmp_path / "data")
    path = data / "wav8k/min/tr/mix/tr0.wav"
    whole = bytearray(path.read_bytes())
    whole[4:8] = whole[40:44] = b"\xff\xff\xff\xff"  # as ffmpeg to a pipe
    path.write_bytes(whole)
    prepare_wsjmix(data, tmp_path / "save")
    assert read(tmp_path / "save" / "wsj_tr.csv")[0]["duration"] == "0.5"


def test_a_dollar_in_the_data_folder_is_no_problem(tmp_path):
    data = make(tmp_path / "a$b")
    prepare_wsjmix(data, tmp_path / "save")
    dataset = DynamicItemDataset.from_csv(
        tmp_path / "save" / "wsj_tr.csv", replacements={"data_root": data}
    )
    dataset.set_output_keys(["mix_wav"])
    assert Path(dataset[0]["mix_wav"]).is_file()


def test_silent_noise_is_no_problem(tmp_path):
    layout = "wav8k/min", ("tr", "cv", "tt"), ("mix_both", "s1", "s2", "noise")
    data = make(tmp_path / "data", layout, num_spks=3)
    noise = data / "wav8k/min/tr/noise/tr0.wav"
    write(noise, np.zeros(4000))
    prepare_wsjmix(data, tmp_path / "save")
    write(noise, np.zeros(3999))
    with pytest.raises(ValueError, match="noise/tr0.wav has 3999 samples"):
        prepare_wsjmix(data, tmp_path / "save")


# --- nothing half-written, nothing stale -------------------------------------


def test_what_was_prepared_before_does_not_outlive_a_failure(tmp_path):
    save = tmp_path / "save"
    prepare_wsjmix(make(tmp_path / "a"), save)
    with pytest.raises(FileNotFoundError, match="no data folder"):
        prepare_wsjmix(tmp_path / "nowhere", save)
    with pytest.raises(FileNotFoundError, match="skip_prep"):
        prepare_wsjmix(tmp_path / "a", save, skip_prep=True)


def test_an_interrupted_preparation_leaves_nothing_to_use(
    tmp_path, monkeypatch
):
    data, save = make(tmp_path / "data"), tmp_path / "save"
    prepare_wsjmix(data, save)
    written, real = [], prepare_data._write_csv

    def stop_at_second(file, *rest):
        written.append(file)
        if len(written) == 2:
            file.write("half")
            raise KeyboardInterrupt
        real(file, *rest)

    monkeypatch.setattr(prepare_data, "_write_csv", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        prepare_wsjmix(data, save)
    assert not list(save.glob("*.partial"))
    with pytest.raises(FileNotFoundError, match="skip_prep"):
        prepare_wsjmix(data, save, skip_prep=True)


def test_an_interrupted_check_ends_soon_and_is_remembered(
    tmp_path, monkeypatch
):
    data, save = make(tmp_path / "data", count=30), tmp_path / "save"
    real, examined = prepare_data._examine_mixture, []

    def stop_at_fifth(paths, known):
        time.sleep(0.02)
        examined.append(paths)
        if paths[0].endswith("tr12.wav"):  # the fifth by name
            raise KeyboardInterrupt
        return real(paths, known)

    monkeypatch.setattr(prepare_data, "_examine_mixture", stop_at_fifth)
    with pytest.raises(KeyboardInterrupt):
        prepare_wsjmix(data, save)
    assert len(examined) < 90 and not list(save.glob("*.csv"))
    monkeypatch.undo()
    opened = count_reads(monkeypatch)
    prepare_wsjmix(data, save)
    assert len(opened) < 3 * 90
    # Nor is what was known forgotten by an interruption.
    monkeypatch.setattr(prepare_data, "_examine_mixture", stop_at_fifth)
    examined.clear()
    with pytest.raises(KeyboardInterrupt):
        prepare_wsjmix(data, save)
    monkeypatch.undo()
    opened = count_reads(monkeypatch)
    prepare_wsjmix(data, save)
    assert not opened
