"""Open audio files in libsndfile, directly or as a view of parts of a file."""

import io
import os
from bisect import bisect_right

import soundfile


def open_sound(path, pieces=None):
    """Open a stream of an audio file for one pass from start to end.

    Arguments
    ---------
    path : str or Path
        The file.
    pieces : list, optional
        Pieces of a ``View``, as from ``find_streams``. By default the file is
        opened directly.

    Returns
    -------
    soundfile.SoundFile
        It cannot seek.

    Raises
    ------
    OSError
        When the file cannot be opened.
    soundfile.SoundFileError
        When libsndfile cannot read it.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.wav"
    >>> soundfile.write(path, [0.0] * 80, 8000)
    >>> with open_sound(path) as sound:
    ...     sound.frames
    80
    """
    return _Forward(View(path, pieces) if pieces else native_name(path))


def native_name(path):
    """Convert a path for soundfile, so that names need not be UTF-8.

    Arguments
    ---------
    path : str or Path
        Any path.

    Returns
    -------
    str or bytes
        str on Windows, else bytes.
    """
    return str(path) if os.name == "nt" else os.fsencode(path)


class _Forward(soundfile.SoundFile):
    """A SoundFile that does not seek, which fails if the length is unknown."""

    def seekable(self):
        """Return False."""
        return False


class View(io.RawIOBase):
    """A read-only file that concatenates bytes and parts of another file.

    Arguments
    ---------
    path : str or Path
        The other file.
    pieces : list
        In order: bytes, or (start, stop) for a part of the other file, in
        bytes.

    Raises
    ------
    OSError
        When the other file cannot be opened.

    Example
    -------
    >>> path = getfixture("tmp_path") / "digits"
    >>> path.write_bytes(b"0123456789")
    10
    >>> with View(path, [b"ab", (2, 5), b"c"]) as view:
    ...     view.read()
    b'ab234c'
    """

    def __init__(self, path, pieces):
        self.file = open(path, "rb")
        self.pieces, self.starts, self.size = pieces, [], 0
        for piece in pieces:
            self.starts.append(self.size)
            given = isinstance(piece, bytes)
            self.size += len(piece) if given else piece[1] - piece[0]
        self.position = 0

    def readable(self):
        """Return True."""
        return True

    def tell(self):
        """Return the position in bytes."""
        return self.position

    def seek(self, offset, whence=io.SEEK_SET):
        """Set the position, as ``io.IOBase.seek`` does, and return it."""
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self.position}
        self.position = max(0, origins.get(whence, self.size) + offset)
        return self.position

    def readinto(self, buffer):
        """Fill a buffer up to the end of the view; return the bytes read."""
        # Fill it completely: libsndfile takes a short read for the end of the
        # file.
        filled = 0
        while filled < len(buffer) and self.position < self.size:
            place = bisect_right(self.starts, self.position) - 1
            piece = self.pieces[place]
            inside = self.position - self.starts[place]
            wanted = len(buffer) - filled
            if isinstance(piece, bytes):
                data = piece[inside : inside + wanted]
            else:
                start, stop = piece
                self.file.seek(start + inside)
                data = self.file.read(min(wanted, stop - start - inside))
            if not data:
                break  # the file has shrunk
            buffer[filled : filled + len(data)] = data
            filled += len(data)
            self.position += len(data)
        return filled

    def close(self):
        """Close the other file."""
        self.file.close()
        super().close()
