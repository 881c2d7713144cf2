"""The score of a model on sets, and on mixtures made of speakers' folders."""

import csv
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from ruamel.yaml import YAML

from speechbrain_flashformer import FlashFormer
from speechbrain_flashformer.inference import built_in_model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def bench(load_benchmark):
    return load_benchmark("evaluate_model")


@pytest.fixture(scope="module")
def conditions(bench, load_benchmark):
    return load_benchmark("conditions")


class Model:
    """Gives what ``separate`` makes of mixtures [1, T]."""

    hparams = SimpleNamespace(sample_rate=8000)

    def __init__(self, separate, can_stream=False):
        self.separate_batch = separate
        self.mods = SimpleNamespace(
            masknet=SimpleNamespace(can_stream=can_stream)
        )


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
        heard = {"voice": out, "network": torch.from_numpy(sources)}
        model.separate_audio = lambda *_, turns, of=heard: of[turns].T[None]
        row = bench.score(model, tmp_path / "set")
        assert row == {
            "mixtures": 1,
            "wrong turns (%)": 25 * wrong,
            "wrong turns, network (%)": 0,
            # One chunk, in one order.
            "wrong turns, oracle (%)": 0,
        }
        stream = Model(lambda _, of=out: of.T[None], can_stream=True)
        stream.separate_audio = lambda *_, turns: torch.from_numpy(
            sources.T[None]
        )
        causal = bench.score(stream, tmp_path / "set")
        assert causal["wrong turns, stream (%)"] == 25 * wrong
        assert causal["wrong turns (%)"] == 0


def test_the_oracle_knows_the_sources_but_not_their_order(bench):
    sources = torch.randn(2, 9500)
    plan = bench.ChunkPlan(2000, 500, align=1)
    oracle = bench.Oracle(sources, plan, np.random.default_rng(0))
    orders = set()
    for start in range(0, 9000, 1500):
        (told,) = oracle(torch.zeros(1, 2000))
        true = sources[:, start : start + 2000]
        leaky = true + 0.1 * true.flip(0)
        orders.add(torch.equal(told, leaky))
        assert torch.equal(told, leaky) or torch.equal(told, leaky.flip(0))
    assert orders == {True, False}


def test_an_exported_model_is_scored_and_nothing_is_written(
    bench, tmp_path, monkeypatch, capsys
):
    onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    helper, path = onnx.helper, tmp_path / "twice.onnx"
    node = helper.make_node("Unsqueeze", ["mixture", "two"], ["x"])
    twice = helper.make_node("Concat", ["x", "x"], ["sources"], axis=2)
    graph = helper.make_graph(
        [node, twice],
        "twice",
        [helper.make_tensor_value_info("mixture", 1, ["B", "T"])],
        [helper.make_tensor_value_info("sources", 1, ["B", "T", 2])],
        [helper.make_tensor("two", onnx.TensorProto.INT64, [1], [2])],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )
    helper.set_model_props(model, {"sample_rate": "8000"})
    onnx.save(model, path)
    rng = np.random.default_rng(1)
    write_set(tmp_path / "set", 0.1 * rng.normal(size=(2, 8000)).astype("f4"))
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    bench.main([str(path), f"set={tmp_path / 'set'}"])
    assert "'mixtures': 1, 'si-snr_i': 0.0" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


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


def test_mixtures_of_another_layout_are_no_speakers(bench, tmp_path):
    for name in ("mixture", "source1", "source2"):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "a.wav", np.ones(40000), 8000)
    with pytest.raises(ValueError, match="has mixture but no mix: name its"):
        bench.score(Model(None), tmp_path)


def test_recordings_that_are_too_short_are_told(bench, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.ones(8000), 8000)
    with pytest.raises(FileNotFoundError, match="no recording of 3 s"):
        bench.score(Model(None), tmp_path)


