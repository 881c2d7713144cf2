"""The bench for learning: what it writes, what it does not do twice."""

import csv
import importlib
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from speechbrain_flashformer.training import voices

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TINY = "tiny:d_model=16:d_frame=16:num_layers=1:nhead=2:d_ffn=16:crop=2000"


@pytest.fixture(scope="module")
def bench(load_benchmark):
    return load_benchmark("learning")


@pytest.fixture(scope="module")
def training(bench, load_benchmark):
    return load_benchmark("training")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """Few generated voices where the command keeps its own, many ones."""
    folder = tmp_path_factory.mktemp("scratch")
    sizes = {"sizes": (8, 1, 2), "utterances": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(voices, "PEOPLE", "a")
        voices.make_voices(folder / "voices", progressbar=False, **sizes)
    return folder, sizes


@pytest.fixture
def command(bench, scratch, tmp_path, monkeypatch):
    """Run the command with words; its files are tmp_path/out*."""
    folder, sizes = scratch
    monkeypatch.setattr(bench, "VOICES", sizes)
    before = torch.get_num_threads()
    words = f"--threads 1 --mixtures 2 --out {tmp_path / 'out'}"
    words = [*words.split(), "--scratch", str(folder)]
    yield lambda line: bench.main([*line.split(), *words])
    torch.set_num_threads(before)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_it_trains_measures_and_does_nothing_twice(
    bench, command, tmp_path, capsys
):
    line = f"{TINY}:batch=2 {TINY}:batch=2:optimizer=adamw"
    line += " --examples 8 --points 2"
    command(line)
    made = rows(tmp_path / "out.csv")
    assert [row["optimizer"] for row in made] == ["muon", "adamw"]
    assert tuple(made[0]) == (*bench.KEY, *bench.MEASURED, "voices")
    for row in made:
        assert (row["steps"], row["examples"]) == ("4", "8")
        assert float(row["rtf"]) > 0 and float(row["gmac_per_s"]) > 0
        assert -60 < float(row["voices"]) < 30
    curves = rows(tmp_path / "out_curves.csv")
    points = {(row["model"], row["set"], row["examples"]) for row in curves}
    assert len(points) == len(curves) == 2 * 2 * 2
    assert {row["examples"] for row in curves} == {"4", "8"}
    assert (tmp_path / "out.png").stat().st_size > 10000
    assert (tmp_path / "out.md").read_text() == bench.table(made)

    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    command(line)
    assert capsys.readouterr().out.count("done before") == 2
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files

    # Another seed is another run, with other mixtures.
    command(f"{TINY}:batch=2 --examples 8 --points 2 --seed 2")
    again = rows(tmp_path / "out.csv")
    assert again[:2] == made and len(again) == 3
    assert again[2]["training"] != again[0]["training"]


def test_a_row_of_another_version_is_another_run(
    bench, command, tmp_path, monkeypatch, capsys
):
    line = f"{TINY}:batch=2 --examples 4 --points 1"
    command(line)
    monkeypatch.setattr(bench, "VERSION", bench.VERSION + 1)
    command(line)
    made = rows(tmp_path / "out.csv")
    versions = [int(row["version"]) for row in made]
    assert versions == [bench.VERSION - 1, bench.VERSION]
    capsys.readouterr()
    command(line)
    assert "done before" in capsys.readouterr().out
    # One of before there were versions is left alone.
    header, row, _ = (tmp_path / "out.csv").read_text().splitlines()
    place = header.split(",").index("version")
    old = [x.split(",") for x in (header, row)]
    for cells in old:
        del cells[place]
    text = "".join(",".join(cells) + "\n" for cells in old)
    (tmp_path / "out.csv").write_text(text)
    with pytest.raises(SystemExit, match="give another --out"):
        command(line)
    assert (tmp_path / "out.csv").read_text() == text


def test_training_for_minutes_ends_with_them(bench, command, tmp_path):
    command(f"{TINY}:batch=1 --minutes 0.02 --points 1")
    (row,) = rows(tmp_path / "out.csv")
    assert (tmp_path / "out.md").read_text() == bench.table([row])
    assert 0.02 <= float(row["minutes"]) < 0.1
    assert int(row["examples"]) == int(row["steps"]) > 1


@pytest.mark.parametrize(
    "key, same",
    [("norm=frame", True), ("flip=1", False), ("speeds=(90,91)", False)],
)
def test_all_models_learn_from_the_same_mixtures(
    bench, command, monkeypatch, key, same
):
    heard = []
    real = bench.DynamicMixtures.__getitem__

    def listen(mixtures, n):
        item = real(mixtures, n)
        heard.append((n, item["mix_sig"].sum().item()))
        return item

    monkeypatch.setattr(bench.DynamicMixtures, "__getitem__", listen)
    command(f"{TINY}:batch=2 {TINY}:batch=2:{key} --examples 4 --points 1")
    assert (heard[:4] == heard[4:]) == same and len(heard) == 8


@pytest.mark.parametrize(
    "line, says",
    [
        ("best --examples 8", "choose from tiny"),
        ("tiny:color=3 --examples 8", "color"),
        ("tiny:without=sense --examples 8", "without is one of attention"),
        ("tiny:lr=high --examples 8", "lr is a number above 0"),
        (
            "tiny:optimizer=sgd --examples 8",
            "optimizer is muon or muon-inner or adamw",
        ),
        ("tiny:precision=half --examples 8", "precision is fp32 or bf16"),
        ("tiny:flip=half --examples 8", "flip is 0, 0.5 or 1"),
        ("tiny:speeds=95 --examples 8", "speeds is (LEAST,GREATEST)"),
        ("tiny:speeds=(105,95) --examples 8", "speeds is (LEAST,GREATEST)"),
        ("tiny:output=guess --examples 8", "output is one of mask, map"),
        ("tiny:start=here --examples 8", "start is one of fourier, random"),
        (
            "tiny:norm=none --examples 8",
            "norm is one of frame, uniform",
        ),
        ("tiny:variant=new --examples 8", "variant is one of one-merge"),
        ("tiny:crop=(1,0) --examples 8", "crop is a whole number above 0"),
        ("tiny:crop=(1,2,3) --examples 8", "crop is a whole number above 0"),
        ("tiny:crop=0.4 --examples 8", "crop is a whole number above 0"),
        ("tiny:levels=(0,-1) --examples 8", "levels is a number from 0 on"),
        ("tiny:levels=() --examples 8", "levels is a number from 0 on"),
        ("tiny:levels=1e999 --examples 8", "levels is a number from 0 on"),
        ("tiny:batch=(1,0) --examples 8", "batch is a whole number above 0"),
        ("tiny:loss=mse --examples 8", "loss is si-snr or snr"),
        ("tiny:absent=2 --examples 8", "absent is a share, from 0 to 1"),
        ("tiny:absent=0.1 --examples 8", "absent needs loss=snr"),
        (
            "tiny:absent=0.1:loss=snr:levels=0.5 --examples 8",
            "absent leaves no levels to change",
        ),
        ("tiny:batch=4.0 --examples 8", "batch is a whole number above 0"),
        ("tiny:causal --examples 8", "is not KEY=VALUE"),
        ("skim:num_layers=2 --examples 8", "skim is built as in its recipe"),
        (f"{TINY} --examples 8 --test cv", "--test cv is not NAME=FOLDER"),
        (f"{TINY} --examples 8 --test cv=nowhere", "nowhere/mix holds 0"),
        (f"{TINY} --examples 8 --speech nowhere", "no folder nowhere"),
    ],
)
def test_bad_input_is_one_clear_message(command, line, says, tmp_path):
    with pytest.raises(SystemExit) as stop:
        command(line)
    assert says in str(stop.value)
    assert not list(tmp_path.iterdir())


def test_several_folders_of_speech_are_heard_together(bench, scratch, tmp_path):
    files = sorted((scratch[0] / "voices/wav8k/min/tr/s1").glob("*.wav"))
    parts = {"one": files[:3], "two": files[3:5]}
    for name, some in parts.items():
        (tmp_path / name / "who").mkdir(parents=True)
        for file in some:
            (tmp_path / name / "who" / file.name).symlink_to(file)
    arguments = SimpleNamespace(
        speech=[tmp_path / name for name in parts], speaker="file"
    )
    name, found = bench.load_speech(arguments)
    assert name == "one + two"
    names = {recording.path.name for recording in found}
    assert names == {path.name for path in files[:5]}
    assert len(found) == 5


def test_a_file_with_other_test_sets_is_left_alone(command, tmp_path):
    (tmp_path / "out.csv").write_text("model,seed\ntiny,1\n")
    with pytest.raises(SystemExit) as stop:
        command(f"{TINY} --examples 8")
    assert "give another --out" in str(stop.value)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "name, millions", [("sepformer", 25.7), ("re-sepformer", 8.0)]
)
def test_the_peers_have_the_parameters_of_their_papers(bench, name, millions):
    model = bench.build_separator(name)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize("name", ["re-sepformer", "skim"])
