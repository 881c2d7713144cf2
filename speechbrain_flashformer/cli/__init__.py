"""The command ``flashformer``: separate, stream, app, pack, info, export."""

import argparse
import codecs
import io
import os
import signal
import sys
import tempfile
import time
import warnings
from contextlib import closing
from functools import partial
from pathlib import Path

from speechbrain_flashformer.inference.jobs import exit_on_sigterm, run_jobs

# Modules that load torch are imported in the commands: --help is quick.

OK, FAILED, USAGE, INTERRUPTED, UNHEARD = 0, 1, 2, 130, 141
# Of a stream, milliseconds.
LONGEST_BLOCK = 60_000

TRUST = (
    "let the model's yaml run any code: only for one whose maker you trust "
    "(default: it may build what 'flashformer pack' writes)"
)

SEPARATE = """\
Separate recordings: for each INPUT the files DIR/NAME_s1.wav, DIR/NAME_s2.wav,
... with its length and sampling rate.

INPUT is an audio file, a folder (searched to all depths, which DIR then
repeats), a quoted glob, or - for an audio file on standard input (NAME is then
stdin). Of folders all is taken that libsndfile can read, but not what was
separated before. The paths written go to standard output, all else to standard
error.
A file that fails does not stop the others; the exit status is then 1.
Under torchrun each process takes its share of the files.
"""

EXAMPLES = """\
examples:
  flashformer separate meeting.wav -o separated
  flashformer separate recordings/ -o separated --model MODEL --jobs 2
  sox a.wav -t wav - | flashformer separate - -o separated
"""

STREAM = """\
Separate live sound: raw PCM or a WAV stream on standard input, its sources on
standard output as they come, as raw PCM: one channel for each speaker, at the
rate and in the format of the input. Several channels are mixed to one. Ctrl-C
or the end of the input ends it, and what was heard is finished first.
"""

STREAM_EXAMPLES = """\
examples:
  arecord -f S16_LE -r 8000 | flashformer stream --model MODEL \\
      | aplay -f S16_LE -r 8000 -c 2
  ffmpeg -i URL -f s16le -ac 1 -ar 48000 - \\
      | flashformer stream --model MODEL --rate 48000 -o separated
"""


def main(arguments=None):
    """Run the command; returns its exit status.

    0: all done. 1: something failed, and its message tells what. 2: the
    command line is wrong. 130: interrupted. 141: nobody reads what it prints.
    143: terminated.
    """
    _open_standard_streams()
    parsed = _parser().parse_args(arguments)
    before = exit_on_sigterm()
    try:
        status = parsed.run(parsed)
        if sys.stdout:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Nobody reads on, as with `| head`: nothing more is to be said, nor
        # at the end by Python.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNHEARD
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"flashformer: {error}", file=sys.stderr)
        return FAILED
    finally:
        signal.signal(signal.SIGTERM, before)


def _open_standard_streams():
    """Lose nothing where a stream is closed, or cannot print a name."""
    # Else the next file that is opened is where others write their errors.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("flashformer", _encode_anyhow)
        sys.stdout.reconfigure(errors="flashformer")