@pytest.mark.parametrize("name", ["ablation_at_inference", "robustness"])
def test_the_card_has_the_table(name):
    text = (built_in_model() / "README.md").read_text()
    with (BENCHMARKS / "results" / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        assert f"| {' | '.join(row.values())} |" in text


@pytest.mark.parametrize("name", ["evaluate_model", "evaluate_streaming"])
def test_the_card_says_what_the_figures_say(name):
    card = built_in_model(streaming=name == "evaluate_streaming") / "README.md"
    card, path = card.read_text(), BENCHMARKS / "results" / f"{name}.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ("si-snr_i", "5th percentile", "worse (%)")
    for row in rows:
        if row["si-snr_i"]:
            figures = (f"{float(row[name]):.1f}" for name in columns)
            assert f"| {' | '.join(figures)} |" in card
    index = YAML(typ="safe").load(card.split("---\n")[1])["model-index"]
    (metric,) = index[0]["results"][0]["metrics"]
    assert metric["value"] == round(float(rows[0]["si-snr_i"]), 1)
    said = " ".join(card.split())
    (alone,) = (row for row in rows if row["set"] == "alone")
    (talks,) = (row for row in rows if row["set"] == "conversations")
    below = float(alone["alone, other output (dB)"])
    first = float(alone["alone, si-snr"])
    how = ", stream" if name == "evaluate_streaming" else ""
    turns = float(talks[f"wrong turns{how} (%)"])
    assert f"other output lies {below:.0f} dB below" in said
    assert f"SI-SNR of the first is {first:.0f} dB" in said
    assert f"In 80 conversations {turns:.0f} %" in said
    if name == "evaluate_streaming":
        moved = float(talks["wrong turns (%)"])
        assert f"and {moved:.0f} % if turns are moved" in said


# --- mixtures that are heard otherwise ---------------------------------------


@pytest.fixture
def signals():
    """A mixture and its two sources, [T, 3], 2.5 s."""
    generator = torch.Generator().manual_seed(0)
    sources = torch.randn(20000, 2, generator=generator)
    return torch.cat([sources.sum(1, keepdim=True), sources], 1)


def test_who_leaves_the_mixture_gains_nothing(bench, conditions, signals):
    """The same is heard and scored, whatever is done to it."""
    idle = Model(lambda mixture: mixture[..., None].expand(-1, -1, 2))
    for name, change, arrange in conditions.CONDITIONS:
        gain = bench.gain(idle, signals, change, arrange)
        assert gain == pytest.approx(0, abs=1e-3), name


def test_what_is_heard(conditions, signals):
    heard = {
        name: change(8000, signals) for name, change, _ in conditions.CONDITIONS
    }
    alone = heard["as is"]
    assert torch.equal(alone, signals)
    late = heard["after 3 s of silence"]
    assert not late[:24000].any() and torch.equal(late[24000:], signals)
    click = heard["after a click"]
    assert torch.equal(click[800:], signals) and click.count_nonzero() == (
        signals.count_nonzero() + 1
    )
    assert click[400, 0] == 10 * signals[:, 0].abs().max()
    for name, most in (("noise at 20 dB", -20), ("noise at 10 dB", -10)):
        noise = (heard[name] - signals)[:, 0]
        ratio = noise.square().mean() / signals[:, 0].square().mean()
        assert 10 * ratio.log10() == pytest.approx(most, abs=0.2)
        assert torch.equal(heard[name][:, 1:], signals[:, 1:])
    clipped = heard["clipped"][:, 0].abs().max()
    assert clipped == pytest.approx(2 * signals[:, 0].std().item())
    assert torch.equal(heard["inverted"], -signals)
    one = heard["one speaker inverted"]
    assert torch.equal(one[:, 1:], signals[:, 1:] * torch.tensor([-1, 1]))
    rest = signals[:, 0] - signals[:, 1:].sum(1)  # noise stays
    torch.testing.assert_close(one[:, 0] - one[:, 1:].sum(1), rest)
    power = torch.fft.rfft(heard["through a telephone"], dim=0).abs().square()
    hertz = torch.linspace(0, 8000 / 2, len(power))
    assert (power[hertz < 100].mean(0) < 0.01 * power.mean(0)).all()
    assert (power[hertz > 3900].mean(0) < 0.05 * power.mean(0)).all()


def test_an_order_for_each_second_mends_what_is_exchanged(conditions, signals):
    sources = signals[None, :, 1:]
    # Right for a second, exchanged for the next.
    confused = torch.cat([sources[:, :8000], sources[:, 8000:].flip(2)], 1)
    arranged = conditions.in_order_of_each(1, 8000, sources, confused)
    torch.testing.assert_close(arranged, sources)
    whole = conditions.in_one_order(8000, sources, confused)
    assert not torch.allclose(whole, sources)


def test_one_row_for_each_condition(
    bench, conditions, packed_once, tmp_path, monkeypatch
):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "ROBUSTNESS_MIXTURES", 1)
    monkeypatch.setattr(bench, "find_sets", lambda *_: [("noise", None)])
    monkeypatch.setattr(
        bench,
        "load_mixtures",
        lambda *_: iter([list(torch.randn(3, 9000))] * 2),
    )
    scored, gain = [], bench.gain
    monkeypatch.setattr(
        bench, "gain", lambda *words: scored.append(words) or gain(*words)
    )
    bench.main([str(packed_once), "noise", "--table", "robustness"])
    assert len(scored) == len(conditions.CONDITIONS)
    lines = (tmp_path / "robustness.csv").read_text().splitlines()
    assert lines[0] == "condition,noise"
    assert len(lines) == 1 + len(conditions.CONDITIONS)