def test_mixtures_of_a_batch_do_not_hear_each_other(bench, name):
    model = bench.build_separator(name).eval()
    mixtures = torch.randn(2, 2000)
    with torch.no_grad():
        together = model(mixtures)
        alone = model(mixtures[:1])
    assert torch.allclose(together[:1], alone, atol=1e-4 * alone.abs().max())


@pytest.mark.parametrize(
    "name, start, same",
    [
        ("tiny", None, True),
        ("tiny", "random", False),
        ("skim", None, False),
        ("skim", "fourier", True),
    ],
)
def test_a_start_as_fourier_gives_the_mixture_back(bench, name, start, same):
    encoder, _, decoder = bench.build_separator(name, start=start).children()
    mixture = torch.randn(1, 1600)
    with torch.no_grad():
        out = decoder(encoder(mixture))
    inner = slice(16, -16)
    assert torch.allclose(out[:, inner], mixture[:, inner], atol=1e-5) == same


@pytest.mark.parametrize("samples", [5, 32, 33, 1600])
def test_a_mapping_gives_sources_as_long_as_the_mixture(bench, samples):
    model = bench.build_separator("tiny", output="map", num_layers=1)
    with torch.no_grad():
        out = model(torch.randn(2, samples))
        assert out.shape == (2, samples, 2)
        # No mask: with the mixture out of it something comes all the same.
        model.masknet.masks.bias.add_(1)
        assert model(torch.zeros(2, samples)).abs().sum() > 0


