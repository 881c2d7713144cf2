"""A page to try a model in a browser: ``flashformer app``.

The page needs no network: scripts, styles and fonts come from this machine,
and gradio's telemetry, share links and run history are off.

Axes: C channels, n samples, K frequencies, L frames.
"""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from speechbrain_flashformer.inference.audio import AudioReader

FONTS = ("system-ui", "sans-serif")  # those of the machine: no download
# Seconds that uploads and results stay, and between looks at them.
KEPT, SWEEP = 3600, 60
COLUMNS = 1200  # of a spectrogram, about
DYNAMIC_RANGE_DB = 70
INK = "0.5"

# No waveform: a browser would decode the whole recording for it.
PLAYER = {
    "type": "filepath",
    "buttons": ["download"],
    "editable": False,
    "waveform_options": {"show_recording_waveform": False},
}
PICTURE = {
    "show_label": False,
    "interactive": False,
    "buttons": ["fullscreen"],
}

INTRODUCTION = """\
# FlashFormer
Drop or record {speakers} people who talk at the same time, and hear each of
them alone. Recordings of up to {minutes:g} minutes and {megabytes} MB: wav,
flac, ogg or mp3. The model hears what is below {top:g} kHz. Recordings stay on
the machine that serves this page, and there for an hour at most.
"""


@contextmanager
def serve(model, host="127.0.0.1", port=None, max_minutes=60, max_mb=500):
    """Serve the page while the context lasts.

    Arguments
    ---------
    model : FlashFormerSeparation
        What separates.
    host : str
        Address to listen at; one that is not loopback lets others in.
    port : int, optional
        The first free one from 7860 by default.
    max_minutes : float
        Longest recording that is taken.
    max_mb : int
        Largest file that is taken, in megabytes.

    Yields
    ------
    str
        The page's URL.

    Raises
    ------
    OSError
        When the port is taken.
    """
    # Uploads, results and whatever else gradio keeps on disk.
    parent = os.environ.get("GRADIO_TEMP_DIR")
    if parent:
        Path(parent).mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(
            prefix="flashformer-app-", dir=parent
        ) as folder,
        # gradio reads these when it is imported, too. It asks its own page
        # whether it is there, which no proxy knows.
        _environment(GRADIO_TEMP_DIR=folder, NO_PROXY="*", no_proxy="*"),
    ):
        gradio = _gradio()
        page = _build_page(model, folder, max_minutes, max_mb)
        try:
            _, url, _ = page.launch(
                server_name=host,
                server_port=port,
                max_file_size=f"{max_mb}mb",
                theme=gradio.themes.Default(
                    primary_hue="blue", font=FONTS, font_mono=FONTS
                ),
                footer_links=[],
                share=False,
                run_history=False,
                enable_monitoring=False,
                mcp_server=False,
                ssr_mode=False,
                pwa=False,
                quiet=True,
                prevent_thread_lock=True,
            )
            yield url
        finally:
            page.close(verbose=False)


@contextmanager
def _environment(**values):
    """Set environment variables while the context lasts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _build_page(model, folder, max_minutes, max_mb):
    """The page as ``gradio.Blocks``; what it makes goes into the folder."""
    gradio = _gradio()
    num_spks, rate = model.hparams.num_spks, model.hparams.sample_rate

    # gradio wants the progress as a default.
    def _separate(path, progress=gradio.Progress()):  # noqa: B008
        if path is None:
            raise gradio.Error(
                "Drop or record a mixture first.", print_exception=False
            )

        def _tell(done, total):
            if not page.is_running:
                raise InterruptedError("the page was closed")
            progress(done / total, f"{_clock(done)} of {_clock(total)}")

        try:
            _check_length(path, max_minutes)
            made = Path(tempfile.mkdtemp(dir=folder))
            sources = model.separate_to_files(
                path, made, subtype="pcm16", callback=_tell
            )
            pictures = draw_spectrograms([path, *sources], made, rate)
            return [gradio.Column(visible=True), *sources, *pictures]
        except (OSError, ValueError, RuntimeError) as error:
            # Visitors know their file by its name alone.
            message = str(error).replace(str(path), Path(path).name)
            raise gradio.Error(
                message, duration=None, print_exception=False
            ) from error

    with gradio.Blocks(
        title="FlashFormer", analytics_enabled=False, delete_cache=(SWEEP, KEPT)
    ) as page:
        gradio.Markdown(
            INTRODUCTION.format(
                speakers=num_spks,
                minutes=max_minutes,
                megabytes=max_mb,
                top=rate / 2000,
            )
        )
        mixture = gradio.Audio(label="Mixture", **PLAYER)
        button = gradio.Button("Separate", variant="primary")
        sounds, pictures = [], []
        with gradio.Column(visible=False) as results:
            pictures.append(
                gradio.Image(label="Mixture, spectrogram", **PICTURE)
            )
            with gradio.Row():
                for speaker in range(1, num_spks + 1):
                    with gradio.Column():
                        name = f"Speaker {speaker}"
                        sounds.append(
                            gradio.Audio(
                                label=name, interactive=False, **PLAYER
                            )
                        )
                        pictures.append(
                            gradio.Image(
                                label=f"{name}, spectrogram", **PICTURE
                            )
                        )
        button.click(
            _separate,
            mixture,
            [results, *sounds, *pictures],
            show_progress_on=mixture,
            api_name="separate",
        )
        # What is shown belongs to the mixture that is shown.
        mixture.change(
            lambda: gradio.Column(visible=False),
            outputs=results,
            show_progress="hidden",
            api_visibility="private",
        )
    return page


def _gradio():
    try:
        import gradio
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the page needs {error.name}: pip install "
            "'speechbrain-flashformer[app]'"
        ) from error
    return gradio


def _clock(seconds):
    return f"{int(seconds // 60)}:{int(seconds % 60):02}"


def _check_length(path, max_minutes):
    """Raise a ValueError if a recording is longer than the page takes."""
    reader = AudioReader(path)
    minutes = reader.frames / reader.sample_rate / 60
    if minutes > max_minutes:
        raise ValueError(
            f"{path} lasts {minutes:.1f} minutes and this page takes up to "
            f"{max_minutes:g}: cut it, use the command 'flashformer separate', "
            "or start the page with --max-minutes"
        )


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
        The recording, read in blocks; its channels are averaged.
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
        sound = F.pad(block.mean(0), (size // 2, size - size // 2))
        frames = torch.stft(
            sound,
            size,
            size // 4,
            window=window,
            center=False,
            return_complex=True,
        )
        power = frames[:bins].abs().square()
        share = COLUMNS * block.shape[1] / reader.frames
        if power.shape[1] > share:
            power = F.adaptive_avg_pool1d(power, max(1, round(share)))
        columns.append(power)
    return 10 * torch.cat(columns, 1).clamp(min=1e-12).log10()
