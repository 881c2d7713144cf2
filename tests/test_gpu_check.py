"""The check for GPUs: here on a CPU, where wrong kernels are made to order."""

from pathlib import Path

import pytest
import torch

from speechbrain_flashformer import attention

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

    def wrong(q, k, v, window, dropout_p, lengths):
        return change(right, q, k, v, window, dropout_p, lengths)

    monkeypatch.setitem(attention.BACKENDS, "sdpa", (why_not, wrong))


def wider(right, q, k, v, window, *rest):
    return right(q, k, v, (window[0] + 1, window[1]), *rest)


def padded(right, q, k, v, window, dropout_p, lengths):
    return right(q, k, v, window, dropout_p, None)


def no_gradient(right, q, k, v, *rest):
    return right(q, k.detach(), v, *rest) + 0 * k.sum()


def test_without_a_gpu_one_line_says_so(check, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main([]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and "no GPU" in said.err


def test_the_report_on_a_cpu(check, monkeypatch, capsys):
    monkeypatch.setitem(check.SIZES["cpu"], "tokens", [64])
    assert check.main(["--device", "cpu"]) == 0
    report = capsys.readouterr().out
    assert report.endswith("no failures\n")
    assert report.count("## ") == 8
    # Two precisions, in attention; once each, in the network.
    assert report.count("| ok |") == 2 * len(check.CASES) + 2 + 1


@pytest.mark.parametrize(
    "name, change",
    [
        ("narrow window", wider),
        ("next tokens of a stream", wider),
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

    def none(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(check, "dense", none)
    assert check.main(["--device", "cpu"]) == 1
    report = capsys.readouterr().out
    assert "FAILED: RuntimeError: no such kernel" in report
    assert "| `StreamingStep`" in report and report.endswith("1 failures\n")
