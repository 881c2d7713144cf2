"""The score of a model on sets, and on mixtures made of speakers' folders."""

import csv
import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_flashformer import FlashFormer
from speechbrain_flashformer.inference import built_in_model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def bench(load_benchmark):
    return load_benchmark("evaluate_model")


class Model:
    """Gives what ``separate`` makes of mixtures [1, T]."""

    hparams = SimpleNamespace(sample_rate=8000)

    def __init__(self, separate):
        self.separate_batch = separate


def write_set(folder, sources):
    signals = {"mix": sum(sources), "s1": sources[0], "s2": sources[1]}
    for part, signal in signals.items():
        (folder / part).mkdir(parents=True)
        soundfile.write(folder / part / "a.wav", signal, 8000, "FLOAT")


def test_the_score_is_what_separation_adds(bench, tmp_path):
    rng = np.random.default_rng(1)
    sources = 0.1 * rng.normal(size=(2, 8000)).astype("f4")
    write_set(tmp_path / "set", sources)
    mixture = bench.score(
        Model(lambda x: torch.stack([x, x], 2)), tmp_path / "set"
    )
    assert mixture["mixtures"] == 1
    assert mixture["si-snr_i"] == 0
    # The other order, each with a hundredth of the other: 40 dB, where the
    # mixture has as much of both.
    leaky = torch.from_numpy(sources[::-1] + 0.01 * sources).T[None]
    near = bench.score(Model(lambda _: 2 * leaky), tmp_path / "set")
    assert near["si-snr_i"] == pytest.approx(40, abs=0.5)
    assert near["level (dB)"] == pytest.approx(6.02, abs=0.05)
    assert near["worse (%)"] == 0
    noise = torch.from_numpy(rng.normal(size=(1, 8000, 2)).astype("f4"))
    far = bench.score(Model(lambda _: noise), tmp_path / "set")
    assert far["worse (%)"] == 100


def test_a_folder_of_speakers_is_mixed(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "MADE", 5)
    rng = np.random.default_rng(1)
    for speaker in "ab":
        (tmp_path / speaker).mkdir()
        for name, seconds in (("short", 2), ("long", 4)):
            noise = 0.1 * rng.normal(size=8000 * seconds)
            path = tmp_path / speaker / f"{name}.wav"
            soundfile.write(path, noise, 8000)
    model = Model(lambda x: torch.stack([x, x], 2))
    heard = list(bench.make_mixtures(model, tmp_path))
    assert [len(signal) for signals in heard for signal in signals] == [
        24000
    ] * 15
    for mixture, first, second in heard:
        torch.testing.assert_close(mixture, first + second)
        # A recording shorter than the mixture would leave silence around it.
        for source in (first, second):
            assert source[:80].any() and source[-80:].any()
    assert bench.score(model, tmp_path)["mixtures"] == 5


def test_one_person_alone_is_to_be_in_one_output(bench, tmp_path):
    speech = 0.1 * np.random.default_rng(1).normal(size=8000).astype("f4")
    write_set(tmp_path / "set", [speech, np.zeros_like(speech)])
    split = torch.from_numpy(np.stack([0.1 * speech, speech], 1))[None]
    row = bench.score(Model(lambda _: split), tmp_path / "set")
    assert row["alone, other output (dB)"] == pytest.approx(20, abs=0.01)
    assert row["alone, si-snr"] > 60
    noise = 0.1 * torch.randn(1, 8000, 2)
    row = bench.score(Model(lambda _: split + noise), tmp_path / "set")
    assert row["alone, si-snr"] < 3


def test_turns_in_the_wrong_output_are_counted(bench, tmp_path):
    rng = np.random.default_rng(1)
    sources = np.zeros((2, 8000), "f4")
    turns = [(0, 0, 2000), (1, 2000, 4000), (0, 4000, 6000), (1, 6000, 8000)]
    for speaker, start, stop in turns:
        sources[speaker, start:stop] = 0.1 * rng.normal(size=stop - start)
    write_set(tmp_path / "set", sources)
    (tmp_path / "set/turns").mkdir()
    lines = [f"{who + 1},{start},{stop}\n" for who, start, stop in turns]
    text = "speaker,start,stop\n" + "".join(lines)
    (tmp_path / "set/turns/a.csv").write_text(text)
    for wrong, order in enumerate([(0, 0, 0, 0), (0, 0, 1, 0), (1, 0, 1, 0)]):
        out = torch.from_numpy(
            np.concatenate(
                [
                    sources[:, start:stop][[swap, 1 - swap]]
                    for swap, (_, start, stop) in zip(order, turns)
                ],
                1,
            )
        )
        model = Model(None)
        model.separate_audio = lambda *_, out=out: out.T[None]
        row = bench.score(model, tmp_path / "set")
        assert row == {"mixtures": 1, "wrong turns (%)": 25 * wrong}


