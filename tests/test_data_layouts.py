"""Where the mixtures are: every layout, and what is taken from it."""

import csv
import doctest
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

RECIPE = Path(__file__).parent.parent / "recipes/WSJ0Mix/separation"
sys.path.insert(0, str(RECIPE))

import data_layouts  # noqa: E402
from data_layouts import find_mixtures  # noqa: E402
from prepare_data import prepare_wsjmix  # noqa: E402

from speechbrain_flashformer.training.data import load_dataset  # noqa: E402

WSJ0_PARTS, LIBRI_PARTS = ("tr", "cv", "tt"), ("train-360", "dev", "test")
WHAM = ("mix_both", "mix_clean", "mix_single", "s1", "s2", "noise")
WHAMR = (
    *(
        f"mix_{a}_{b}"
        for a in ("both", "clean", "single")
        for b in ("reverb", "anechoic")
    ),
    *(f"s{i}_{b}" for i in "12" for b in ("reverb", "anechoic")),
    "noise",
)


def lay(folder, root, parts, names):
    """Files without sound, where a corpus has them."""
    for part in parts:
        for name in names:
            place = folder / root / part / name
            place.mkdir(parents=True)
            for file in ("b.wav", "a.wav"):
                (place / file).touch()
    return folder


def taken(folder, n_spks=2, fs=8000, **options):
    """Part -> column -> folder that its files are in."""
    _, parts = find_mixtures(folder, n_spks, fs, **options)
    found = {}
    for part in parts:
        assert [row["ID"] for row in part.rows] == ["a", "b"]
        assert not part.problems
        for row in part.rows:
            assert all(Path(p).is_file() for p in list(row.values())[1:])
            for column, path in list(row.items())[1:]:
                path = Path(path)
                assert path.stem == row["ID"]
                assert path.parts[-3] == part.name
                found.setdefault(part.name, {})[column] = path.parts[-2]
    return found


@pytest.mark.parametrize(
    "root, parts, names, options, expected",
    [
        ("wav8k/min", WSJ0_PARTS, ("mix", "s1", "s2"), {}, "mix s1 s2"),
        (
            "wav8k/min",
            WSJ0_PARTS,
            ("mix", "s1", "s2", "s3"),
            {"n_spks": 3},
            "mix s1 s2 s3",
        ),
        (
            "wav16k/min",
            WSJ0_PARTS,
            ("mix", "s1", "s2"),
            {"fs": 16000},
            "mix s1 s2",
        ),
        (
            "wav8k/max",
            WSJ0_PARTS,
            ("mix", "s1", "s2"),
            {"mode": "max"},
            "mix s1 s2",
        ),
        ("", WSJ0_PARTS, ("mix", "s1", "s2"), {}, "mix s1 s2"),
        ("wav8k/min", WSJ0_PARTS, WHAM, {}, "mix_both s1 s2 noise"),
        (
            "wav8k/min",
            WSJ0_PARTS,
            WHAM,
            {"mixture": "mix_clean"},
            "mix_clean s1 s2",
        ),
        (
            "wav8k/min",
            WSJ0_PARTS,
            WHAM,
            {"mixture": "mix_single", "n_spks": 1},
            "mix_single s1 noise",
        ),
        (
            "wav8k/min",
            WSJ0_PARTS,
            WHAMR,
            {},
            "mix_both_reverb s1_anechoic s2_anechoic noise",
        ),
        (
            "wav8k/min",
            WSJ0_PARTS,
            WHAMR,
            {"mixture": "mix_clean_reverb", "sources": "s*_reverb"},
            "mix_clean_reverb s1_reverb s2_reverb",
        ),
        ("wav8k/min", LIBRI_PARTS, WHAM, {}, "mix_clean s1 s2"),
        (
            "wav16k/max",
            LIBRI_PARTS,
            (*WHAM, "s3"),
            {"n_spks": 3, "fs": 16000, "mode": "max", "mixture": "mix_both"},
            "mix_both s1 s2 s3 noise",
        ),
        (
            "wav8k/min",
            LIBRI_PARTS,
            ("mix_clean", "s1", "s2"),
            {},
            "mix_clean s1 s2",
        ),
        (
            "",
            ("train", "valid", "test"),
            ("mixture", "source1", "source2", "source3"),
            {"n_spks": 3},
            "mixture source1 source2 source3",
        ),
        (
            "",
            ("a", "b", "c"),
            ("noisy", "voice1", "voice2"),
            {
                "layout": "custom",
                "parts": ["a", "b", "c"],
                "mixture": "noisy",
                "sources": "voice*",
            },
            "noisy voice1 voice2",
        ),
    ],
)
def test_what_is_taken(tmp_path, root, parts, names, options, expected):
    folder = lay(tmp_path / "data", root, parts, names)
    columns = ["mix", "s1", "s2", "s3"][: options.get("n_spks", 2) + 1]
    columns += ["noise"] * expected.endswith("noise")
    want = dict(zip(columns, expected.split()))
    assert taken(folder, **options) == {part: want for part in parts}


