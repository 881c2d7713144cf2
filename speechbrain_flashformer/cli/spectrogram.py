"""Spectrograms of recordings of any length, drawn on one scale of levels.

Axes: C channels, n samples, K frequencies, L frames.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from speechbrain_flashformer.inference.audio import AudioReader

COLUMNS = 1200  # of a spectrogram, about
DYNAMIC_RANGE_DB = 70
INK = "0.5"


def draw_spectrograms(paths, folder, model_rate):
    """Draw recordings on one scale of levels, up to what the model hears.

    Arguments
    ---------
    paths : list of Path
        Audio files of any length; the first one sets the scale.
    folder : str or Path
        Gets a PNG for each.
    model_rate : int
        Hz.

    Returns
    -------
    list of str
        The PNG files.

    Example
    -------
    >>> import soundfile
    >>> folder = getfixture("tmp_path")
    >>> soundfile.write(folder / "a.wav", torch.randn(8000).numpy(), 8000)
    >>> [picture] = draw_spectrograms([folder / "a.wav"], folder, 8000)
    >>> Path(picture).name
    'a_spectrogram.png'
    """
    from matplotlib.figure import Figure

    drawn, loudest = [], None
    for i, path in enumerate(paths):
        reader = AudioReader(path)
        top = min(model_rate, reader.sample_rate) / 2
        level = spectrogram(reader, top)
        if loudest is None:
            loudest = level.max()
        figure = Figure(figsize=(11 if i == 0 else 5.5, 2.2), layout="tight")
        axes = figure.subplots()
        axes.imshow(
            level,
            origin="lower",
            aspect="auto",
            extent=(0, reader.frames / reader.sample_rate, 0, top / 1000),
            vmin=loudest - DYNAMIC_RANGE_DB,
            vmax=loudest,
            cmap="magma",
        )
        axes.set(xlabel="seconds", ylabel="kHz")
        # Grey on nothing is readable on a light and on a dark page.
        axes.tick_params(colors=INK, labelsize=8)
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set(color=INK, size=8)
        drawn.append(str(Path(folder) / f"{Path(path).stem}_spectrogram.png"))
        figure.savefig(drawn[-1], dpi=120, transparent=True)
    return drawn


def spectrogram(reader, top):
    """Level in dB of each frequency up to ``top`` Hz, [K, L].

    Arguments
    ---------
    reader : AudioReader
        The recording, read in blocks; the power of its channels is
        averaged.
    top : float
        Hz, at most half the sampling rate.

    Returns
    -------
    torch.Tensor
        [K, L]; of long recordings about 1200 columns, each the mean power of
        its part.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "a.wav"
    >>> soundfile.write(path, torch.randn(8000).numpy(), 8000)
    >>> spectrogram(AudioReader(path), top=4000).shape
    torch.Size([129, 126])
    """
    size = max(16, round(0.032 * reader.sample_rate))
    window = torch.hann_window(size)
    bins = 1 + round(top / reader.sample_rate * size)
    columns = []
    for block in reader.blocks():
        # Summed after the transform: channels that cancel stay in sight.
        sound = F.pad(block, (size // 2, size - size // 2))
        frames = torch.stft(
            sound,
            size,
            size // 4,
            window=window,
            center=False,
            return_complex=True,
        )
        power = frames[:, :bins].abs().square().mean(0)
        share = COLUMNS * block.shape[1] / reader.frames
        if power.shape[1] > share:
            power = F.adaptive_avg_pool1d(power, max(1, round(share)))
        columns.append(power)
    return 10 * torch.cat(columns, 1).clamp(min=1e-12).log10()
