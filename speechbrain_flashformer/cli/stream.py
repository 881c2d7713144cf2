"""The command ``flashformer stream``."""

import os
import sys

from speechbrain_flashformer.cli.messages import UsageError, tell
from speechbrain_flashformer.cli.models import (
    add_model_options,
    add_runtime,
    load_separator,
)

LONGEST_BLOCK = 60_000  # milliseconds

STREAM = """\
Separate live audio with low latency. Standard input is raw PCM or a WAV
stream; several channels are mixed to one. Standard output is raw PCM with one
channel per speaker, at the rate and in the format of the input. The end of the
input or Ctrl-C ends the command. It first outputs the sources of all audio
that it has read.
"""

STREAM_EXAMPLES = """\
examples:
  arecord -f S16_LE -r 8000 | flashformer stream \\
      | aplay -f S16_LE -r 8000 -c 2
  ffmpeg -i URL -f s16le -ac 1 -ar 48000 - \\
      | flashformer stream --model MODEL --rate 48000 -o separated
"""


def _add_options(add):
    add(
        "-o",
        "--out",
        action="append",
        metavar="DIR",
        help="write the files DIR/stdin_s1.wav, ... at the end instead of "
        "standard output; '-o - -o DIR' does both",
    )
    add_model_options(add)
    add(
        "--rate",
        type=int,
        metavar="HZ",
        help="sampling rate of raw PCM (default: that of the model)",
    )
    add(
        "--input-channels",
        type=int,
        metavar="N",
        help="number of interleaved channels of raw PCM (default 1)",
    )
    add(
        "--format",
        choices=("s16le", "f32le"),
        help="sample format of raw PCM: 16-bit integers (default) or 32-bit "
        "floats, little-endian",
    )
    add(
        "--block",
        type=float,
        default=16.0,
        metavar="MS",
        help="block size in milliseconds (default 16). Longer blocks increase "
        "the latency and reduce the load",
    )
    add_runtime(add)
    add("--overwrite", action="store_true", help="replace existing files")


def _stream(parsed):
    folders = [out for out in parsed.out or ["-"] if out != "-"]
    listened = not folders or "-" in parsed.out
    counts = parsed.rate, parsed.input_channels
    if len(folders) > 1:
        raise UsageError("the sources can go to one folder only")
    if not 0 < parsed.block <= LONGEST_BLOCK:
        raise UsageError(
            f"--block must be more than 0 and at most {LONGEST_BLOCK} ms"
        )
    if any(n is not None and n < 1 for n in counts):
        raise UsageError("--rate and --input-channels must be 1 or more")
    if sys.stdin is None or listened and sys.stdout is None:
        raise UsageError("standard input or output is closed")
    if sys.stdin.isatty():
        raise UsageError("standard input is a terminal: pipe sound into it")
    if listened and sys.stdout.isatty():
        raise UsageError(
            "standard output is a terminal: pipe it, or give -o DIR"
        )
    # Blocks are short: with several threads, the threads mostly wait for each
    # other.
    threads = None if "OMP_NUM_THREADS" in os.environ else 1
    model = load_separator(
        parsed.model, parsed.device, parsed.trust, threads, streaming=True
    )
    from speechbrain_flashformer.inference.files import SourceWriter
    from speechbrain_flashformer.inference.live import PcmReader, separate_live
    from speechbrain_flashformer.inference.runtime import choose_steps

    run = choose_steps(model, parsed.runtime, parsed.block / 1000, tell)
    network_ms = 1000 * model.stream_latency()
    with PcmReader(
        _unbuffered(sys.stdin, "rb"),
        parsed.rate or model.hparams.sample_rate,
        parsed.input_channels or 1,
        parsed.format or "s16le",
    ) as reader:
        if reader.wav:
            _check_header(reader, parsed)
        rate = reader.sample_rate
        resampling_ms = 1000 * model.stream_latency(rate) - network_ms
        tell(
            f"{rate} Hz, {reader.encoding}, channels: {reader.channels}; "
            f"latency {parsed.block + network_ms + resampling_ms:.1f} ms: "
            f"block {parsed.block:g}, network {network_ms:.1f}, resampling "
            f"{resampling_ms:.1f}; runtime {'onnx' if run else 'torch'}"
        )
        writer = None
        if folders:
            paths = model.output_paths("stdin", folders[0])
            writer = SourceWriter(paths, rate, overwrite=parsed.overwrite)
        load = separate_live(
            model,
            reader,
            parsed.block / 1000,
            _unbuffered(sys.stdout, "wb") if listened else None,
            writer,
            lambda load: tell(
                f"falls behind: load {load:.2f} (computing / audio time); use "
                "a longer --block"
            ),
            run,
        )
    if load.audio:
        tell(
            f"{load.audio:.1f} s processed; load {load.spent / load.audio:.3f} "
            f"(computing / audio time); 99.9% of the blocks took "
            f"{1000 * load.percentile(99.9):.1f} ms or less; "
            f"{load.overruns} of {load.times.total()} blocks took longer than "
            "their duration"
        )
    for count, what in (
        (load.silenced, "invalid samples were replaced by silence"),
        (load.clipped, "samples were clipped: --format f32le avoids this"),
        (reader.cut, "bytes at the end are not a whole sample"),
    ):
        if count:
            tell(f"{count} {what}")
    return reader.status


def _unbuffered(stream, mode):
    """Open the descriptor of a standard stream without a buffer."""
    # A read of a non-blocking pipe returns None while no data is there.
    os.set_blocking(stream.fileno(), True)
    return open(stream.fileno(), mode, buffering=0, closefd=False)


def _check_header(reader, parsed):
    """Raise a ValueError if an option contradicts the WAV header."""
    for option, given, found in (
        ("--rate", parsed.rate, reader.sample_rate),
        ("--input-channels", parsed.input_channels, reader.channels),
        ("--format", parsed.format, reader.encoding),
    ):
        if given not in (None, found):
            raise ValueError(
                f"{option} is {given}, but the WAV header says {found}"
            )


COMMANDS = (
    (
        "stream",
        _stream,
        _add_options,
        "separate live audio from a pipe",
        STREAM,
        STREAM_EXAMPLES,
    ),
)
