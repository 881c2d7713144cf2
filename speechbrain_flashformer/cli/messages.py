"""What the commands say and how they end."""

import sys

OK, FAILED, USAGE, INTERRUPTED, UNHEARD = 0, 1, 2, 130, 141


class UsageError(ValueError):
    """The command line is wrong."""


def tell(message):
    """Say something that is no output, on standard error."""
    print(f"flashformer: {message}", file=sys.stderr, flush=True)