# --- ablation at inference ---------------------------------------------------


def test_a_window_is_never_widened(conditions):
    masknet = FlashFormer(16, d_model=16, num_layers=1, nhead=2, window=(3, -1))
    conditions.narrow(masknet, 12)
    assert masknet.layers[0].attention.window == (3, 12)


def test_a_causal_model_is_refused(bench, packed_causal, tmp_path):
    (tmp_path / "mix").mkdir()
    words = [packed_causal, f"set={tmp_path}", "--table"]
    with pytest.raises(SystemExit, match="is causal"):
        bench.main([*map(str, words), "ablation_at_inference"])


def test_every_ablation_is_felt(bench, packed_once, tmp_path, monkeypatch):
    """A row each, and each with other sources."""
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    rng = np.random.default_rng(1)
    write_set(tmp_path / "set", 0.1 * rng.normal(size=(2, 8000)).astype("f4"))
    heard, real = [], bench.score_mixtures

    def listen(model, mixtures):
        mixtures = list(mixtures)
        heard.append(model.separate_batch(mixtures[0][0][None]))
        return real(model, mixtures)

    monkeypatch.setattr(bench, "score_mixtures", listen)
    words = [packed_once, f"noise={tmp_path / 'set'}", "--table"]
    bench.main([*map(str, words), "ablation_at_inference"])
    with (tmp_path / "ablation_at_inference.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(heard) == len(rows) == 10
    assert (rows[0]["condition"], list(rows[0])[1]) == ("none", "noise")
    # The model sees 20 tokens of 8 ms to each side: 0.25 s cut off nothing.
    cut = [not torch.equal(sources, heard[0]) for sources in heard]
    assert cut == [False, True, *[False] * 3, *[True] * 5]


def test_recorded_noise_of_the_test_sets_has_the_levels_of_wham(
    load_benchmark, tmp_path
):
    sets = load_benchmark("test_sets")
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "noise.wav", rng.normal(size=80000) / 9, 16000)
    ambience = sets.Noise(share=1, snr_db=sets.AMBIENT_DB, folder=tmp_path)
    sources = [rng.normal(size=16000), 0.3 * rng.normal(size=16000)]
    ratios = []
    for _ in range(30):
        mixture, kept = sets.add_recording(sources, ambience, rng)
        assert kept is sources
        noise = mixture - sum(sources)
        ratios.append(20 * np.log10(sources[0].std() / noise.std()))
    assert -6.1 < min(ratios) < -3 and 0 < max(ratios) < 3.1


def test_the_test_sets_do_not_depend_on_the_order_of_the_list(
    load_benchmark, tmp_path, monkeypatch
):
    sets = load_benchmark("test_sets")
    small = {"MIXTURES": 2, "ALONE": 2, "CONVERSATIONS": (2, 15)}
    for name, value in {**small, "MEETINGS": (1, 20)}.items():
        monkeypatch.setattr(sets, name, value)
    rng = np.random.default_rng(0)
    (tmp_path / "noise").mkdir()
    # Two recordings of each of six people.
    names = [f"{n}.wav" for n in range(12)]
    for name in ("noise/hum.wav", *names):
        soundfile.write(tmp_path / name, 0.1 * rng.normal(size=45000), 8000)
    head = "wav,speaker,corpus,language\n"
    people = [
        f"{tmp_path / name},{n // 2},{n // 4},{'en' if n < 8 else 'fr'}\n"
        for n, name in enumerate(names)
    ]
    for out, lines in (("one", people), ("two", people[::-1])):
        (tmp_path / "speech.csv").write_text(head + "".join(lines))
        sets.main(
            tmp_path / "speech.csv", tmp_path / out, [], tmp_path / "noise"
        )
    written = sorted((tmp_path / "one").glob("*/*/*.wav"))
    for path in written:
        twin = tmp_path / "two" / path.relative_to(tmp_path / "one")
        # Not the bytes: the header of a wav in floating point has the time.
        np.testing.assert_array_equal(
            soundfile.read(path)[0], soundfile.read(twin)[0]
        )
    counts = Counter(
        path.parts[-3] for path in written if path.parts[-2] == "mix"
    )
    mixtures = ("english", "other", "noisy", "reverberant", "ambient", "alone")
    assert counts == {
        **dict.fromkeys([*mixtures, "conversations"], 2),
        "meetings": 1,
    }
    for path in written:
        if path.parts[-2] != "mix":
            continue
        mixture, *sources = (
            soundfile.read(path.parents[1] / part / path.name)[0]
            for part in ("mix", "s1", "s2")
        )
        rest = mixture - sum(sources)
        assert (np.abs(rest).max() > 1e-3) == (
            path.parts[-3] in ("noisy", "ambient")
        )
