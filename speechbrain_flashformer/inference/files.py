"""Atomic writing of files and folders, and of the sources of a recording.

A file is written under a temporary name in the same folder and renamed when it
is complete.

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
SOFTWARE = "speechbrain_flashformer"  # metadata that marks files as sources
WAV_LIMIT = 2**32 - 2**16  # bytes; longer files are written as RF64
MAX_PCM_PEAK = 0.99  # peak after scaling, if PCM files would clip
NORMALIZED_PEAK = 0.9


@contextmanager
def written_beside(path):
    """Write a file or a folder atomically.

    Arguments
    ---------
    path : str or Path
        The file or folder to write. An existing one is replaced.

    Yields
    ------
    Path
        Temporary path to write to. It is renamed at the end. After an
        exception it is removed, and an existing file or folder is unchanged.

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
        # ``os.replace`` replaces a file but not a folder.
        if path.is_dir() and partial.is_dir():
            os.replace(path, old)
        os.replace(partial, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)
        partial.unlink(missing_ok=True)


def was_separated(path):
    """Whether a file was written by a ``SourceWriter``.

    Arguments
    ---------
    path : str or Path
        Any file.

    Returns
    -------
    bool
        False, too, if the file cannot be read as audio.

    Example
    -------
    >>> was_separated(__file__)
    False
    """
    try:
        with soundfile.SoundFile(native_name(path)) as file:
            return file.software.startswith(SOFTWARE)
    except (OSError, soundfile.SoundFileError):
        return False


def _prefix(pid):
    """Prefix of the names of a process's unfinished files."""
    return f".flashformer-{pid}-"


def clean_up(folder, pid):
    """Remove unfinished files of a dead process; restore replaced files.

    Arguments
    ---------
    folder : Path
        The folder that the process wrote to.
    pid : int
        Process id.
    """
    unfinished = [
        *folder.glob(f"{_prefix(pid)}*.partial"),
        *folder.glob(f".{_prefix(pid)}*.partial"),  # from ``_rewrite``
    ]
    for kept in folder.glob(f"{_prefix(pid)}*-old"):
        for old in kept.iterdir():
            # Otherwise all new files are in place, and the old one is obsolete.
            if unfinished or not (folder / old.name).exists():
                os.replace(old, folder / old.name)
            else:
                old.unlink()
        kept.rmdir()
    for partial in unfinished:
        partial.unlink(missing_ok=True)


class SourceWriter:
    """Writes all sources of one recording, or none of them.

    Use it as a context manager. At the end the files get their names; after an
    exception all of them are removed. Float files keep the level of the
    sources. If a source would clip in PCM, all sources are scaled by one gain,
    to a peak of 0.99.

    Arguments
    ---------
    paths : list of Path
        C * S files; they must not exist, except with overwrite.
    sample_rate : int
        Hz.
    frames : int, optional
        Number of samples per file, if known.
    subtype : str
        Sample format: ``float`` (32 bit), ``pcm16`` or ``pcm24``.
    normalize : bool
        Whether all sources are scaled by one gain that sets the highest peak
        of the recording to 0.9.
    overwrite : bool
        Whether existing files are replaced.

    Raises
    ------
    ValueError
        When the subtype is unknown.
    OSError
        On entering the context, when a file exists, cannot be written or does
        not fit on the disk; later, when writing fails.

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
        """Check that the files can be written, and open temporary files."""
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
            # ``_rewrite`` needs space for one more file at a time.
            needed += BYTES[self.subtype] * frames
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
        """Append samples to the files.

        Arguments
        ---------
        sources : torch.Tensor
            [C, S, n] on the CPU.

        Raises
        ------
        OSError
            When writing fails, as on a full disk.
        """
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
        """Rename all files, or restore the state before."""
        with ExitStack() as undo:
            kept = []
            for partial, path in zip(self.partial, self.paths):
                # Move the old file into a folder: it keeps its name, so that
                # ``clean_up`` can restore it.
                old = partial.with_name(f"{partial.name}-old") / path.name
                # Register this first: a signal can arrive between the moves.
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
            self.gain = NORMALIZED_PEAK / self.peak
        elif self.subtype != "FLOAT" and self.peak > 1:
            self.gain = MAX_PCM_PEAK / self.peak

    def _rewrite(self, path):
        """Apply gain and subtype to a finished float file."""
        with (
            written_beside(path) as second,
            soundfile.SoundFile(native_name(path)) as old,
            self._open(second, self.subtype) as new,
        ):
            for block in old.blocks(2**20, dtype="float32"):
                self._write(new, block * self.gain)

    def _open(self, path, subtype):
        # RF64 has no size limit, but fewer programs read it. A file of unknown
        # length starts as RF64 and is rewritten as WAV if it is short enough.
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
        # On a full disk libsndfile returns a short count, and soundfile raises
        # an AssertionError.
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
    """Restore the old file at a path, whatever step was reached."""
    if not partial.exists():
        path.unlink(missing_ok=True)
    if old.exists():
        os.replace(old, path)
    if old.parent.exists():
        old.parent.rmdir()