@pytest.mark.parametrize("word", ["cv=nowhere", "cv"])
def test_a_set_is_a_folder(bench, tmp_path, word):
    with pytest.raises(FileNotFoundError, match=f"{word}: give NAME=FOLDER"):
        bench.find_sets([word], tmp_path)


def test_an_empty_set_is_told(bench, tmp_path):
    (tmp_path / "mix").mkdir()
    with pytest.raises(FileNotFoundError, match="mix has no wav files"):
        bench.score(Model(None), tmp_path)


@pytest.mark.parametrize(
    "part, signal, rate, says",
    [
        ("mix", np.ones(80), 16000, "mix/a.wav is at 16000 Hz, not at 8000"),
        ("s2", np.ones(90), 8000, "s2/a.wav is not mono or not as long"),
        ("s1", None, None, "cannot read .*s1/a.wav"),
    ],
)
def test_a_set_that_cannot_be_scored_is_named(
    bench, tmp_path, part, signal, rate, says
):
    write_set(tmp_path, [np.ones(80), np.ones(80)])
    path = tmp_path / part / "a.wav"
    path.unlink()
    if signal is not None:
        soundfile.write(path, signal, rate)
    with pytest.raises(ValueError, match=says):
        bench.score(Model(None), tmp_path)


def test_prompts_are_sorted_by_who_speaks(bench, tmp_path):
    sounds = tmp_path / "sounds"
    for name in ("en_f_Ann/digits/1", "es_f_Ann/1", "fr/silence/2", "fr/3"):
        path = sounds / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.ones(80), 8000)
    soundfile.write(sounds / "fr/tt-monkeys.wav", np.ones(80), 8000)
    importlib.import_module("prompt_speakers").main(sounds, tmp_path / "out")
    found = sorted((tmp_path / "out").rglob("*.wav"))
    names = [path.relative_to(tmp_path / "out").as_posix() for path in found]
    assert names == [
        "Ann/en_f_Ann_digits_1.wav",
        "Ann/es_f_Ann_1.wav",
        "fr/fr_3.wav",
    ]


def test_recordings_that_are_too_short_are_told(bench, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.ones(8000), 8000)
    with pytest.raises(FileNotFoundError, match="no recording of 3 s"):
        bench.score(Model(None), tmp_path)


@pytest.mark.parametrize("name", ["lesions", "robustness", "evaluate_model"])
def test_the_page_says_what_the_figures_say(name):
    page = (BENCHMARKS.parent / "docs" / "experiments.md").read_text()
    with (BENCHMARKS / "results" / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    if name == "evaluate_model":
        lines = [" | ".join(row["si-snr_i"] for row in rows)]
    else:
        lines = [" | ".join(row.values()) for row in rows]
    assert rows
    for line in lines:
        assert f"| {line} |" in page


def test_the_card_says_what_the_figures_say():
    card = (built_in_model() / "README.md").read_text()
    path = BENCHMARKS / "results" / "evaluate_model.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ("si-snr_i", "5th percentile", "worse (%)")
    for row in rows:
        figures = (f"{float(row[name]):.1f}" for name in columns)
        assert f"| {' | '.join(figures)} |" in card


def test_a_window_is_never_widened(bench):
    masknet = FlashFormer(16, d_model=16, num_layers=1, nhead=2, window=(3, -1))
    importlib.import_module("lesions").narrow(masknet, 12)
    assert masknet.layers[0].attention.window == (3, 12)


def test_a_causal_model_is_refused(bench, packed_causal):
    lesions = importlib.import_module("lesions")
    with pytest.raises(ValueError, match="is causal"):
        lesions.main(packed_causal, [])


def test_every_lesion_is_felt(bench):
    lesions = importlib.import_module("lesions").lesions(token_rate=125)
    torch.manual_seed(0)
    features = torch.rand(1, 16, 2400)  # 300 tokens
    masks = []
    for change in lesions.values():
        torch.manual_seed(1)
        masknet = FlashFormer(
            16, d_model=16, num_layers=1, nhead=2, d_ffn=16, d_frame=16
        )
        change(masknet)
        with torch.no_grad():
            masks.append(masknet(features))
    for mask in masks[1:]:
        assert (mask - masks[0]).abs().max() > 1e-4 * masks[0].abs().max()
