"""Files that are written beside and renamed when whole; those of the sources.

Axes: C channels, S speakers, n samples.
"""

import os
import shutil
import uuid
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import soundfile

from speechbrain_flashformer.inference.options import SUBTYPES
from speechbrain_flashformer.inference.view import native_name

BYTES = {"FLOAT": 4, "PCM_16": 2, "PCM_24": 3}  # per sample
SOFTWARE = "speechbrain_flashformer"  # tells sources from recordings
WAV_LIMIT = 2**32 - 2**16  # bytes; longer ones are written as RF64
LOUDEST = 0.99  # peak of a recording that would have clipped
NORMAL_PEAK = 0.9


@contextmanager
def written_beside(path):
    """Write a file or a folder so that it is never half there.

    Arguments
    ---------
    path : str or Path
        What is to be written; a file or a folder there is replaced.

    Yields
    ------
    Path
        Where to write it. It is renamed at the end and, after an exception,
        removed; what was to be replaced is then as it was.

    Example
    -------
    >>> path = getfixture("tmp_path") / "deep" / "a.txt"
    >>> with written_beside(path) as partial:
    ...     _ = partial.write_text("all of it")
    >>> [file.name for file in path.parent.iterdir()]
    ['a.txt']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    old = partial.with_suffix(".old")
    try:
        yield partial
        # A file is replaced at once, a folder is not.
        if path.is_dir():
            os.replace(path, old)
        os.replace(partial, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)
        partial.unlink(missing_ok=True)


def was_separated(path):
    """Whether a file was written by a ``SourceWriter``."""
    try:
        with soundfile.SoundFile(native_name(path)) as file:
            return file.software.startswith(SOFTWARE)
    except (OSError, soundfile.SoundFileError):
        return False


def _prefix(pid):
    """How the names of the unfinished files of a process begin."""
    return f".flashformer-{pid}-"


def clean_up(folder, pid):
    """Remove what a dead process left unfinished; bring back what it replaced.

    Arguments
    ---------
    folder : Path
        Where it wrote.
    pid : int
        Its number.
    """
    unfinished = [
        *folder.glob(f"{_prefix(pid)}*.partial"),
        *folder.glob(f".{_prefix(pid)}*.partial"),  # being rewritten
    ]
    for kept in folder.glob(f"{_prefix(pid)}*-old"):
        for old in kept.iterdir():
            # Else all new files have their names, and only this was left.
            if unfinished or not (folder / old.name).exists():
                os.replace(old, folder / old.name)
            else:
                old.unlink()
        kept.rmdir()
    for partial in unfinished:
        partial.unlink(missing_ok=True)


class SourceWriter:
    """Writes the sources of one recording, all of them or none.

    A context manager: on leaving it well the files appear under their names;
    after an exception nothing is left. Float files keep their level whatever
    it is. When a source of a PCM recording would clip, one gain brings down
    all of them, to a peak of 0.99.

    Arguments
    ---------
    paths : list of Path
        C S files, which must not exist unless overwrite.
    sample_rate : int
        Hz.
    frames : int, optional
        Samples that each will have, where that is known.
    subtype : str
        ``float`` (32 bit), ``pcm16`` or ``pcm24``.
    normalize : bool
        One gain brings the loudest peak of the recording to 0.9.
    overwrite : bool
        Whether existing files are replaced.

    Example
    -------
    >>> import torch
    >>> folder = getfixture("tmp_path")
    >>> with SourceWriter([folder / "s1.wav"], 8000, frames=100) as writer:
    ...     writer.write(torch.zeros(1, 1, 100))
    >>> [path.name for path in folder.iterdir()]
    ['s1.wav']
    """

    def __init__(
        self,
        paths,
        sample_rate,
        frames=None,
        subtype="float",
        normalize=False,
        overwrite=False,
    ):
        if subtype not in SUBTYPES:
            raise ValueError(
                f"unknown subtype {subtype!r}: choose one of "
                + ", ".join(SUBTYPES)
            )
        self.paths = [Path(path) for path in paths]
        self.sample_rate, self.frames = sample_rate, frames
        self.subtype, self.normalize = SUBTYPES[subtype], normalize
        self.overwrite = overwrite
        self.written = 0
        self.peak = 0.0
        self.gain = 1.0
        self.files = []

    def __enter__(self):
        """Check that all can be written, and begin."""
        self._check_absent()
        folder = self.paths[0].parent
        try:
            for path in self.paths:
                path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise OSError(f"cannot write in {folder}: {error}") from error
        frames = self.frames or 0
        needed = 4 * frames * len(self.paths)
        if self.normalize or self.subtype != "FLOAT":
            needed += BYTES[self.subtype] * frames  # one is written anew
        if free < needed:
            raise OSError(
                f"{folder} has {free / 1e6:.0f} MB free, the sources need "
                f"{needed / 1e6:.0f} MB"
            )
        mark = _prefix(os.getpid()) + uuid.uuid4().hex
        self.partial = [
            path.with_name(f"{mark}-{i}.partial")
            for i, path in enumerate(self.paths)
        ]
        try:
            self.files = [self._open(path, "FLOAT") for path in self.partial]
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, sources):
        """Append sources [C, S, n] to the C S files."""
        if sources.numel():
            self.peak = max(self.peak, sources.abs().max().item())
        self.written += sources.shape[-1]
        for file, source in zip(self.files, sources.flatten(0, 1)):
            self._write(file, source.contiguous().numpy())

    def __exit__(self, kind, value, traceback):
        """Rename the files, or remove them after an exception."""
        try:
            if kind is None:
                for file in self.files:
                    file.close()
                self._set_gain()
                unknown, self.frames = self.frames is None, self.written
                if unknown or self.gain != 1 or self.subtype != "FLOAT":
                    for path in self.partial:
                        self._rewrite(path)
                self._check_absent()
                self._rename()
        finally:
            self._discard()

    def _rename(self):
        """Give all files their names, or leave all as it was."""
        with ExitStack() as undo:
            kept = []
            for partial, path in zip(self.partial, self.paths):
                # In a folder, so that it keeps its name whatever happens.
                old = partial.with_name(f"{partial.name}-old") / path.name
                # Before anything is moved: a signal may come in between.
                undo.callback(_undo_rename, partial, old, path)
                if path.exists():
                    old.parent.mkdir()
                    kept.append(old)
                    os.replace(path, old)
                os.replace(partial, path)
            undo.pop_all()
        for old in kept:
            old.unlink()
            old.parent.rmdir()

    def _set_gain(self):
        if self.normalize and self.peak > 0:
            self.gain = NORMAL_PEAK / self.peak
        elif self.subtype != "FLOAT" and self.peak > 1:
            self.gain = LOUDEST / self.peak

    def _rewrite(self, path):
        """Give a finished float file its gain and its subtype."""
        with (
            written_beside(path) as second,
            soundfile.SoundFile(native_name(path)) as old,
            self._open(second, self.subtype) as new,
        ):
            for block in old.blocks(2**20, dtype="float32"):
                self._write(new, block * self.gain)

    def _open(self, path, subtype):
        # RF64 has no limit, but fewer programs read it: what may become too
        # long is written anew as WAV once it is known not to be.
        too_long = (
            self.frames is None or BYTES[subtype] * self.frames > WAV_LIMIT
        )
        try:
            file = soundfile.SoundFile(
                native_name(path),
                "w",
                self.sample_rate,
                1,
                subtype,
                format="RF64" if too_long else "WAV",
            )
            file.software = SOFTWARE
            return file
        except (OSError, soundfile.SoundFileError) as error:
            raise OSError(f"cannot write in {path.parent}: {error}") from error

    def _write(self, file, samples):
        # libsndfile tells of a full disk by a short count, on which
        # soundfile asserts.
        try:
            file.write(samples)
        except (OSError, soundfile.SoundFileError, AssertionError) as error:
            raise OSError(
                f"writing in {self.paths[0].parent} failed, is the disk full? "
                f"({type(error).__name__} {error})"
            ) from error

    def _check_absent(self):
        for path in self.paths:
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder")
            if path.exists() and not self.overwrite:
                raise FileExistsError(
                    f"{path} exists: remove it, or overwrite it "
                    "(--overwrite, in Python overwrite=True)"
                )

    def _discard(self):
        for file in self.files:
            with suppress(OSError, soundfile.SoundFileError):
                file.close()
        for path in self.partial:
            path.unlink(missing_ok=True)


def _undo_rename(partial, old, path):
    """Put back what was at a path, however far its replacement came."""
    if not partial.exists():
        path.unlink(missing_ok=True)
    if old.exists():
        os.replace(old, path)
    if old.parent.exists():
        old.parent.rmdir()
