"""The pictures of a training, whatever its mixtures and folders are called."""

import sys
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).parent.parent / "recipes/WSJ0Mix/separation"
sys.path.insert(0, str(RECIPE))

import plot_results  # noqa: E402

from speechbrain_flashformer.training.scores import (  # noqa: E402
    write_example,
    write_results,
)

pytest.importorskip("matplotlib")
COLUMNS = ("sdr", "sdr_i", "si-snr", "si-snr_i")


@pytest.mark.parametrize(
    "name", ["take [1]", "* ?", "a/b", "100 % 'so'", "x" * 300, "$\\frac$"]
)
def test_any_name_is_drawn(tmp_path, monkeypatch, name):
    folder = tmp_path / "run [1] $\\frac$"
    drawn, real = [], plot_results._draw_spectrogram

    def draw(axes, path, title):
        drawn.append(title)
        real(axes, path, title)

    monkeypatch.setattr(plot_results, "_draw_spectrogram", draw)
    signals = torch.randn(5, 800)
    audio = folder / "audio_results"
    # One that a pattern could take for the other.
    for called in (name, "take 1"):
        write_example(
            audio, called, signals[0], signals[1:3], signals[3:], 8000
        )
    rows = [{"snt_id": name} | dict.fromkeys(COLUMNS, 1.0)]
    write_results(folder / "test_results.csv", rows)
    (folder / "train_log.txt").write_text(
        "epoch: 1, lr: 1.00e-03 - train loss: -1.2, train nonfinite: 0"
        " - valid si-snr: -3.4\n"
    )
    assert plot_results.plot_results(folder).stat().st_size > 1000
    assert plot_results.plot_evaluation(folder).stat().st_size > 1000
    assert drawn == ["mixture"] + [
        f"speaker {speaker}, {what}"
        for speaker in (1, 2)
        for what in ("clean", "separated")
    ]


def test_the_curve_has_every_epoch(tmp_path):
    from matplotlib.figure import Figure

    log, axes = tmp_path / "train_log.txt", Figure().add_subplot()
    log.write_text(
        "epoch: 1, lr: 1.00e-03 - train loss: -1.2, train nonfinite: 0"
        " - valid si-snr: -3.4\n"
        "epoch: 2, lr: 1.00e-03 - train loss: 2.00e-02, train nonfinite: 0"
        " - valid si-snr: -4.5\n"
    )
    plot_results._draw_curve(axes, log)
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    assert drawn == [[[1, 1.2], [2, -0.02]], [[1, 3.4], [2, 4.5]]]
