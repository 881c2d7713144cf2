"""The bench beside the peers: what it measures, keeps, and shows."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = "flashformer-tiny"


@pytest.fixture(scope="module")
def bench(load_benchmark):
    return load_benchmark("side_by_side")


@pytest.fixture
def command(bench, tmp_path, monkeypatch):
    """Run the command on few lengths; its files are in tmp_path."""
    page = f"before\n<!-- table: {bench.TABLE} -->\nold\n"
    page += "<!-- end of table -->\nafter\n"
    (tmp_path / "README.md").write_text(page)
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "bench.csv")
    monkeypatch.setattr(bench, "README", tmp_path / "README.md")
    monkeypatch.setattr(bench, "LENGTHS", (1, 2))
    monkeypatch.setattr(bench, "TRAINED", (1,))
    return lambda line: bench.main(line.split())


def test_it_measures_once_and_shows_what_it_measured(
    bench, command, tmp_path, capsys
):
    line = f"--models {TINY} --threads 2"
    command(line)
    rows = bench.read()
    assert [(row["task"], row["seconds"]) for row in rows] == [
        ("separate", 1),
        ("separate", 2),
        ("train", 1),
    ]
    for row in rows:
        assert row["outcome"] == "ok" and row["parameters_m"] == 1.1
        assert (
            0
            < row["median_s"]
            == pytest.approx(row["rtf"] * row["seconds"], rel=0.01)
        )
        assert row["gmac_per_s"] > 0 and row["cpu_s"] > 0
    # Training keeps what the gradient needs.
    assert rows[2]["extra_peak_mb"] > rows[0]["extra_peak_mb"] >= 0
    shown = (tmp_path / "README.md").read_text()
    table = (tmp_path / "bench.md").read_text()
    assert shown == bench.with_table(shown, bench.TABLE, table)
    assert shown.startswith("before\n") and shown.endswith("after\n")
    assert f"| {TINY} | 1.1 |" in shown and "old" not in shown
    for name in ("length", "quality"):
        assert (tmp_path / f"bench_{name}.png").stat().st_size > 10000
    capsys.readouterr()
    command(line)
    assert TINY + "\t" not in capsys.readouterr().out
    assert bench.read() == rows


def test_what_takes_too_long_is_told_as_such(bench, command):
    command(f"--models {TINY} --threads 1 --limit 0.0001")
    assert [row["outcome"] for row in bench.read()] == ["ok", "time", "ok"]


def test_what_needs_too_much_is_told_as_such(bench, command):
    command(f"--models {TINY} --threads 1 --memory 0.001")
    # What is free in the process already may be enough for the shortest.
    outcomes = [row["outcome"] for row in bench.read()]
    assert outcomes[-1] == "memory" and set(outcomes) <= {"ok", "memory"}


def test_what_does_not_run_says_why(bench, command, monkeypatch):
    monkeypatch.setattr(bench, "MODELS", ("none",))
    command("--models none --threads 1")
    outcomes = {row["outcome"] for row in bench.read()}
    (outcome,) = outcomes
    assert outcome.startswith("failed: ValueError: no model named 'none'")


def test_the_readme_shows_what_was_measured(bench):
    """The table, the figures and the page say the same."""
    lines = bench.table(bench.read())
    assert bench.RESULTS.with_suffix(".md").read_text() == lines
    page = (ROOT / "README.md").read_text()
    assert bench.with_table(page, bench.TABLE, lines) == page


def test_the_counter_does_not_pass_over_recurrent_layers(bench, load_benchmark):
    import torch

    one_model = load_benchmark("one_model")

    class Recurrent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = torch.nn.LSTM(10, 20, bidirectional=True)

        def forward(self, mixture):
            return self.lstm(mixture.view(-1, 1, 10))[0]

    # Two directions, four gates, what came in and what was remembered.
    assert one_model.macs_of(Recurrent(), 500) == 50 * 2 * 4 * 20 * (10 + 20)


@pytest.mark.parametrize("name", ("conv-tasnet", "dprnn", "skim"))
def test_peers_give_one_signal_for_each_speaker(bench, name):
    import torch
    from models import build_separator

    with torch.no_grad():
        out = build_separator(name).eval()(torch.randn(1, 1600))
    assert out.shape == (1, 1600, 2)
