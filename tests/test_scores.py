"""Scores of a test: the same in threads, written as they come, summed up."""

import csv
import importlib.util
import threading

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_flashformer.training import scores
from speechbrain_flashformer.training.metrics import (
    check_perceptual,
    perceptual,
    sdr,
)
from speechbrain_flashformer.training.scores import (
    ResultsWriter,
    quick_scores,
    sort_key,
    write_example,
    write_results,
)


def signals(samples, noise=0.3):
    targets = torch.randn(2, samples)
    estimates = targets + noise * torch.randn(2, samples)
    return targets.sum(0), targets, estimates


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_those_of_one_after_another_and_grow_on_disk(tmp_path):
    writer = ResultsWriter(tmp_path / "running", 8000, ["stoi"])
    given = []
    for index in range(30):
        mixture, targets, estimates = signals(8000, 0.05 * (index + 1))
        row = {"snt_id": f"x{index:02}", "si-snr": 1.0, "si-snr_i": -index}
        given.append((targets, mixture, estimates))
        writer.add(row, mixture, targets, estimates)
    assert read(tmp_path / "running"), "nothing there before the end"
    rows = writer.close()
    assert [row["snt_id"] for row in rows] == [f"x{i:02}" for i in range(30)]
    for row, (targets, mixture, estimates) in zip(rows, given):
        after = sdr(targets, estimates).mean().item()
        before = sdr(targets, mixture.expand_as(targets)).mean().item()
        assert row["sdr"] == pytest.approx(after)
        assert row["sdr_i"] == pytest.approx(after - before)
        assert 0 < row["stoi"] < 1
    assert rows[0]["stoi"] > rows[-1]["stoi"]
    worst = [row["snt_id"] for row, _ in writer.worst]
    assert worst == ["x29", "x28", "x27", "x26", "x25"]
    torch.testing.assert_close(writer.worst[0][1][1], given[29][0])


def test_what_is_no_number_is_the_worst(tmp_path):
    writer = ResultsWriter(tmp_path / "running", 8000)
    for index, gain in enumerate([3.0, float("nan"), -1.0, 2.0, 5.0, 4.0]):
        row = {"snt_id": index, "si-snr": gain, "si-snr_i": gain}
        writer.add(row, *signals(2000))
    rows = writer.close()
    worst = [row["snt_id"] for row, _ in writer.worst]
    assert worst == [1, 2, 3, 0, 5]
    assert worst == [r["snt_id"] for r in sorted(rows, key=sort_key)[:5]]


def test_scoring_takes_no_more_threads_than_torch_may(tmp_path, monkeypatch):
    teams = {}

    def count(targets, both):
        teams[threading.get_ident()] = torch.get_num_threads()
        return torch.ones(2, 2)

    monkeypatch.setattr(scores, "sdr", count)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        writer = ResultsWriter(tmp_path / "running", 8000)
        for index in range(20):
            row = {"snt_id": index, "si-snr": 0.0, "si-snr_i": 0.0}
            writer.add(row, *signals(100))
        writer.close()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(teams.values()) == {1} and len(teams) <= 3


def test_a_mixture_that_cannot_be_scored_is_named(tmp_path):
    writer = ResultsWriter(tmp_path / "running", 8000)
    mixture, targets, estimates = signals(2000)
    row = {"snt_id": "x7", "si-snr": 0.0, "si-snr_i": 0.0}
    writer.add(row, mixture, targets, estimates[:, :1000])
    with pytest.raises(RuntimeError, match="cannot score x7: "):
        writer.close()


def test_a_speaker_that_is_left_out_is_no_average_one():
    _, targets, estimates = signals(4000)
    estimates[1] = 0
    heard, silent = sdr(targets, estimates)
    assert heard > 5 and silent == pytest.approx(-80)


def test_what_finds_no_speech_does_not_spoil_the_mean(tmp_path):
    keys = ["sdr", "sdr_i", "si-snr", "si-snr_i"]
    rows = [
        {"snt_id": name, "stoi": stoi, **dict.fromkeys(keys, value)}
        for name, stoi, value in (
            ("a", 0.5, 1.0),
            ("b", float("nan"), float("nan")),
            ("c", 0.7, 3.0),
        )
    ]
    mean = write_results(tmp_path / "r.csv", rows, ["stoi"])["avg"]
    assert mean["stoi"] == pytest.approx(0.6)
    # A score that must be there spoils it.
    assert np.isnan(mean["sdr"])
    short = torch.randn(1, 300)
    assert np.isnan(perceptual("stoi", short, short, 8000)).all()


def test_a_table_ends_with_mean_median_and_percentile(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {
            "snt_id": f"x{i:03}",
            "sdr": a,
            "sdr_i": b,
            "si-snr": c,
            "si-snr_i": d,
            "level_db": 0.0,
        }
        for i, (a, b, c, d) in enumerate(rng.normal(size=(99, 4)))
    ]
    path = tmp_path / "test_results.csv"
    summary = write_results(path, rows[::-1])
    *written, mean, median, low = read(path)
    assert [row["snt_id"] for row in written] == [r["snt_id"] for r in rows]
    assert list(mean) == ["snt_id", "sdr", "sdr_i", "si-snr", "si-snr_i"]
    gains = sorted(row["sdr_i"] for row in rows)
    assert float(mean["sdr_i"]) == pytest.approx(sum(gains) / 99)
    assert float(median["sdr_i"]) == gains[49]
    assert gains[4] <= float(low["sdr_i"]) <= gains[5]
    assert summary["avg"]["sdr"] == float(mean["sdr"])


