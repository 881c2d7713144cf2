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

FONTS = ("system-ui", "sans-serif")  # fonts of the system need no download
# Lifetime of uploads and results, and interval between clean-ups.
KEEP_SECONDS, SWEEP_SECONDS = 3600, 60

# No waveform: the browser would decode the whole recording to draw it.
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
them alone. The page takes wav, flac, ogg and mp3 files of up to {minutes:g}
minutes and {megabytes} MB. The model processes frequencies below {top:g} kHz.
Recordings stay on the machine that serves this page and are deleted after an
hour at most.
"""


def _add_options(add):
    add_model_options(add)
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default 127.0.0.1: this machine only). "
        "There is no password: with another address, everyone who can reach "
        "it can use the page",
    )
    add(
        "--port",
        type=int,
        help="port to listen on (default: the first free port from 7860)",
    )
    add(
        "--max-minutes",
        type=float,
        default=60,
        metavar="MINUTES",
        help="longest recording that the page accepts (default 60)",
    )
    add(
        "--max-mb",
        type=int,
        default=500,
        metavar="MB",
        help="largest file that the page accepts (default 500)",
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
    """Serve the page until the context ends.

    Arguments
    ---------
    model : FlashFormerSeparation or RecordingSeparator
        The model that separates.
    host : str
        Address to listen on. There is no password: an address other than
        loopback gives access to other machines.
    port : int, optional
        Port to listen on; the first free one from 7860 by default.
    max_minutes : float
        Longest recording that the page accepts.
    max_mb : int
        Largest file that the page accepts, in megabytes.

    Yields
    ------
    str
        The URL of the page.

    Raises
    ------
    ImportError
        When the extra app is not installed.
    OSError
        When the port is in use.
    """
    # The temporary folder gets uploads, results and other files of gradio.
    parent = os.environ.get("GRADIO_TEMP_DIR")
    if parent:
        Path(parent).mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(
            prefix="flashformer-app-", dir=parent
        ) as folder,
        # Set before gradio is imported, because it reads them then, too. It
        # requests its own page to see if it is up; a proxy would break that.
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
    """Build the page, a ``gradio.Blocks`` that writes into a folder."""
    from speechbrain_flashformer.cli.spectrogram import draw_spectrograms

    gradio = _gradio()
    num_spks, rate = model.hparams.num_spks, model.hparams.sample_rate

    # gradio recognizes the progress bar by this default value.
    def _separate(path, progress=gradio.Progress()):  # noqa: B008
        if path is None:
            raise gradio.Error(
                "Drop or record a mixture first.", print_exception=False
            )

        def _report(done, total):
            if not page.is_running:
                raise InterruptedError("the page was closed")
            progress(done / total, f"{_clock(done)} of {_clock(total)}")

        try:
            _check_length(path, max_minutes)
            made = Path(tempfile.mkdtemp(dir=folder))
            sources = model.separate_to_files(
                path, made, subtype="pcm16", callback=_report
            )
            pictures = draw_spectrograms([path, *sources], made, rate)
            return [gradio.Column(visible=True), *sources, *pictures]
        except (OSError, ValueError, RuntimeError) as error:
            # Visitors know the name of their file, not its path here.
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
        # Hide the results of the mixture that was there before.
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
    """Raise a ValueError if a recording is longer than the page accepts."""
    from speechbrain_flashformer.inference.audio import AudioReader

    reader = AudioReader(path)
    minutes = reader.frames / reader.sample_rate / 60
    if minutes > max_minutes:
        raise ValueError(
            f"{path} lasts {minutes:.1f} minutes, but this page accepts at "
            f"most {max_minutes:g}: cut the recording, use the command "
            "'flashformer separate', or start the page with a larger "
            "--max-minutes"
        )


COMMANDS = (
    (
        "app",
        _app,
        _add_options,
        "serve a web page to try a model in a browser (needs the extra app)",
    ),
)
