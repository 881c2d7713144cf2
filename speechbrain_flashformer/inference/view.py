"""Audio files as libsndfile reads them, or a view of one made of its pieces."""

import io
import os
from bisect import bisect_right

import soundfile


def open_sound(path, pieces=None):
    """Open a stream of a file for reading it once, from its begin to its end.

    Arguments
    ---------
    path : str or Path
        The file.
    pieces : list, optional
        As ``find_streams`` gives them.

    Returns
    -------
    soundfile.SoundFile

    Raises
    ------
    soundfile.SoundFileError
        When libsndfile cannot read it.
    """
    return _Forward(View(path, pieces) if pieces else native_name(path))


def native_name(path):
    """A path as soundfile takes it, even where it is no UTF-8."""
    return str(path) if os.name == "nt" else os.fsencode(path)


class _Forward(soundfile.SoundFile):
    """A file that is not seeked: where no length is known that cannot work."""

    def seekable(self):
        """Whether it can be seeked: never."""
        return False


class View(io.RawIOBase):
    """A file to read, made of pieces of another.

    Arguments
    ---------
    path : str or Path
        The other file.
    pieces : list
        In order: bytes as they are, or (start, stop) in the other file.

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
        """It is."""
        return True

    def tell(self):
        """Bytes from the start."""
        return self.position

    def seek(self, offset, whence=io.SEEK_SET):
        """Go on from there."""
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self.position}
        self.position = max(0, origins.get(whence, self.size) + offset)
        return self.position

    def readinto(self, buffer):
        """Fill the buffer, as far as the file goes."""
        # libsndfile takes less than it asked for as the end of the file.
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
