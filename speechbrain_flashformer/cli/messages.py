"""Messages and exit statuses of the commands."""

import sys

OK, FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141


class UsageError(ValueError):
    """The command line is wrong."""


def tell(message):
    """Print a message, which is not output, on standard error.

    Arguments
    ---------
    message : object
        Printed by its ``str`` after ``flashformer:``.
    """
    print(f"flashformer: {message}", file=sys.stderr, flush=True)