@pytest.mark.parametrize(
    "how, expected", [("", torch.float32), (":precision=bf16", torch.bfloat16)]
)
def test_training_is_in_the_precision_asked_for(
    bench, command, monkeypatch, how, expected
):
    real, seen = bench.build_separator, set()

    def build(*args, **numbers):
        model = real(*args, **numbers)
        model.masknet.register_forward_hook(
            lambda masknet, _, out: seen.add((masknet.training, out.dtype))
        )
        return model

    monkeypatch.setattr(bench, "build_separator", build)
    command(f"{TINY}{how} --examples 8 --points 1")
    # The scores are in full precision whatever the training is in.
    assert (True, expected) in seen
    assert {half for training, half in seen if not training} == {torch.float32}


@pytest.mark.parametrize("norm", [None, "energy", "uniform"])
def test_silence_changes_nothing_where_frames_have_weights(bench, norm):
    masknet = bench.build_separator("tiny", norm=norm).masknet
    frames = torch.rand(2, 128, 100)
    padded = torch.nn.functional.pad(frames, (0, 300))
    with torch.no_grad():
        alone, among = (
            masknet.norm_in(x.transpose(1, 2)) for x in (frames, padded)
        )
    same = torch.allclose(among[:, :100], alone, atol=1e-4)
    assert same == (norm != "uniform")
    assert masknet.norm_in(torch.zeros(1, 50, 128)).isfinite().all()


def test_a_cumulative_norm_hears_nothing_of_the_future(bench):
    norms = (
        bench.build_separator("tiny", norm=name).masknet.norm_in
        for name in ("cumulative", None)
    )
    x = torch.rand(2, 100, 128)
    past, whole = (
        torch.allclose(norm(x)[:, :50], norm(x[:, :50]), atol=1e-5)
        for norm in norms
    )
    assert past and not whole


