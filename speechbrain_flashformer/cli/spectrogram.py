"""Spectrograms of recordings of any length, with one color scale.

Axes: C channels, n samples, K frequencies, L frames.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from speechbrain_flashformer.inference.audio import AudioReader

COLUMNS = 1200  # approximate width of the spectrogram of a long recording
DYNAMIC_RANGE_DB = 70
INK = "0.5"  # matplotlib's notation of a gray level


def draw_spectrograms(paths, folder, model_rate):
    """Draw recordings with one color scale, up to the model's Nyquist rate.

    Arguments
    ---------
    paths : list of Path
        Audio files of any length; the loudest bin of the first one sets the
        scale.
    folder : str or Path
        Where the PNG files go, one for each recording.
    model_rate : int
        Sampling rate of the model, Hz; the plot ends at half of it.

    Returns
    -------
    list of str
        Paths of the PNG files, NAME_spectrogram.png.

    Raises
    ------
    ValueError
        When a file cannot be read.

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
        # Grey on a transparent background is readable on light and dark pages.
        axes.tick_params(colors=INK, labelsize=8)
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set(color=INK, size=8)
        drawn.append(str(Path(folder) / f"{Path(path).stem}_spectrogram.png"))
        figure.savefig(drawn[-1], dpi=120, transparent=True)
    return drawn


def spectrogram(reader, top):
    """Compute the spectrogram of a recording up to a frequency.

    Arguments
    ---------
    reader : AudioReader
        The recording, read in blocks; the power of its channels is averaged.
    top : float
        Highest frequency in Hz, at most half the sampling rate.

    Returns
    -------
    torch.Tensor
        Level in dB, [K, L]. Long recordings have about 1200 columns, each the
        mean power of its interval.

    Raises
    ------
    ValueError
        When the recording cannot be read to its end.

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
        # Average the power, not the samples: channels that cancel each other
        # stay visible.
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
