"""The command ``flashformer``: separate, stream, app, pack, info, export.

Modules that import torch are imported when a command runs, so that ``--help``
is fast.
"""

import argparse
import codecs
import io
import os
import signal
import sys

from speechbrain_flashformer.cli import app, models, separate, stream
from speechbrain_flashformer.cli.messages import (
    BROKEN_PIPE,
    FAILED,
    INTERRUPTED,
    USAGE,
    UsageError,
    tell,
)
from speechbrain_flashformer.inference.jobs import exit_on_sigterm


def main(arguments=None):
    """Run the command.

    Arguments
    ---------
    arguments : list of str, optional
        The words after ``flashformer``; those of ``sys.argv`` by default.

    Returns
    -------
    int
        Exit status. 0: success. 1: something failed; the message says what.
        2: the command line is wrong. 130, 143: ended by SIGINT or SIGTERM. 141:
        the reader of standard output is gone.

    Raises
    ------
    SystemExit
        By argparse, with status 0 after ``--help`` and 2 when the command line
        is wrong; with status 143 on SIGTERM.
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
        # The reader is gone, as with `| head`. Python flushes stdout at exit,
        # so the rest must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except UsageError as error:
        tell(error)
        return USAGE
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        tell(error)
        return FAILED
    finally:
        signal.signal(signal.SIGTERM, before)


def _open_standard_streams():
    """Make stdout and stderr usable when closed or of a narrow encoding."""
    # Fill descriptors 0 to 2 if they are closed. Otherwise the next file that
    # is opened gets such a number, and error messages are written into it.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("flashformer", _encode_or_escape)
        sys.stdout.reconfigure(errors="flashformer")


def _encode_or_escape(error):
    """Return the raw bytes of a file name, or else an escape sequence."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


def _parser():
    parser = argparse.ArgumentParser(
        prog="flashformer",
        description="Separate overlapping speakers: one recording in, one "
        "file per speaker out.",
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