def _encode_anyhow(error):
    """The bytes of a name that is no text; else an escape sequence."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


def _parser():
    parser = argparse.ArgumentParser(
        prog="flashformer",
        description="Speech separation: one recording in, one file per "
        "speaker out.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def _command(name, run, summary, **kwargs):
        sub = commands.add_parser(
            name,
            help=summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **{"description": summary, **kwargs},
        )
        sub.set_defaults(run=run)
        return sub

    add = _command(
        "separate",
        _separate,
        "separate recordings into one file per speaker",
        description=SEPARATE,
        epilog=EXAMPLES,
    ).add_argument
    add("inputs", nargs="+", metavar="INPUT")
    add("-o", "--out", required=True, metavar="DIR", type=Path)
    add(
        "--model",
        help="a packed model's folder, or hf:OWNER/NAME on a model hub "
        "(default: the model that comes with the package)",
    )
    add("--trust", action="store_true", help=TRUST)
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if any)")
    add("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    add(
        "--channels",
        default="mix",
        choices=("mix", "each"),
        help="separate the mean of the channels (default), or each",
    )
    add(
        "--subtype",
        default="float",
        choices=("float", "pcm16", "pcm24"),
        help="of the files written: float (default) never clips; in PCM one "
        "gain for all sources brings the peak to 0.99 if any would clip",
    )
    add(
        "--normalize",
        action="store_true",
        help="one gain for all sources brings the loudest peak to 0.9",
    )
    add(
        "--mixture-consistency",
        action="store_true",
        help="make the sources sum to the mixture",
    )
    add(
        "--chunk",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="longest piece that the model is given at once (default 10)",
    )
    add(
        "--overlap",
        type=float,
        default=2.5,
        metavar="SECONDS",
        help="what neighbouring pieces share (default 2.5)",
    )
    add(
        "--norm",
        default="chunk",
        choices=("chunk", "recording"),
        help="what the model's input norm is taken over (default chunk)",
    )
    add(
        "--streaming",
        action="store_true",
        help="separate as a stream, as the command stream does; needs a causal "
        "model, and no --chunk, --overlap, --norm or --precision with it",
    )
    add("--overwrite", action="store_true", help="replace existing files")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="recordings at a time, each in a process of its own (default 1)",
    )
    add("--quiet", action="store_true", help="no progress bar")

    add = _command(
        "stream",
        _stream,
        "separate live sound on a pipe",
        description=STREAM,
        epilog=STREAM_EXAMPLES,
    ).add_argument
    add(
        "-o",
        "--out",
        action="append",
        metavar="DIR",
        help="write DIR/stdin_s1.wav, ... at the end instead; -o - -o DIR "
        "does both",
    )
    add("--model", help="a causal model, as for separate")
    add("--trust", action="store_true", help=TRUST)
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if any)")
    add("--rate", type=int, metavar="HZ", help="of raw PCM (default: model's)")
    add(
        "--input-channels",
        type=int,
        metavar="N",
        help="of raw PCM, interleaved (default 1)",
    )
    add(
        "--format",
        choices=("s16le", "f32le"),
        help="of raw PCM: 16-bit integers (default) or 32-bit floats",
    )
    add(
        "--block",
        type=float,
        default=16.0,
        metavar="MS",
        help="milliseconds that are heard at once (default 16): more latency, "
        "less load",
    )
    add("--overwrite", action="store_true", help="replace existing files")

    add = _command(
        "app",
        _app,
        "serve a page to try a model in a browser (needs the extra app)",
    ).add_argument
    add("--model", help="as for separate")
    add("--trust", action="store_true", help=TRUST)
    add("--device", help="as for separate")
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

    add = _command(
        "pack",
        _pack,
        "make a self-contained model folder of a training run",
    ).add_argument
    add("run_folder", metavar="RUN_DIR", type=Path)
    add("out", metavar="OUT_DIR", type=Path)
    add("--half", action="store_true", help="weights in half precision")
    add("--overwrite", action="store_true", help="replace OUT_DIR")

    add = _command(
        "info", _info, "show what a model is and how it runs here"
    ).add_argument
    add("model", nargs="?", metavar="MODEL")
    add("--trust", action="store_true", help=TRUST)

    add = _command(
        "export",
        _export,
        "write a model as ONNX (needs the extra onnx)",
    ).add_argument
    add("model", metavar="MODEL")
    add("out", metavar="OUT.onnx", type=Path)
    add("--trust", action="store_true", help=TRUST)
    add(
        "--streaming",
        action="store_true",
        help="one step of a stream, with its state; needs a causal model",
    )
    add(
        "--block",
        type=float,
        metavar="MS",
        help="milliseconds of a step with --streaming (default 16)",
    )
    add("--overwrite", action="store_true", help="replace OUT.onnx")
    return parser


# --- separate ---------------------------------------------------------------


def _separate(parsed):
    wrong = None
    if parsed.jobs < 1:
        wrong = "--jobs must be 1 or more"
    elif not 0 < 2 * parsed.overlap < parsed.chunk:
        wrong = "--overlap must be more than 0 and less than half of --chunk"
    elif parsed.inputs.count("-") > 1:
        wrong = "standard input can be given only once"
    elif "-" in parsed.inputs and sys.stdin is None:
        wrong = "standard input is closed"
    elif "-" in parsed.inputs and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        wrong = "standard input cannot be shared by several processes"
    if wrong:
        print(f"flashformer: {wrong}", file=sys.stderr)
        return USAGE
    model, device = _model_folder(parsed.model), _device(parsed.device)
    names = ("precision", "channels", "mixture_consistency", "chunk")
    names += ("overlap", "norm", "streaming")
    options = {name: getattr(parsed, name) for name in names}
    from speechbrain_flashformer.inference.interface import SeparationOptions

    try:
        SeparationOptions(**options)
    except ValueError as error:
        print(f"flashformer: {error}", file=sys.stderr)
        return USAGE
    for name in ("subtype", "normalize", "overwrite"):  # of the files
        options[name] = getattr(parsed, name)
    options["progress"] = (
        parsed.jobs == 1 and not parsed.quiet and sys.stderr.isatty()
    )
    from speechbrain_flashformer.inference.inputs import find_inputs

    with tempfile.TemporaryDirectory(prefix="flashformer-") as folder:
        tasks, failures, notes = find_inputs(
            parsed.inputs, parsed.out, Path(folder)
        )
        for note in notes:
            _tell(note)
        rank = int(os.environ.get("RANK", 0))
        tasks = tasks[rank :: int(os.environ.get("WORLD_SIZE", 1))]
        # In this process too when there are workers: what is wrong with the
        # model is told once, and before work.
        _load(model, device, trust=parsed.trust)
        if parsed.jobs == 1:
            outcomes = ((task, _run_task(task, options)) for task in tasks)
        else:
            threads = max(1, (os.cpu_count() or 1) // parsed.jobs)
            outcomes = run_jobs(
                tasks,
                parsed.jobs,
                partial(_load, model, device, threads, parsed.trust),
                partial(_run_task, options=options),
                _clean_up,
            )
        with closing(outcomes):
            for (path, _, _), (written, failure) in outcomes:
                if failure:
                    failures.append(failure)
                    print(f"flashformer: {path} failed", file=sys.stderr)
                for name in written:
                    print(name, flush=True)
    if failures:
        print(
            f"flashformer: {len(failures)} failed:",
            *(f"  {message}" for message in failures),
            sep="\n",
            file=sys.stderr,
        )
    return FAILED if failures else OK


_MODEL = None


def _load(model, device, threads=None, trust=False):
    """Load the model of this process."""
    global _MODEL
    import torch

    from speechbrain_flashformer.inference import FlashFormerSeparation

    if threads:
        torch.set_num_threads(threads)
    _MODEL = FlashFormerSeparation.from_hparams(
        model, trust=trust, run_opts={"device": device}
    )


def _run_task(task, options):
    """Separate one recording: (the paths written, or what went wrong)."""
    path, folder, name = task
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _tell(message)
            paths = _MODEL.separate_to_files(path, folder, name, **options)
        return [str(path) for path in paths], None
    # Whatever it is, the other recordings are still to be separated.
    except Exception as error:
        reason = str(error) or type(error).__name__
        return [], reason if str(path) in reason else f"{path}: {reason}"


def _clean_up(task, pid, exit_status):
    """What is left to do for a recording whose process died."""
    from speechbrain_flashformer.inference.files import clean_up

    path, folder, _ = task
    clean_up(folder, pid)
    return [], f"{path}: its process died (exit status {exit_status})"


def _model_folder(name):
    if name:
        return name
    from speechbrain_flashformer.inference.interface import built_in_model

    return str(built_in_model())


def _device(name):
    """The device asked for; else the one that SpeechBrain trains on here."""
    import torch
    from speechbrain.utils.distributed import infer_device

    if not name:
        return infer_device()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: {first}") from error
    return name


# --- stream -----------------------------------------------------------------


def _stream(parsed):
    folders = [out for out in parsed.out or ["-"] if out != "-"]
    listened = not folders or "-" in parsed.out
    counts = parsed.rate, parsed.input_channels
    wrong = None
    if len(folders) > 1:
        wrong = "the sources can go to one folder only"
    elif not 0 < parsed.block <= LONGEST_BLOCK:
        wrong = f"--block must be more than 0 and at most {LONGEST_BLOCK} ms"
    elif any(n is not None and n < 1 for n in counts):
        wrong = "--rate and --input-channels must be 1 or more"
    elif sys.stdin is None or listened and sys.stdout is None:
        wrong = "standard input or output is closed"
    elif sys.stdin.isatty():
        wrong = "standard input is a terminal: pipe sound into it"
    elif listened and sys.stdout.isatty():
        wrong = "standard output is a terminal: pipe it, or give -o DIR"
    if wrong:
        print(f"flashformer: {wrong}", file=sys.stderr)
        return USAGE
    # More threads than one only wait for each other on blocks so short.
    threads = None if "OMP_NUM_THREADS" in os.environ else 1
    model, device = _model_folder(parsed.model), _device(parsed.device)
    _load(model, device, threads, parsed.trust)

    from speechbrain_flashformer.inference.files import SourceWriter
    from speechbrain_flashformer.inference.live import PcmReader, separate_live

    network_ms = 1000 * _MODEL.stream_latency()
    with PcmReader(
        _unbuffered(sys.stdin, "rb"),
        parsed.rate or _MODEL.hparams.sample_rate,
        parsed.input_channels or 1,
        parsed.format or "s16le",
    ) as reader:
        if reader.wav:
            _check_header(reader, parsed)
        rate = reader.sample_rate
        resampling_ms = 1000 * _MODEL.stream_latency(rate) - network_ms
        _tell(
            f"{rate} Hz, {reader.encoding}, channels: {reader.channels}; "
            f"latency {parsed.block + network_ms + resampling_ms:.1f} ms: "
            f"block {parsed.block:g}, network {network_ms:.1f}, resampling "
            f"{resampling_ms:.1f}"
        )
        writer = None
        if folders:
            paths = _MODEL.output_paths("stdin", folders[0])
            writer = SourceWriter(paths, rate, overwrite=parsed.overwrite)
        load = separate_live(
            _MODEL,
            reader,
            parsed.block / 1000,
            _unbuffered(sys.stdout, "wb") if listened else None,
            writer,
            lambda load: _tell(
                f"falls behind: load {load:.2f} (computing / audio); a longer "
                "--block costs less"
            ),
        )
    if load.heard:
        _tell(
            f"{load.heard:.1f} s heard; load {load.spent / load.heard:.3f} "
            f"(computing / audio); 99.9% of the blocks took "
            f"{1000 * load.percentile(99.9):.1f} ms or less; "
            f"{load.overruns} of {load.times.total()} took longer than they "
            "last"
        )
    for count, what in (
        (load.silenced, "samples are no sound and are taken as silence"),
        (load.clipped, "samples are clipped: --format f32le does not"),
        (reader.cut, "bytes at the end are no whole sample"),
    ):
        if count:
            _tell(f"{count} {what}")
    return reader.status


def _unbuffered(stream, mode):
    # Else a read is None while nothing is there.
    os.set_blocking(stream.fileno(), True)
    return open(stream.fileno(), mode, buffering=0, closefd=False)


def _check_header(reader, parsed):
    """A WAV header and the options must say the same."""
    for option, given, found in (
        ("--rate", parsed.rate, reader.sample_rate),
        ("--input-channels", parsed.input_channels, reader.channels),
        ("--format", parsed.format, reader.encoding),
    ):
        if given not in (None, found):
            raise ValueError(
                f"{option} is {given}, but the WAV header says {found}"
            )


def _tell(message):
    print(f"flashformer: {message}", file=sys.stderr, flush=True)


# --- the other commands -----------------------------------------------------


def _app(parsed):
    if parsed.max_minutes <= 0 or parsed.max_mb < 1:
        print(
            "flashformer: --max-minutes must be more than 0, --max-mb 1 or "
            "more",
            file=sys.stderr,
        )
        return USAGE
    from speechbrain_flashformer.cli.app import serve

    model, device = _model_folder(parsed.model), _device(parsed.device)
    _load(model, device, trust=parsed.trust)
    limits = parsed.max_minutes, parsed.max_mb
    with serve(_MODEL, parsed.host, parsed.port, *limits) as url:
        print(url, flush=True)
        while True:
            time.sleep(1)


def _pack(parsed):
    from speechbrain_flashformer.inference.pack import pack

    out = pack(parsed.run_folder, parsed.out, parsed.half, parsed.overwrite)
    print(out)
    return OK


def _info(parsed):
    folder = _model_folder(parsed.model)
    _load(folder, _device(None), trust=parsed.trust)
    for name, value in {"model": folder, **_MODEL.describe()}.items():
        print(f"{name:24}{value}")
    return OK


def _export(parsed):
    if parsed.block is not None and not parsed.streaming:
        print("flashformer: --block needs --streaming", file=sys.stderr)
        return USAGE
    from speechbrain_flashformer.inference import export

    model, device = _model_folder(parsed.model), _device(None)
    _load(model, device, trust=parsed.trust)
    arguments = _MODEL, parsed.out, parsed.overwrite
    if parsed.streaming:
        block = 16.0 if parsed.block is None else parsed.block
        path = export.export_streaming_onnx(*arguments, block)
    else:
        path = export.export_onnx(*arguments)
    print(path)
    return OK
