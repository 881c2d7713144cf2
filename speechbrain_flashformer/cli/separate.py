"""The command ``flashformer separate``."""

import os
import sys
import tempfile
import warnings
from contextlib import closing
from dataclasses import fields
from functools import partial
from pathlib import Path

from speechbrain_flashformer.cli.messages import FAILED, OK, UsageError, tell
from speechbrain_flashformer.cli.models import (
    add_model_options,
    add_runtime,
    load_separator,
)
from speechbrain_flashformer.inference.jobs import run_jobs
from speechbrain_flashformer.inference.options import (
    CHOICES,
    SUBTYPES,
    SeparationOptions,
)

SEPARATE = """\
Separate recordings. For each INPUT write one file per speaker:
DIR/NAME_s1.wav, DIR/NAME_s2.wav, ... They have the length and sampling rate of
the input.

INPUT is an audio file, a folder, a quoted glob, or - for an audio file on
standard input (NAME is then stdin). A folder is searched recursively, and DIR
gets the same subfolders. Files in it that libsndfile cannot read, and sources
of recordings in it from an earlier run, are skipped.

The paths of the written files go to standard output, messages to standard
error. If a file fails, the others are still separated, and the exit status
is 1. Under torchrun each process takes its share of the files.
"""

EXAMPLES = """\
examples:
  flashformer separate meeting.wav -o separated
  flashformer separate recordings/ -o separated --model MODEL --jobs 2
  sox a.wav -t wav - | flashformer separate - -o separated
"""


def _add_options(add):
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="audio file, folder, quoted glob, or - for standard input",
    )
    add(
        "-o",
        "--out",
        required=True,
        metavar="DIR",
        type=Path,
        help="folder for the sources",
    )
    add_model_options(add)
    add(
        "--precision",
        default=SeparationOptions.precision,
        choices=CHOICES["precision"],
        help="precision of the network (default fp32)",
    )
    add(
        "--channels",
        default=SeparationOptions.channels,
        choices=CHOICES["channels"],
        help="mix (default): separate the mean of the channels, or the "
        "loudest channel where they cancel each other. each: separate each "
        "channel",
    )
    add(
        "--subtype",
        default="float",
        choices=SUBTYPES,
        help="sample format of the written files. float (default): 32 bit, "
        "cannot clip. pcm16, pcm24: if a source would clip, one gain for all "
        "sources sets the peak to 0.99",
    )
    add(
        "--normalize",
        action="store_true",
        help="scale all sources of a recording by one gain that sets the "
        "highest peak to 0.9",
    )
    add(
        "--turns",
        default=SeparationOptions.turns,
        choices=CHOICES["turns"],
        help="voice (default): move a turn of a conversation to the output of "
        "its speaker if the network puts it elsewhere, unless several channels "
        "are separated. network: leave it",
    )
    add(
        "--mixture-consistency",
        action="store_true",
        help="make the sources sum to the mixture: add the residual (mixture "
        "minus sum of sources) to the sources in equal parts",
    )
    add(
        "--chunk",
        type=float,
        default=SeparationOptions.chunk,
        metavar="SECONDS",
        help="chunk length; longer recordings are cut into chunks (default 10)",
    )
    add(
        "--overlap",
        type=float,
        default=SeparationOptions.overlap,
        metavar="SECONDS",
        help="overlap of neighboring chunks (default 2.5); less than half of "
        "--chunk",
    )
    add(
        "--norm",
        default=SeparationOptions.norm,
        choices=CHOICES["norm"],
        help="signal that the statistics of the input norm are computed from: "
        "each chunk (default), or the whole recording, which is then read "
        "once more",
    )
    add(
        "--streaming",
        action="store_true",
        help="separate as 'flashformer stream' does, without chunks; needs a "
        "causal model. It cannot be combined with --chunk, --overlap, --norm, "
        "--precision or --turns",
    )
    add_runtime(add)
    add("--overwrite", action="store_true", help="replace existing files")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="number of recordings to separate in parallel, each in a separate "
        "process (default 1)",
    )
    add("--quiet", action="store_true", help="show no progress bar")