@pytest.mark.parametrize("without", ["attention", "token-fsmn", "token-memory"])
def test_what_is_left_out_of_the_layers_is_gone(bench, without):
    """One layer, merged frames: what a far frame changes at a near one."""
    numbers = {"num_layers": 1, "lookback": 2, "lookahead": 2}
    reached = []
    for left_out in (None, without):
        choice = {"without": left_out, "norm": "frame", **numbers}
        masknet = bench.build_separator("tiny", **choice).masknet
        frames = torch.rand(1, 128, 400)
        other = frames.clone()
        other[:, :, -4:] = torch.rand(1, 128, 4)
        with torch.no_grad():
            change = (masknet(frames) - masknet(other)).abs().amax((0, 1, 2))
        reached.append((change > 1e-6).sum().item())
    everywhere, fewer = reached
    assert everywhere == 400
    # Without attention nothing goes far; without a memory attention still
    # takes it everywhere.
    assert (fewer < 100) == (without == "attention")


def test_what_is_left_out_costs_nothing(bench):
    def count(**choice):
        model = bench.build_separator("tiny", **choice)
        return sum(p.numel() for p in model.parameters())

    whole = count()
    for without in importlib.import_module("models").WITHOUT:
        assert count(without=without) < whole
    assert count(without="token-memory") > count(without="token-fsmn")
    assert count(without="frame-memory") > count(without="frame-fsmn")


@torch.no_grad()
@pytest.mark.parametrize("size", ["tiny", "base"])
def test_the_last_stage_is_what_the_network_gives(bench, size):
    plain, staged = (
        bench.build_separator(size, num_layers=2, **variant).masknet
        for variant in ({}, {"variant": "stage-losses"})
    )
    staged.load_state_dict(plain.state_dict())
    frames = torch.rand(2, plain.in_channels, 101)
    lengths = torch.tensor([101, 61])
    expected = plain.eval()(frames, lengths)
    stages = staged(frames, lengths)
    assert len(stages) == 2 * len(expected)
    torch.testing.assert_close(stages[: len(expected)], expected)
    torch.testing.assert_close(staged.eval()(frames, lengths), expected)


@pytest.mark.parametrize(
    "variant, sources",
    [
        ("one-merge", 2),
        ("early-split", 2),
        ("last-split", 2),
        ("stage-losses", 6),
    ],
)
def test_all_of_a_variant_learns(bench, variant, sources):
    numbers = {"variant": variant, "num_layers": 3}
    model = bench.build_separator("tiny", **numbers)
    estimates = model(torch.randn(2, 1601))
    assert estimates.shape == (2, 1601, sources)
    estimates.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(torch.randn(1, 800)).shape == (1, 800, 2)


@pytest.mark.parametrize("variant", ["early-split", "last-split"])
def test_streams_of_an_early_split_are_alike_but_not_the_same(bench, variant):
    """Weights are shared: exchanged streams give exchanged masks."""
    numbers = {"variant": variant, "num_layers": 2}
    model = bench.build_separator("tiny", **numbers).eval()
    mixture, divide = torch.randn(1, 1600), model.masknet.divide
    with torch.no_grad():
        before = model(mixture)
        for parameter in (divide.weight, divide.bias):
            parameter.copy_(torch.cat(parameter.chunk(2)[::-1]))
        after = model(mixture)
    torch.testing.assert_close(after, before.flip(2))
    assert not torch.allclose(after, before, atol=1e-3)


@torch.no_grad()
def test_padding_is_not_heard_by_an_early_split(bench):
    numbers = {"variant": "early-split", "num_layers": 2}
    masknet = bench.build_separator("tiny", **numbers).eval().masknet
    frames = torch.rand(2, masknet.in_channels, 101)
    masks = masknet(frames, torch.tensor([101, 61]))
    alone = masknet(frames[1:, :, :61])
    torch.testing.assert_close(masks[:, 1:, :, :61], alone)


