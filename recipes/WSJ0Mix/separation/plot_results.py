#!/usr/bin/env python3
"""Plot a training: learning curve, test results and spectrograms of a mixture.

> python plot_results.py results/flashformer-demo/1234

Writes ``results.png`` and ``evaluation.png`` into the output folder. Requires
matplotlib (the extra ``demo``).
"""

import csv
import math
import re
import sys
from pathlib import Path

import soundfile
import torch

from speechbrain_flashformer.inference.files import written_beside

FRAME, DYNAMIC_RANGE_DB = 256, 70


def check_can_plot(hparams):
    """Check before the training that the plots can be drawn after it.

    Arguments
    ---------
    hparams : dict
        Uses ``save_audio`` and ``n_audio_to_save``.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If the test would save no audio.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "plot_results needs matplotlib: pip install "
            "'speechbrain-flashformer[demo]', or set plot_results: False"
        ) from error
    if not hparams["save_audio"] or hparams["n_audio_to_save"] < 1:
        raise ValueError(
            "plot_results draws saved audio: set save_audio: True and "
            "n_audio_to_save: 1 or more, or plot_results: False"
        )


def plot_results(output_folder):
    """Plot ``train_log.txt`` and the first mixture of ``audio_results``.

    Arguments
    ---------
    output_folder : str or Path
        Output folder of a finished training with ``save_audio``.

    Returns
    -------
    Path
        The PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder = Path(output_folder)
    mixture = min((folder / "audio_results").glob("*_mix.wav"))
    name = mixture.name.removesuffix("_mix.wav")
    source_name = re.compile(rf"{re.escape(name)}_s\d+\.wav")
    sources = [
        path
        for path in sorted(mixture.parent.iterdir())
        if source_name.fullmatch(path.name)
    ]
    figure = pyplot.figure(
        figsize=(4.5 * len(sources), 9), layout="constrained"
    )
    grid = figure.add_gridspec(4, len(sources))
    _draw_curve(figure.add_subplot(grid[0, :]), folder / "train_log.txt")
    _draw_spectrogram(figure.add_subplot(grid[1, :]), mixture, "mixture")
    for i, source in enumerate(sources):
        estimate = source.with_name(f"{source.stem}hat.wav")
        _draw_spectrogram(
            figure.add_subplot(grid[2, i]), source, f"speaker {i + 1}, clean"
        )
        _draw_spectrogram(
            figure.add_subplot(grid[3, i]),
            estimate,
            f"speaker {i + 1}, separated",
        )
    # A $ must not start a formula. Long names are shortened.
    figure.suptitle(f"{folder}: {name:.60}", fontsize=9, parse_math=False)
    return _save(figure, folder / "results.png")


def plot_evaluation(output_folder):
    """Plot ``test_results.csv``: SI-SNRi over the SI-SNR of the mixture.

    Arguments
    ---------
    output_folder : str or Path
        Output folder of a finished test.

    Returns
    -------
    Path
        The PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder = Path(output_folder)
    table = folder / "test_results.csv"
    with table.open(newline="", encoding="utf-8") as file:
        *rows, mean, median, low = csv.DictReader(file)
    gains = [float(row["si-snr_i"]) for row in rows]
    before = [float(row["si-snr"]) - g for row, g in zip(rows, gains)]
    figure, (cloud, bars) = pyplot.subplots(
        1,
        2,
        sharey=True,
        figsize=(9, 4.5),
        width_ratios=(2, 1),
        layout="constrained",
    )
    cloud.scatter(before, gains, s=12, alpha=0.6)
    cloud.set(xlabel="SI-SNR of the mixture (dB)", ylabel="SI-SNRi (dB)")
    bars.hist(
        [gain for gain in gains if math.isfinite(gain)],
        bins=30,
        orientation="horizontal",
    )
    bars.set(xlabel="mixtures")
    lines = {"mean": mean, "median": median, "5th percentile": low}
    for (name, row), style in zip(lines.items(), ("-", "--", ":")):
        value = float(row["si-snr_i"])
        bars.axhline(
            value, color="k", ls=style, lw=1, label=f"{name} {value:.1f} dB"
        )
    bars.legend(fontsize=8)
    for axes in (cloud, bars):
        axes.grid(alpha=0.3)
    title = f"{folder}: {len(rows)} test mixtures"
    figure.suptitle(title, fontsize=9, parse_math=False)
    return _save(figure, folder / "evaluation.png")


def _save(figure, path):
    from matplotlib import pyplot

    with written_beside(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    pyplot.close(figure)
    return path


def _draw_curve(axes, log):
    """Plot the negated training loss and validation SI-SNR over epochs."""
    text, number = log.read_text(encoding="utf-8"), r"(-?[\d.]+(?:e[+-]\d+)?)"
    curves = {"train loss": "training (loss)", "valid si-snr": "validation"}
    for what, label in curves.items():
        points = re.findall(rf"epoch: (\d+),.*?{what}: {number}", text)
        axes.plot(
            [int(epoch) for epoch, _ in points],
            [-float(loss) for _, loss in points],
            marker=".",
            label=label,
        )
    axes.set(xlabel="epoch", ylabel="SI-SNR (dB)", title="learning curve")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_spectrogram(axes, path, title):
    signal, rate = soundfile.read(path, dtype="float32")
    bins = torch.stft(
        torch.from_numpy(signal),
        FRAME,
        FRAME // 4,
        window=torch.hann_window(FRAME),
        return_complex=True,
    )
    level = 20 * bins.abs().clamp(min=1e-9).log10()
    axes.imshow(
        level,
        origin="lower",
        aspect="auto",
        extent=(0, len(signal) / rate, 0, rate / 2),
        vmin=level.max() - DYNAMIC_RANGE_DB,
        vmax=level.max(),
    )
    axes.set(xlabel="s", ylabel="Hz", title=title)


if __name__ == "__main__":
    print(plot_results(*sys.argv[1:]))
    print(plot_evaluation(*sys.argv[1:]))