def _separate(parsed):
    options = _check(parsed)
    for name in ("subtype", "normalize", "overwrite"):  # for SourceWriter
        options[name] = getattr(parsed, name)
    options["progress"] = (
        parsed.jobs == 1 and not parsed.quiet and sys.stderr.isatty()
    )
    from speechbrain_flashformer.inference.inputs import find_inputs

    with tempfile.TemporaryDirectory(prefix="flashformer-") as folder:
        # Load the model here even if only workers use it: an error in the
        # model is then reported once, before any work.
        arguments = parsed.model, parsed.device, parsed.trust
        model = load_separator(*arguments, streaming=parsed.streaming)
        if parsed.runtime == "onnx":
            from speechbrain_flashformer.inference.runtime import choose_steps

            # Export once here, not in each worker.
            choose_steps(model, "onnx", tell=tell)
        tasks, failures, notes = find_inputs(
            parsed.inputs, parsed.out, Path(folder)
        )
        for note in notes:
            tell(note)
        rank = int(os.environ.get("RANK", 0))
        tasks = tasks[rank :: int(os.environ.get("WORLD_SIZE", 1))]
        run = partial(run_task, options=options)
        if parsed.jobs == 1:
            outcomes = ((task, run(model, task)) for task in tasks)
        else:
            threads = max(1, (os.cpu_count() or 1) // parsed.jobs)
            load = partial(
                load_separator, *arguments, threads, parsed.streaming
            )
            outcomes = run_jobs(tasks, parsed.jobs, load, run, clean_up)
        with closing(outcomes):
            for (path, _, _), (written, failure) in outcomes:
                if failure:
                    failures.append(failure)
                    tell(f"{path} failed")
                for name in written:
                    print(name, flush=True)
    if failures:
        tell("\n  ".join([f"{len(failures)} failed:", *failures]))
    return FAILED if failures else OK


def _check(parsed):
    """Check the options; return the fields of ``SeparationOptions``."""
    if parsed.jobs < 1:
        raise UsageError("--jobs must be 1 or more")
    if parsed.inputs.count("-") > 1:
        raise UsageError("standard input can be given only once")
    if "-" in parsed.inputs and sys.stdin is None:
        raise UsageError("standard input is closed")
    if "-" in parsed.inputs and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("standard input cannot be shared by several processes")
    names = {field.name for field in fields(SeparationOptions)}
    options = {k: v for k, v in vars(parsed).items() if k in names}
    try:
        SeparationOptions(**options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return options


def run_task(model, task, options):
    """Separate one recording.

    Arguments
    ---------
    model : RecordingSeparator
        The model.
    task : tuple
        (path, folder, name) as from ``find_inputs``.
    options : dict
        Keyword arguments of ``separate_to_files``.

    Returns
    -------
    tuple
        (paths written as a list of str, None), or ([], error message).
    """
    path, folder, name = task
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: tell(message)
            paths = model.separate_to_files(path, folder, name, **options)
        return [str(path) for path in paths], None
    # Any error: the other recordings must still be separated.
    except Exception as error:
        reason = str(error) or type(error).__name__
        return [], reason if str(path) in reason else f"{path}: {reason}"


def clean_up(task, pid, exit_status):
    """Remove the unfinished files of a worker that died.

    Arguments
    ---------
    task : tuple
        (path, folder, name) of the recording that it was separating.
    pid : int
        Its process.
    exit_status : int
        Its exit status; -N if signal N killed it.

    Returns
    -------
    tuple
        ([], error message), as from ``run_task``.
    """
    from speechbrain_flashformer.inference import files

    path, folder, _ = task
    files.clean_up(folder, pid)
    return [], f"{path}: its process died (exit status {exit_status})"


COMMANDS = (
    (
        "separate",
        _separate,
        _add_options,
        "separate recordings into one file per speaker",
        SEPARATE,
        EXAMPLES,
    ),
)
