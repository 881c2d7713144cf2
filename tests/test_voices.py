"""The starter set: its layout, levels, speakers and failures."""

import itertools
import json
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
from tqdm import tqdm

from speechbrain_flashformer.training import espeak, voices
from speechbrain_flashformer.training.voices import make_voices

SIZES = (6, 3, 3)


def read(folder, num_spks, part):
    """Name -> signals [1 + S, T] of each mixture."""
    root = folder / "wav8k" / "min" / part
    names = ["mix", *(f"s{i + 1}" for i in range(num_spks))]
    found = {}
    for path in sorted((root / "mix").iterdir()):
        signals = [soundfile.read(root / name / path.name) for name in names]
        assert {rate for _, rate in signals} == {8000}
        found[path.stem] = np.stack([signal for signal, _ in signals])
    return found


@pytest.fixture(scope="module", params=[2, 3])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("set") / "voices"
    make_voices(
        folder, request.param, SIZES, seed=3, utterances=1, progressbar=False
    )
    return folder, request.param


def test_mixtures_are_sums_with_the_levels_of_wsj0_mix(made):
    folder, num_spks = made
    ranges = []
    for part, size in zip(("tr", "cv", "tt"), SIZES):
        mixtures = read(folder, num_spks, part)
        assert len(mixtures) == size
        for signals in mixtures.values():
            # Rounded to 16 bit each.
            error = signals[0] - signals[1:].sum(0)
            assert np.abs(error).max() < (num_spks + 1) / 32768
            level = 10 * np.log10((signals[1:] ** 2).mean(1))
            assert np.ptp(level) <= 5.01
            ranges.append(np.ptp(level))
            assert np.abs(signals).max() == pytest.approx(0.9, abs=1e-3)
            assert signals.shape[1] > 8000
    # Not all alike, but drawn.
    assert max(ranges) > 2


def test_speakers_of_a_mixture_differ_and_are_of_their_part(made):
    folder, num_spks = made
    families = voices._deal_families(np.random.default_rng(3))
    for part in ("tr", "cv", "tt"):
        tracts = {
            "".join(filter(str.isalnum, variant))
            for family in families[part]
            for variant in family
        }
        for stem in read(folder, num_spks, part):
            # The last letter is one of several people with one vocal tract.
            heard = [name[:-1] for name in stem.split("_")[1:]]
            assert len(set(heard)) == num_spks and set(heard) <= tracts


def test_no_vocal_tract_is_in_two_parts():
    families = voices._deal_families(np.random.default_rng(3))
    tracts = [tract for part in families.values() for f in part for tract in f]
    assert len(tracts) == len(set(tracts)) > 50
    # Nor are relatives: Alex and Alex2, but m1 and m2 are none.
    stems = [
        {tract.lower().rstrip("0123456789") for tract in sum(part, [])}
        for part in families.values()
    ]
    for one, other in itertools.combinations(stems, 2):
        assert {stem for stem in one & other if len(stem) > 1} == set()
    sizes = [sum(map(len, families[part])) for part in ("tr", "cv", "tt")]
    assert min(sizes) >= 5 and sizes[0] > 0.6 * sum(sizes)


def noise(lines, *_):
    """In the place of speech, quickly."""
    return list(np.random.default_rng(0).normal(size=(len(lines), 80)))


def test_a_seed_says_who_says_what(tmp_path, monkeypatch):
    def listen(lines, *_):
        said.append([(line["tract"], line["text"]) for line in lines])
        return noise(lines)

    said, made = [], []
    monkeypatch.setattr(voices, "speak_all", listen)
    for n, (seed, train) in enumerate(((0, 3), (0, 5), (1, 3))):
        folder = make_voices(
            tmp_path / str(n), 2, (train, 2, 2), seed, progressbar=False
        )
        names = {part: [] for part in ("tr", "cv", "tt")}
        for path in sorted(folder.glob("*/*/*/s1/*")):
            names[path.parts[-3]].append(path.stem)
        made.append(names)
    assert [len(parts["tr"]) for parts in made] == [3, 5, 3]
    # Another training set has the same validation and test.
    assert said[0] == said[1]
    # Another seed: other vocal tracts for training, which say other things.
    for one, other in zip(said[0][0], said[2][0]):
        assert one != other
    for part in ("cv", "tt"):
        assert made[0][part] == made[1][part] != made[2][part]
    assert made[0]["tr"] != made[2]["tr"]


