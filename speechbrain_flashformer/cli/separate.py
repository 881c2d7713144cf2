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


def _add_options(add):
    add("inputs", nargs="+", metavar="INPUT")
    add("-o", "--out", required=True, metavar="DIR", type=Path)
    add_model_options(add)
    add(
        "--precision",
        default=SeparationOptions.precision,
        choices=CHOICES["precision"],
    )
    add(
        "--channels",
        default=SeparationOptions.channels,
        choices=CHOICES["channels"],
        help="separate the mean of the channels (default), or each",
    )
    add(
        "--subtype",
        default="float",
        choices=SUBTYPES,
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
        default=SeparationOptions.chunk,
        metavar="SECONDS",
        help="longest piece that the model is given at once (default 10)",
    )
    add(
        "--overlap",
        type=float,
        default=SeparationOptions.overlap,
        metavar="SECONDS",
        help="what neighbouring pieces share (default 2.5)",
    )
    add(
        "--norm",
        default=SeparationOptions.norm,
        choices=CHOICES["norm"],
        help="what the model's input norm is taken over (default chunk)",
    )
    add(
        "--streaming",
        action="store_true",
        help="separate as a stream, as the command stream does, with a causal "
        "model; no --chunk, --overlap, --norm or --precision with it",
    )
    add_runtime(add)
    add("--overwrite", action="store_true", help="replace existing files")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="recordings at a time, each in a process of its own (default 1)",
    )
    add("--quiet", action="store_true", help="no progress bar")


def _separate(parsed):
    options = _check(parsed)
    for name in ("subtype", "normalize", "overwrite"):  # of the files
        options[name] = getattr(parsed, name)
    options["progress"] = (
        parsed.jobs == 1 and not parsed.quiet and sys.stderr.isatty()
    )
    from speechbrain_flashformer.inference.inputs import find_inputs

    with tempfile.TemporaryDirectory(prefix="flashformer-") as folder:
        # In this process too when there are workers: what is wrong with the
        # model is told once, and before work.
        arguments = parsed.model, parsed.device, parsed.trust
        model = load_separator(*arguments, streaming=parsed.streaming)
        if parsed.runtime == "onnx":
            from speechbrain_flashformer.inference.runtime import choose_steps

            choose_steps(model, "onnx", tell=tell)  # exported once for all
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
    """The fields of ``SeparationOptions`` that were chosen, as a dict."""
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
    """Separate one recording: (the paths written, or what went wrong)."""
    path, folder, name = task
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: tell(message)
            paths = model.separate_to_files(path, folder, name, **options)
        return [str(path) for path in paths], None
    # Whatever it is, the other recordings are still to be separated.
    except Exception as error:
        reason = str(error) or type(error).__name__
        return [], reason if str(path) in reason else f"{path}: {reason}"


def clean_up(task, pid, exit_status):
    """What is left to do for a recording whose process died."""
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
