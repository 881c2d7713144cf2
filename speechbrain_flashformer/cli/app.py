"""A page to try a model in a browser: ``flashformer app``.

The page needs no network: scripts, styles and fonts come from this machine,
and gradio's telemetry, share links and run history are off.
"""

import os
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from speechbrain_flashformer.cli.messages import UsageError
from speechbrain_flashformer.cli.models import add_model_options, load_separator

FONTS = ("system-ui", "sans-serif")  # those of the machine: no download
# Seconds that uploads and results stay, and between looks at them.
KEEP_SECONDS, SWEEP_SECONDS = 3600, 60

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


def _add_options(add):
    add_model_options(add)
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen at (default 127.0.0.1: this machine alone). "
        "Any other lets in whoever reaches it: there is no password",
    )
    add("--port", type=int, help="default: the first free one from 7860")
    add(
        "--max-minutes",
        type=float,
        default=60,
        metavar="MINUTES",
        help="longest recording that the page takes (default 60)",
    )
    add(
        "--max-mb",
        type=int,
        default=500,
        metavar="MB",
        help="largest file that the page takes (default 500)",
    )


def _app(parsed):
    if parsed.max_minutes <= 0 or parsed.max_mb < 1:
        raise UsageError(
            "--max-minutes must be more than 0, --max-mb 1 or more"
        )
    model = load_separator(parsed.model, parsed.device, parsed.trust)
    limits = parsed.max_minutes, parsed.max_mb
    with serve(model, parsed.host, parsed.port, *limits) as url:
        print(url, flush=True)
        while True:
            time.sleep(1)


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
    from speechbrain_flashformer.cli.spectrogram import draw_spectrograms

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
        title="FlashFormer",
        analytics_enabled=False,
        delete_cache=(SWEEP_SECONDS, KEEP_SECONDS),
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
    from speechbrain_flashformer.inference.audio import AudioReader

    reader = AudioReader(path)
    minutes = reader.frames / reader.sample_rate / 60
    if minutes > max_minutes:
        raise ValueError(
            f"{path} lasts {minutes:.1f} minutes and this page takes up to "
            f"{max_minutes:g}: cut it, use the command 'flashformer separate', "
            "or start the page with --max-minutes"
        )


COMMANDS = (
    (
        "app",
        _app,
        _add_options,
        "serve a page to try a model in a browser (needs the extra app)",
    ),
)
