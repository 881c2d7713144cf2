"""The check for GPUs: here on a CPU, where wrong kernels are made to order."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from speechbrain_flashformer.nnet import attention

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def check(load_benchmark):
    return load_benchmark("gpu_check")


def case(check, name):
    return next(case for case in check.CASES if case[0] == name)


def break_sdpa(monkeypatch, change):
    """Let the backend sdpa give something else."""
    why_not, right = attention.BACKENDS["sdpa"]

    def wrong(q, k, v, window, rows):
        return change(right, q, k, v, window, rows)

    monkeypatch.setitem(attention.BACKENDS, "sdpa", (why_not, wrong))


def wider(right, q, k, v, window, *rest):
    return right(q, k, v, (window[0] + 1, window[1]), *rest)


def padded(right, q, k, v, window, rows):
    return right(q, k, v, window, None)


def no_gradient(right, q, k, v, *rest):
    return right(q, k.detach(), v, *rest) + 0 * k.sum()


def test_without_a_gpu_one_line_says_so(check, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main([]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and "no GPU" in said.err


class Recipe:
    """In the place of train.py: writes what it would, or not all of it."""

    def __init__(self, forget=False, gain="1.0", fail=""):
        self.forget, self.gain, self.fail = forget, gain, fail
        self.calls = []

    def __call__(self, words):
        self.calls.append(words)
        if len(self.calls) == 2 and self.fail:
            return self.fail
        folder = Path(words[words.index("--output_folder") + 1])
        last = int(words[words.index("--N_epochs") + 1])
        epochs = [last] if self.forget else range(1, last + 1)
        lines = [f"epoch: {epoch}, lr: 1\n" for epoch in epochs]
        (folder / "train_log.txt").write_text("".join(lines))
        (folder / "test_results.csv").write_text(
            f"snt_id,si-snr_i\nx,1\navg,{self.gain}\n"
        )
        return ""


@pytest.mark.parametrize(
    "options, failed",
    [
        ({}, [False, False, False]),
        ({"forget": True}, [False, True, True]),
        ({"gain": "nan"}, [True, True, True]),
        ({"fail": "no memory"}, [False, True, False]),
    ],
    ids=str,
)
def test_the_recipe_is_judged(check, monkeypatch, options, failed):
    recipe = Recipe(**options)
    monkeypatch.setattr(check, "run_recipe", recipe)
    rows = list(check.recipe(CPU, {"recipe": {"num_workers": 0}}))[3:]
    assert ["FAILED" in row for row in rows] == failed
    if "fail" in options:
        assert "FAILED no memory" in rows[1]
    for words in recipe.calls:
        assert words[words.index("--precision") + 1] == "bf16"
        assert words[words.index("--device") + 1] == "cpu"


def test_the_recipe_itself_passes(check, monkeypatch, noise_mixtures):
    """In this process, where it starts faster."""
    train = importlib.import_module("train")

    def run(words):
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        train.main()
        return ""

    monkeypatch.chdir(check.RECIPE)
    monkeypatch.setattr(check, "run_recipe", run)
    sizes = {
        "data_folder": noise_mixtures,
        "num_workers": 0,
        "batch_size": 2,
        "training_signal_len": 4000,
        "model": "{d_model: 32, num_layers: 1, nhead: 2, d_ffn: 32}",
    }
    rows = list(check.recipe(CPU, {"recipe": sizes}))[3:]
    assert len(rows) == 3 and all(row.endswith("ok |") for row in rows)


def test_the_report_on_a_cpu(check, monkeypatch, capsys):
    monkeypatch.setitem(check.SIZES["cpu"], "tokens", [64])
    monkeypatch.setattr(check, "run_recipe", Recipe())
    assert check.main(["--device", "cpu"]) == 0
    report = capsys.readouterr().out
    assert report.endswith("no failures\n")
    assert report.count("## ") == 9
    # Two precisions, in attention; once each, in the network; the recipe.
    assert report.count("| ok |") == 2 * len(check.CASES) + 2 + 3 + 1


@pytest.mark.parametrize(
    "name, change",
    [
        ("narrow window", wider),
        ("unlike lengths", padded),
        ("full", no_gradient),
    ],
)
def test_wrong_attention_is_found(check, monkeypatch, name, change):
    one = case(check, name)
    for dtype in check.precisions(CPU):
        assert check.compare_one("sdpa", dtype, one, CPU).endswith("ok")
    break_sdpa(monkeypatch, change)
    for dtype in check.precisions(CPU):
        row = check.compare_one("sdpa", dtype, one, CPU)
        assert row.endswith("FAILED")


def test_a_wrong_network_is_found(check, monkeypatch):
    break_sdpa(monkeypatch, wider)
    rows = [row for row in check.compare_network(CPU, {}) if "sdpa" in row]
    assert len(rows) == 2 and all("FAILED" in row for row in rows)


def test_what_cannot_run_says_why(check):
    row = check.compare_one("torch_flash", torch.float32, check.CASES[0], CPU)
    assert row.startswith("not run: needs a CUDA device")


def test_an_error_ends_one_section_alone(check, monkeypatch, capsys):
    monkeypatch.setitem(check.SIZES["cpu"], "tokens", [64])
    monkeypatch.setattr(check, "run_recipe", Recipe())

    def none(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(check, "compare_one", none)
    assert check.main(["--device", "cpu"]) == 1
    report = capsys.readouterr().out
    assert "FAILED: RuntimeError: no such kernel" in report
    assert "| `StreamingStep`" in report and report.endswith("1 failures\n")
