"""Locks of folders; a process that ends in any way loses its locks."""

import contextlib
import os

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def locked(folder, wait=True):
    """Hold the lock of a folder.

    Where there are no locks, on Windows and on some file systems, nothing is
    held.

    Arguments
    ---------
    folder : str or Path
        A folder that exists.
    wait : bool
        Whether to wait until another process releases the lock.

    Yields
    ------
    bool
        Whether the lock is held.

    Raises
    ------
    BlockingIOError
        Without wait, if the lock is held elsewhere.

    Example
    -------
    >>> with locked(getfixture("tmp_path")) as held:
    ...     print(held is (fcntl is not None))
    True
    """
    if fcntl is None:
        yield False
        return
    handle, held = os.open(folder, os.O_RDONLY), True
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:  # the file system has no locks
            held = False
        yield held
    finally:
        os.close(handle)
