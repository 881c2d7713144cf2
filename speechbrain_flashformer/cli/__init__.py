"""The command ``flashformer``: separate, stream, app, pack, info, export.

What loads torch is imported when a command runs: --help is quick.
"""

import argparse
import codecs
import io
import os
import signal
import sys

from speechbrain_flashformer.cli import app, models, separate, stream
from speechbrain_flashformer.cli.messages import (
    FAILED,
    INTERRUPTED,
    UNHEARD,
    USAGE,
    UsageError,
    tell,
)
from speechbrain_flashformer.inference.jobs import exit_on_sigterm


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
    except UsageError as error:
        tell(error)
        return USAGE
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        tell(error)
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
    for name, run, add_options, summary, *texts in (
        *separate.COMMANDS,
        *stream.COMMANDS,
        *app.COMMANDS,
        *models.COMMANDS,
    ):
        description, epilog = texts or (summary, None)
        command = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_options(command.add_argument)
        command.set_defaults(run=run)
    return parser