def test_libri_takes_the_large_training_part_unless_told(tmp_path):
    names = ("mix_clean", "s1", "s2")
    folder = lay(tmp_path, "wav8k/min", ("train-100", "dev", "test"), names)
    assert list(taken(folder)) == ["train-100", "dev", "test"]
    lay(tmp_path, "wav8k/min", ("train-360",), names)
    assert list(taken(folder)) == ["train-360", "dev", "test"]
    small = ["train-100", "dev", "test"]
    assert list(taken(folder, parts=small)) == small


def test_the_path_of_a_folder_says_nothing(tmp_path):
    folder = tmp_path / "whamr" / "wsj" / "Libri3Mix"
    lay(folder, ".", ("train", "valid", "test"), ("mixture", "source1"))
    assert taken(folder, n_spks=1)["train"]["mix"] == "mixture"


def test_what_macos_leaves_beside_files_is_passed_over(tmp_path):
    names = ("mix", "s1", "s2")
    lay(tmp_path, "wav8k/min", WSJ0_PARTS, names)
    for folder in (tmp_path / "wav8k/min").glob("*/*"):
        (folder / "._a.wav").write_bytes(b"\0\5\x16\7")
    assert set(taken(tmp_path)) == set(WSJ0_PARTS)
    for path in (tmp_path / "wav8k/min/tt/s2").glob("[ab].wav"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no wav file in .*tt/s2"):
        taken(tmp_path)


def test_of_two_layouts_one_is_chosen(tmp_path):
    folder = lay(tmp_path, "wav8k/min", WSJ0_PARTS, WHAM)
    for part in WSJ0_PARTS:
        for name in WHAMR[:-1]:
            place = folder / "wav8k/min" / part / name
            place.mkdir()
            for file in ("a.wav", "b.wav"):
                (place / file).touch()
    with pytest.raises(ValueError, match="as wham and as whamr: choose"):
        taken(folder)
    assert taken(folder, layout="wham")["tr"]["s1"] == "s1"
    assert taken(folder, layout="whamr")["tr"]["s1"] == "s1_anechoic"
    # What only one of them has is as good as a choice.
    assert taken(folder, mixture="mix_clean")["cv"]["s1"] == "s1"


def test_the_example_runs(request):
    # Recipes are no package: pytest does not find their examples.
    names = {"getfixture": request.getfixturevalue}
    failed, tried = doctest.testmod(data_layouts, extraglobs=names)
    assert tried and not failed


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"layout": "librimix"}, FileNotFoundError, "has neither"),
        ({"layout": "timit"}, ValueError, "'timit' is none of auto, csv, wsj0"),
        ({"parts": ["tr", "tt"]}, ValueError, "training, validation and test"),
        (
            {"parts": ["tr", "cv", "xx"]},
            FileNotFoundError,
            "no folder .*xx/mix",
        ),
        ({"mixture": "mix_clean"}, FileNotFoundError, "it holds: wav8k"),
        ({"sources": "source*"}, FileNotFoundError, "holds: mix, s1, s2"),
        ({"parts": ["a.csv", "b.csv", "c.csv"]}, FileNotFoundError, "no file"),
    ],
)
def test_a_choice_that_is_not_there(tmp_path, options, error, message):
    lay(tmp_path, "wav8k/min", WSJ0_PARTS, ("mix", "s1", "s2"))
    with pytest.raises(error, match=message):
        find_mixtures(tmp_path, 2, 8000, **options)


