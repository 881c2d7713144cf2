"""The command ``flashformer``: separate, app, pack, info, export."""

import argparse
import glob
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from speechbrain_flashformer.jobs import exit_on_sigterm, run_jobs

# Modules that load torch are imported in the commands: --help is quick.

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

SEPARATE = """\
Separate recordings: for each INPUT the files DIR/NAME_s1.wav, DIR/NAME_s2.wav,
... with its length and sampling rate.

INPUT is an audio file, a folder (searched to all depths, which DIR then
repeats), a quoted glob, or - for an audio file on standard input (NAME is then
stdin). The paths written go to standard output, all else to standard error.
A file that fails does not stop the others; the exit status is then 1.
Under torchrun each process takes its share of the files.
"""

EXAMPLES = """\
examples:
  flashformer separate meeting.wav -o separated
  flashformer separate recordings/ -o separated --model MODEL --jobs 2
  sox a.wav -t wav - | flashformer separate - -o separated
"""


def main(arguments=None):
    """Run the command; returns its exit status.

    0: all done. 1: something failed, and its message tells what. 2: the
    command line is wrong. 130: interrupted. 143: terminated.
    """
    parsed = _parser().parse_args(arguments)
    before = exit_on_sigterm()
    try:
        return parsed.run(parsed)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"flashformer: {error}", file=sys.stderr)
        return FAILED
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser():
    parser = argparse.ArgumentParser(
        prog="flashformer",
        description="Speech separation: one recording in, one file per "
        "speaker out.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, summary, **kwargs):
        sub = commands.add_parser(
            name,
            help=summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **{"description": summary, **kwargs},
        )
        sub.set_defaults(run=run)
        return sub

    add = command(
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
        help="a packed model's folder, or its name on a model hub (default: "
        "the model that comes with the package)",
    )
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
    add("--overwrite", action="store_true", help="replace existing files")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="recordings at a time, each in a process of its own (default 1)",
    )
    add("--quiet", action="store_true", help="no progress bar")

    add = command(
        "app",
        _app,
        "serve a page to try a model in a browser (needs the extra app)",
    ).add_argument
    add("--model", help="as for separate")
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

    add = command(
        "pack",
        _pack,
        "make a self-contained model folder of a training run",
    ).add_argument
    add("run_folder", metavar="RUN_DIR", type=Path)
    add("out", metavar="OUT_DIR", type=Path)
    add("--half", action="store_true", help="weights in half precision")
    add("--overwrite", action="store_true", help="replace OUT_DIR")

    add = command(
        "info", _info, "show what a model is and how it runs here"
    ).add_argument
    add("model", nargs="?", metavar="MODEL")

    add = command(
        "export",
        _export,
        "write a model as ONNX (needs the extra onnx)",
    ).add_argument
    add("model", metavar="MODEL")
    add("out", metavar="OUT.onnx", type=Path)
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
    elif "-" in parsed.inputs and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        wrong = "standard input cannot be shared by several processes"
    if wrong:
        print(f"flashformer: {wrong}", file=sys.stderr)
        return USAGE
    model, device = _model_folder(parsed.model), _device(parsed.device)
    fields = ("precision", "channels", "subtype", "normalize", "chunk")
    fields += ("mixture_consistency", "overlap", "norm", "overwrite")
    options = {name: getattr(parsed, name) for name in fields}
    options["progress"] = (
        parsed.jobs == 1 and not parsed.quiet and sys.stderr.isatty()
    )
    with _standard_input("-" in parsed.inputs) as standard_input:
        tasks, failures = _find_inputs(
            parsed.inputs, parsed.out, standard_input
        )
        rank = int(os.environ.get("RANK", 0))
        tasks = tasks[rank :: int(os.environ.get("WORLD_SIZE", 1))]
        # In this process too when there are workers: what is wrong with the
        # model is told once, and before work.
        _load(model, device)
        if parsed.jobs == 1:
            outcomes = ((task, _run_task(task, options)) for task in tasks)
        else:
            threads = max(1, (os.cpu_count() or 1) // parsed.jobs)
            outcomes = run_jobs(
                tasks,
                parsed.jobs,
                partial(_load, model, device, threads),
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


def _find_inputs(inputs, out, standard_input):
    """The recordings named: (path, folder, name) each; what is none."""
    from speechbrain_flashformer.audio import AUDIO_SUFFIXES

    found, failures = [], []
    for word in inputs:
        if word == "-":
            found.append((standard_input, out, "stdin"))
            continue
        # A name that exists is no pattern, whatever characters it has.
        names = [word]
        if not Path(word).exists():
            names = sorted(glob.glob(word, recursive=True)) or [word]
        for path in map(Path, names):
            if not path.is_dir():
                found.append((path, out, path.stem))
                continue
            inside = [
                file
                for file in sorted(path.rglob("*"))
                if file.suffix.lower() in AUDIO_SUFFIXES
                and file.is_file()
                and not file.name.startswith(".")
                # What was separated before is no recording.
                and out.resolve() not in file.resolve().parents
            ]
            if not inside:
                failures.append(f"no audio file in {path}")
            found += [
                (file, out / file.parent.relative_to(path), file.stem)
                for file in inside
            ]
    found = list(dict.fromkeys(found))
    taken = {}
    for path, folder, name in found:
        other = taken.setdefault((folder, name), path)
        if other.resolve() != path.resolve():
            raise ValueError(
                f"{other} and {path} would both be written as "
                f"{folder / name}_s1.wav: separate them into different folders"
            )
    return [(path, *place) for place, path in taken.items()], failures


@contextmanager
def _standard_input(wanted):
    """Standard input as a file: readers have to seek."""
    if not wanted:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stdin.audio"
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield path


_MODEL = None


def _load(model, device, threads=None):
    """Load the model of this process."""
    global _MODEL
    import torch

    from speechbrain_flashformer.inference import FlashFormerSeparation

    if threads:
        torch.set_num_threads(threads)
    _MODEL = FlashFormerSeparation.from_hparams(
        model, run_opts={"device": device}
    )


def _run_task(task, options):
    """Separate one recording: (the paths written, or what went wrong)."""
    path, folder, name = task
    try:
        paths = _MODEL.separate_to_files(path, folder, name, **options)
        return [str(path) for path in paths], None
    # Whatever it is, the other recordings are still to be separated.
    except Exception as error:
        reason = str(error) or type(error).__name__
        return [], reason if str(path) in reason else f"{path}: {reason}"


def _clean_up(task, pid, exit_status):
    """What is left to do for a recording whose process died."""
    from speechbrain_flashformer.audio import partial_prefix

    path, folder, _ = task
    for left in folder.glob(f"{partial_prefix(pid)}*"):
        left.unlink(missing_ok=True)
    return [], f"{path}: its process died (exit status {exit_status})"


def _model_folder(name):
    if name:
        return name
    from speechbrain_flashformer.inference import built_in_model

    return str(built_in_model())


def _device(name):
    """The device asked for; else this process's GPU, else the CPU."""
    import torch

    if name:
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            first = str(error).splitlines()[0]
            raise ValueError(f"--device {name}: {first}") from error
        return name
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "cpu"


# --- the other commands -----------------------------------------------------


def _app(parsed):
    if parsed.max_minutes <= 0 or parsed.max_mb < 1:
        print(
            "flashformer: --max-minutes must be more than 0, --max-mb 1 or "
            "more",
            file=sys.stderr,
        )
        return USAGE
    from speechbrain_flashformer.app import serve

    model, device = _model_folder(parsed.model), _device(parsed.device)
    _load(model, device)
    limits = parsed.max_minutes, parsed.max_mb
    with serve(_MODEL, parsed.host, parsed.port, *limits) as url:
        print(url, flush=True)
        while True:
            time.sleep(1)


def _pack(parsed):
    from speechbrain_flashformer.pack import pack

    out = pack(parsed.run_folder, parsed.out, parsed.half, parsed.overwrite)
    print(out)
    return OK


def _info(parsed):
    from speechbrain_flashformer.inference import FlashFormerSeparation

    model = FlashFormerSeparation.from_hparams(_model_folder(parsed.model))
    for name, value in model.describe().items():
        print(f"{name:24}{value}")
    return OK


def _export(parsed):
    from speechbrain_flashformer.export import export_onnx
    from speechbrain_flashformer.inference import FlashFormerSeparation

    model = FlashFormerSeparation.from_hparams(_model_folder(parsed.model))
    print(export_onnx(model, parsed.out, parsed.overwrite))
    return OK


if __name__ == "__main__":
    sys.exit(main())