def test_stages_are_trained_and_the_last_is_scored(
    bench, training, command, tmp_path, monkeypatch
):
    """The loss of each stage is a number here; what is seen of its gradient."""
    seen = {}

    class Stages(torch.nn.Module):
        """Sources of three stages, the last first."""

        def __init__(self):
            super().__init__()
            self.stages = torch.nn.Parameter(torch.zeros(3))

        def forward(self, mixture):
            stages = self.stages if self.training else self.stages[:1]
            return stages.repeat_interleave(2).expand(*mixture.shape, -1)

    def build(*_, **__):
        seen["model"] = Stages()
        return seen["model"]

    def loss(targets, estimates, lengths):
        assert targets.shape == estimates.shape
        return estimates[:, 0, 0] + 5

    def step(optimizer):
        seen["gradient"] = seen["model"].stages.grad.clone()

    monkeypatch.setattr(bench, "build_separator", build)
    monkeypatch.setattr(training, "LOSSES", {"si-snr": loss})
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    command("tiny:crop=2000:optimizer=adamw --examples 8 --points 1")
    weight = training.STAGE_WEIGHT / 2
    expected = torch.tensor([1, weight, weight])
    torch.testing.assert_close(seen["gradient"], expected)
    (row,) = rows(tmp_path / "out.csv")
    assert float(row["training"]) == -5


def test_each_point_is_measured_once(command, tmp_path):
    # 30 / 44 * 22 is a hair less than 15.
    command(f"{TINY}:batch=1 --examples 44 --points 22")
    curve = rows(tmp_path / "out_curves.csv")
    examples = [int(row["examples"]) for row in curve if row["set"] == "voices"]
    assert examples == list(range(2, 45, 2))


def test_a_crop_grows(bench, command, monkeypatch):
    heard = []
    real = bench.DynamicMixtures.__getitem__

    def listen(mixtures, n):
        heard.append(mixtures.samples)
        return real(mixtures, n)

    monkeypatch.setattr(bench.DynamicMixtures, "__getitem__", listen)
    line = TINY.replace("crop=2000", "crop=(1000,3000)")
    command(f"{line}:batch=1 --examples 5 --points 1")
    # At its last size when 70 % are over.
    assert heard == [1000, 1571, 2143, 2714, 3000]


def test_a_batch_shrinks(training, command, monkeypatch):
    batches = []
    real = training.PaddedBatch
    monkeypatch.setattr(
        training, "PaddedBatch", lambda x: batches.append(len(x)) or real(x)
    )
    command(f"{TINY}:batch=(4,1) --examples 20 --points 1")
    assert batches == [4, 3, 2, 2, 2] + [1] * 7


def test_levels_come_to_be_as_they_were_drawn(
    bench, training, command, monkeypatch
):
    heard = []
    real = bench.DynamicMixtures.__getitem__
    monkeypatch.setattr(
        bench.DynamicMixtures,
        "__getitem__",
        lambda mixtures, n: heard.append(real(mixtures, n)) or dict(heard[-1]),
    )
    batches = []
    batch = training.PaddedBatch
    monkeypatch.setattr(
        training,
        "PaddedBatch",
        lambda items: batches.append(items) or batch(items),
    )

    def gap(item):
        spoken = [item[key][item[key] != 0] for key in ("s1_sig", "s2_sig")]
        ratio = spoken[0].square().mean() / spoken[1].square().mean()
        return 10 * ratio.log10().item()

    command(f"{TINY}:batch=1:levels=(0,1) --examples 4 --points 1")
    assert len(heard) == len(batches) == 4
    # The whole difference when 70 % are over.
    shares = (0, 0.25 / 0.7, 0.5 / 0.7, 1)
    for share, before, (after,) in zip(shares, heard, batches):
        assert gap(after) == pytest.approx(share * gap(before), abs=1e-3)
        both = after["s1_sig"] + after["s2_sig"]
        torch.testing.assert_close(after["mix_sig"], both)
    heard.clear()
    batches.clear()
    command(f"{TINY}:batch=1 --examples 4 --points 1")
    assert len(heard) == len(batches) == 4
    for before, (after,) in zip(heard, batches):
        assert torch.equal(after["mix_sig"], before["mix_sig"])


def test_the_page_cites_rows_of_the_results():
    measured = rows(RESULTS / "learning.csv")
    page = (ROOT / "docs" / "decisions.md").read_text()
    cited = re.findall(r"^\| `(\S+)` \| (\d) \| (.+) \| (\S+) \|$", page, re.M)
    assert cited
    for model, seed, budget, db in cited:
        (row,) = (
            row
            for row in measured
            if (row["model"], row["seed"], row["budget"])
            == (model, seed, budget)
            and row["data"].startswith("speech8k (")
        )
        mean = statistics.mean(float(row[x]) for x in ("cv", "tt", "voices"))
        assert f"{mean:.2f}" == db, model