# --- CSV files ---------------------------------------------------------------


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def sound(path, seconds=0.5, rate=8000):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(0).normal(size=round(seconds * rate)) * 0.1
    soundfile.write(path, samples, rate)
    return path


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_csv_files_of_the_data_folder(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for name in ("m", "a", "b", "n"):
        sound(data / "audio" / f"{name}.flac")
    sound(elsewhere / "b.wav")
    header = ("ID", "duration", "mix_wav", "s1_wav", "s2_wav", "noise_wav")
    for name in ("train", "valid", "test"):
        rows = [
            (
                name,
                1.0,
                "$data_root/audio/m.flac",
                "audio/a.flac",
                elsewhere / "b.wav",
                "audio/n.flac" if name == "train" else "",
            )
        ]
        write_csv(data / f"{name}.csv", header, rows)
    prepare_wsjmix(data, tmp_path / "save")
    (row,) = read(tmp_path / "save" / "wsj_tr.csv")
    assert row["ID"] == "train"
    # What the CSV says of durations is often not so.
    assert row["duration"] == "0.5"
    assert row["mix_wav"] == "$data_root/audio/m.flac"
    assert row["s1_wav"] == "$data_root/audio/a.flac"
    assert row["s1_wav_format"] == "flac"
    assert row["s2_wav"] == str(elsewhere / "b.wav")
    assert row["noise_wav"] == "$data_root/audio/n.flac"
    (row,) = read(tmp_path / "save" / "wsj_cv.csv")
    assert "noise_wav" not in row


@pytest.mark.parametrize("name", ["take [1]", "100 % 'so' \"x\" {0}", "a, b"])
def test_files_of_any_name_are_prepared_and_loaded(tmp_path, name):
    for part in ("train", "valid", "test"):
        for column in ("mixture", "source1", "source2"):
            sound(tmp_path / "data" / part / column / f"{name}.wav")
    prepare_wsjmix(tmp_path / "data", tmp_path / "save")
    hparams = {
        "data_folder": str(tmp_path / "data"),
        "num_spks": 2,
        "sample_rate": 8000,
        "seed": 0,
    }
    (item,) = load_dataset(tmp_path / "save" / "wsj_tr.csv", hparams)
    assert item["id"] == name and len(item["s2_sig"]) == 4000


def test_a_name_in_a_csv_may_have_a_slash(tmp_path):
    sound(tmp_path / "a.wav")
    for part in ("train", "valid", "test"):
        header = ("ID", "mix_wav", "s1_wav", "s2_wav")
        row = ["day 1/take 2", *["a.wav"] * 3]
        write_csv(tmp_path / f"{part}.csv", header, [row])
    prepare_wsjmix(tmp_path, tmp_path / "save")
    (row,) = read(tmp_path / "save" / "wsj_tr.csv")
    assert row["ID"] == "day 1/take 2"


def test_what_was_prepared_is_a_data_set_too(tmp_path):
    names = ("mix", "s1", "s2")
    for part in WSJ0_PARTS:
        for name in names:
            sound(tmp_path / "data" / "wav8k/min" / part / name / "x.wav")
    prepare_wsjmix(tmp_path / "data", tmp_path / "a")
    files = ["wsj_tr.csv", "wsj_cv.csv", "wsj_tt.csv"]
    parts = [str(tmp_path / "a" / name) for name in files]
    prepare_wsjmix(tmp_path / "data", tmp_path / "b", parts=parts)
    for name in files:
        before, after = (tmp_path / x / name for x in "ab")
        assert before.read_bytes() == after.read_bytes()


@pytest.mark.parametrize("mixture", ["mix_clean", "mix_both"])
def test_metadata_of_librimix(tmp_path, mixture):
    header = ["mixture_ID", "mixture_path", "source_1_path", "source_2_path"]
    header += ["noise_path"] * (mixture == "mix_both") + ["length"]
    folder = tmp_path / "Libri2Mix" / "wav8k" / "min" / "metadata"
    for part in ("train-100", "dev", "test"):
        rows = []
        for name in ("2-2-2_3-3-3", "1-1-1_2-2-2"):
            paths = [
                sound(tmp_path / "audio" / part / column / f"{name}.wav")
                for column in header[1:-1]
            ]
            rows.append([name, *paths, 4000])
        write_csv(folder / f"mixture_{part}_{mixture}.csv", header, rows)
        write_csv(folder / f"metrics_{part}_{mixture}.csv", ["mixture_ID"], [])
    prepare_wsjmix(tmp_path / "Libri2Mix", tmp_path / "save", mixture=mixture)
    rows = read(tmp_path / "save" / "wsj_tr.csv")
    assert [row["ID"] for row in rows] == ["1-1-1_2-2-2", "2-2-2_3-3-3"]
    path = tmp_path / "audio/train-100/source_2_path/1-1-1_2-2-2.wav"
    assert rows[0]["s2_wav"] == str(path)
    assert ("noise_wav" in rows[0]) == (mixture == "mix_both")
    report = (tmp_path / "save" / "data_report.md").read_text()
    assert "| mixture_train-100_mix" in report and "| 3 | 8000 |" in report


def test_a_csv_with_more_sources_than_speakers_is_refused(tmp_path):
    header = ("ID", "mix_wav", "s1_wav", "s2_wav", "s3_wav")
    for name in ("train", "valid", "test"):
        write_csv(tmp_path / f"{name}.csv", header, [list("abcde")])
    with pytest.raises(ValueError, match="s3_wav of .*train.csv exists, but"):
        find_mixtures(tmp_path, 2, 8000)
    # An empty column is none.
    for name in ("train", "valid", "test"):
        write_csv(tmp_path / f"{name}.csv", header, [[*"abcd", ""]])
    assert len(find_mixtures(tmp_path, 2, 8000)[1][0].rows) == 1


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_csv_in_an_encoding_that_is_certain_is_read(tmp_path, encoding, end):
    text = f"ID,mix_wav,s1_wav,s2_wav{end}é,a,b,c{end}"
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.csv").write_bytes(text.encode(encoding))
    _, parts = find_mixtures(tmp_path, 2, 8000)
    assert [row["ID"] for row in parts[0].rows] == ["é"]


def test_what_is_no_csv_is_named(tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.csv").write_text("ID\n" + "x" * 200_000)
    with pytest.raises(
        ValueError, match="train.csv is not valid CSV at line 2"
    ):
        find_mixtures(tmp_path, 2, 8000)


def test_a_csv_without_rows_is_an_error(tmp_path):
    for name in ("train", "valid", "test"):
        write_csv(tmp_path / f"{name}.csv", ("ID", "mix_wav", "s1_wav"), [])
    with pytest.raises(ValueError, match="train.csv has no rows"):
        find_mixtures(tmp_path, 1, 8000)