def test_a_table_is_whole_or_not_there(tmp_path):
    row = {"snt_id": "x", "sdr": 1, "sdr_i": 1, "si-snr": 1, "si-snr_i": 1}
    path = tmp_path / "test_results.csv"
    write_results(path, [row])
    before = path.read_bytes()

    class Torn(dict):
        def get(self, *_):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_results(path, [row, Torn(row)])
    assert path.read_bytes() == before


def test_items_of_a_batch_are_scored_on_their_own_length():
    mixture, targets, estimates = (x[None] for x in signals(4000))
    targets, estimates = targets.mT.clone(), estimates.mT.clone()
    one, _ = quick_scores(
        ["a"],
        mixture[:, :1000],
        targets[:, :1000],
        estimates[:, :1000],
        torch.ones(1),
    )
    (padded,), ((m, clean, separated),) = quick_scores(
        ["a"], mixture, targets, estimates.flip(2), torch.tensor([0.25])
    )
    assert m.shape == (1000,) and clean.shape == separated.shape == (2, 1000)
    assert torch.equal(separated, estimates[0, :1000].T)
    for name in ("si-snr", "si-snr_i", "level_db"):
        assert padded[name] == pytest.approx(one[0][name], abs=1e-3)
    assert padded["polarity"] == 1
    inverted, _ = quick_scores(
        ["a"], mixture, targets, -10 * targets, torch.ones(1)
    )
    assert inverted[0]["polarity"] == -1
    assert inverted[0]["level_db"] == pytest.approx(20, abs=1e-3)


@pytest.mark.parametrize("gain", [50, -50])
def test_estimates_are_saved_as_their_source_is(tmp_path, gain):
    mixture, targets, estimates = signals(4000)
    write_example(tmp_path, "a", mixture, targets, gain * estimates, 8000)
    clean, rate = soundfile.read(tmp_path / "a_s2.wav")
    estimate, _ = soundfile.read(tmp_path / "a_s2hat.wav")
    assert rate == 8000
    # All are turned down alike, so that none clips.
    peaks = []
    for path in tmp_path.iterdir():
        peaks.append(np.abs(soundfile.read(path)[0]).max())
    assert max(peaks) == pytest.approx(0.99, abs=1e-3)
    ratio = targets[1].std() / targets.sum(0).std()
    mixed, _ = soundfile.read(tmp_path / "a_mix.wav")
    assert clean.std() / mixed.std() == pytest.approx(ratio.item(), rel=1e-2)
    assert estimate.std() == pytest.approx(clean.std(), rel=1e-2)
    assert np.dot(clean, estimate) > 0
    assert len(list(tmp_path.iterdir())) == 5


def test_mixtures_of_any_name_have_files_of_their_own(tmp_path):
    names = ["a/b", "a_b", "a\\b", "..", "é" * 300, "é" * 301, "x\ny"]
    names += ["take [1]", "100 % 'so' {0} $x", "名前"]
    for name in names:
        mixture, targets, estimates = signals(80)
        write_example(tmp_path, name, mixture, targets, estimates, 8000)
    files = [path.name for path in tmp_path.iterdir()]
    assert len(files) == 5 * len(names)
    for name in ("take [1]", "100 % 'so' {0} $x", "名前"):
        assert f"{name}_s2hat.wav" in files


@pytest.mark.parametrize("name", ["stoi", "pesq"])
def test_perceptual_measures_fall_with_noise(name):
    package = {"stoi": "pystoi", "pesq": "pesq"}[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (the extra eval)")
    rng = np.random.default_rng(0)
    # Noise in bursts, as syllables are: what these measures take for speech.
    bursts = np.repeat(rng.uniform(0, 1, 40) > 0.5, 400) * 0.3 + 1e-3
    clean = torch.from_numpy(bursts * rng.normal(size=16000))[None].float()
    noise = 0.1 * torch.randn(1, 16000)
    values = [
        perceptual(name, clean, clean + gain * noise, 8000)[0]
        for gain in (0, 0.3, 3)
    ]
    assert values[0] > values[1] > values[2]


@pytest.mark.parametrize("rate, band", [(8000, "nb"), (16000, "wb")])
def test_pesq_is_of_the_band_of_its_rate(rate, band):
    pesq = pytest.importorskip("pesq", reason="needs the extra eval").pesq
    rng = np.random.default_rng(0)
    bursts = np.repeat(rng.uniform(0, 1, 40) > 0.5, rate // 20) * 0.3 + 1e-3
    clean = bursts * rng.normal(size=2 * rate)
    heard = clean + 0.1 * rng.normal(size=2 * rate)
    pair = (torch.from_numpy(x)[None] for x in (clean, heard))
    expected = pesq(rate, clean, heard, band)
    assert perceptual("pesq", *pair, rate) == [pytest.approx(expected)]


def test_what_cannot_be_measured_is_told_first(monkeypatch):
    with pytest.raises(ValueError, match="no measure 'mos'"):
        check_perceptual(["mos"], 8000)
    with pytest.raises(ValueError, match="8000 and 16000 Hz, not at 44100"):
        check_perceptual(["pesq"], 44100)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"speechbrain-flashformer\[eval\]"):
        check_perceptual(["stoi"], 8000)