@pytest.mark.parametrize("made", [2], indirect=True)
def test_the_same_seed_gives_the_same_files(made, tmp_path):
    folder, num_spks = made
    again = make_voices(
        tmp_path / "b", num_spks, SIZES, 3, utterances=1, progressbar=False
    )
    for path in sorted(folder.rglob("*.wav")):
        twin = again / path.relative_to(folder)
        assert path.read_bytes() == twin.read_bytes(), path.name


def test_a_finished_set_is_found_not_made_again(made):
    folder, num_spks = made
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    make_voices(folder, num_spks, SIZES, 3, utterances=1, progressbar=False)
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_another_set_in_the_way_is_an_error(made):
    folder, num_spks = made
    with pytest.raises(FileExistsError, match=re.escape(str(folder))):
        make_voices(folder, num_spks, SIZES, seed=4, progressbar=False)


def test_an_interrupted_set_is_never_taken_for_a_finished_one(
    tmp_path, monkeypatch
):
    def fail(*args):
        raise KeyboardInterrupt

    folder = tmp_path / "voices"
    monkeypatch.setattr(voices, "speak_all", noise)
    with monkeypatch.context() as patch:
        patch.setattr(voices, "_write_mixture", fail)
        with pytest.raises(KeyboardInterrupt):
            make_voices(folder, 2, (1, 1, 1), utterances=1, progressbar=False)
    assert not folder.exists()
    make_voices(folder, 2, (1, 1, 1), utterances=1, progressbar=False)
    assert json.loads((folder / voices.MARKER).read_text())["sizes"] == [
        1,
        1,
        1,
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["voices"]


def test_what_a_killed_process_left_is_removed_by_the_next(
    tmp_path, monkeypatch
):
    """But not what another one is writing."""
    code = """
import os, pathlib, signal, sys
from speechbrain_flashformer.training import voices
def kill(lines, *_):
    os.kill(os.getpid(), signal.SIGKILL)
voices.speak_all = kill
voices.make_voices(sys.argv[1], 2, (1, 1, 1), progressbar=False)
"""
    folder = tmp_path / "voices"
    killed = subprocess.run([sys.executable, "-c", code, str(folder)])
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("voices.") and left.suffix == ".partial"
    monkeypatch.setattr(voices, "speak_all", noise)
    with voices._made_beside(folder) as beside:
        assert list(tmp_path.iterdir()) == [beside]
        make_voices(folder, 2, (1, 1, 1), progressbar=False)
        assert set(tmp_path.iterdir()) == {beside, folder}
    assert list(tmp_path.iterdir()) == [folder]


def test_two_that_make_one_set_at_once_leave_it_whole(tmp_path, monkeypatch):
    met = threading.Barrier(2, timeout=60)

    def together(lines, *args):
        met.wait()
        return [np.ones(800) for _ in lines]

    monkeypatch.setattr(voices, "speak_all", together)
    folder = tmp_path / "voices"
    with ThreadPoolExecutor(2) as pool:
        options = {"sizes": (1, 1, 1), "utterances": 1, "progressbar": False}
        both = [pool.submit(make_voices, folder, **options) for _ in "ab"]
        assert [making.result() for making in both] == [folder, folder]
    assert len(list(folder.rglob("*.wav"))) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["voices"]


def test_the_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(voices, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r"speechbrain-flashformer\[demo\]"):
        make_voices(tmp_path / "voices")


def test_a_failure_of_espeak_is_one_line(tmp_path, capfd):
    line = {"voice": "xx+none", "text": "a", "rate": 175, "pitch": 50}
    lines = [{**line, "range": 50}]
    with pytest.raises(OSError, match="eSpeak NG failed with exit status 1"):
        espeak.speak_all(lines, 8000, tmp_path, tqdm(disable=True))
    said = capfd.readouterr().err.splitlines()
    assert said == ["eSpeak NG has no voice xx+none"]
    assert not list(tmp_path.iterdir())
