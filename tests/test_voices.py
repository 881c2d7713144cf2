"""The starter set: its layout, levels, speakers and failures."""

import json
import re

import numpy as np
import pytest
import soundfile

from speechbrain_flashformer import voices
from speechbrain_flashformer.voices import make_voices

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
    for part, size in zip(("tr", "cv", "tt"), SIZES):
        mixtures = read(folder, num_spks, part)
        assert len(mixtures) == size
        for signals in mixtures.values():
            # Rounded to 16 bit each.
            error = signals[0] - signals[1:].sum(0)
            assert np.abs(error).max() < (num_spks + 1) / 32768
            level = 10 * np.log10((signals[1:] ** 2).mean(1))
            assert np.ptp(level) <= 5.01
            assert np.abs(signals).max() == pytest.approx(0.9, abs=1e-3)
            assert signals.shape[1] > 8000


def test_no_speaker_is_in_two_parts(made):
    folder, num_spks = made
    heard = {
        part: {
            name
            for stem in read(folder, num_spks, part)
            for name in stem.split("_")[1:]
        }
        for part in ("tr", "cv", "tt")
    }
    assert all(heard.values())
    assert not heard["tr"] & heard["tt"] and not heard["tr"] & heard["cv"]
    assert not heard["cv"] & heard["tt"]


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
    assert not (tmp_path / "voices.partial").exists()


def test_the_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(voices, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r"speechbrain-flashformer\[demo\]"):
        make_voices(tmp_path / "voices")
