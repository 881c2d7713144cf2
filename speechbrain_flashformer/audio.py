"""Audio files in blocks: read, resample, write, in memory that does not grow.

Outputs are written beside and renamed when whole, so that no file is ever
half there.

Axes: C channels, n and T samples, S speakers.
"""

import os
import re
import shutil
import uuid
from contextlib import suppress
from math import ceil, gcd
from pathlib import Path

import soundfile
import torch
from torchaudio.transforms import Resample

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif")
SUBTYPES = {"float": "FLOAT", "pcm16": "PCM_16", "pcm24": "PCM_24"}
WAV_LIMIT = 2**32 - 2**16  # bytes; longer ones are written as RF64
UNKNOWN_SIZE = 2**31 - 2**16  # what a pipe's header claims, at least
LOUDEST = 0.99  # peak of a recording that would have clipped
NORMAL_PEAK = 0.9


class AudioReader:
    """An audio file to be read in blocks.

    Arguments
    ---------
    path : str or Path
        Any format that libsndfile reads.

    Raises
    ------
    ValueError
        When the file cannot be read, is empty, or (while reading) holds
        samples that are not finite numbers.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"no file {self.path}")
        try:
            info = soundfile.info(str(self.path))
        except (OSError, soundfile.SoundFileError) as error:
            raise ValueError(
                f"cannot read {self.path} as audio: {error}"
            ) from error
        self.sample_rate, self.channels = info.samplerate, info.channels
        self.frames = info.frames
        if not self.frames:
            raise ValueError(f"{self.path} holds no samples")
        # libsndfile reads on in silence; a pipe's header has no size at all.
        cut = re.search(r"data : (\d+) \(should be (\d+)\)", info.extra_info)
        if cut and int(cut[2]) < int(cut[1]) < UNKNOWN_SIZE:
            raise ValueError(
                f"{self.path} is cut short: {cut[2]} of {cut[1]} bytes"
            )

    def blocks(self, seconds=10.0):
        """Yield the samples in order, float32 [C, n]."""
        size = max(1, round(seconds * self.sample_rate))
        read = 0
        try:
            with soundfile.SoundFile(str(self.path)) as file:
                while len(block := file.read(size, "float32", always_2d=True)):
                    block = torch.from_numpy(block).T.contiguous()
                    check_finite(block, self.path, read / self.sample_rate)
                    read += block.shape[1]
                    yield block
        except soundfile.SoundFileError as error:
            raise ValueError(
                f"cannot read {self.path} beyond "
                f"{read / self.sample_rate:.1f} s: {error}"
            ) from error
        if read != self.frames:
            raise ValueError(
                f"{self.path} is cut short: {read} of {self.frames} samples"
            )


def check_finite(block, name, start_seconds=0.0):
    """Raise a ValueError if a block [C, n] holds NaN or infinity."""
    if not block.isfinite().all():
        raise ValueError(
            f"{name} holds samples that are not finite numbers, in the "
            f"block at {start_seconds:.1f} s: mend the recording first"
        )


# Taps of a resampling filter, about: 44056 to 8000 Hz takes 6 million.
LARGEST_FILTER = 2 * 10**7


class Resampler:
    """``torchaudio.functional.resample`` block by block, with equal results.

    Arguments
    ---------
    old : int
        Sampling rate of what is fed, Hz.
    new : int
        Sampling rate of what comes out.

    Raises
    ------
    ValueError
        When the rates share so small a divisor that the filter, which has a
        phase for each sample of a period, would not fit into memory.

    Attributes
    ----------
    latency : float
        Seconds after its own time in which a sample comes out, at most.

    Example
    -------
    >>> from torchaudio.functional import resample
    >>> whole = torch.randn(1, 44100)
    >>> resampler = Resampler(44100, 8000)
    >>> parts = [resampler.feed(part) for part in whole.split(1000, 1)]
    >>> parts.append(resampler.flush())
    >>> expected = resample(whole, 44100, 8000)
    >>> torch.allclose(torch.cat(parts, 1), expected, atol=1e-6)
    True
    """

    def __init__(self, old, new):
        shared = gcd(old, new)
        self.old, self.new = old // shared, new // shared
        self.buffer = None
        self.latency = 0.0
        if self.old == self.new:
            return
        # Made once, and as the function would make it in float32.
        if self.old * self.new > LARGEST_FILTER:
            raise ValueError(
                f"no filter of a sensible size takes {old} Hz to {new} Hz, "
                "which share no large divisor: resample the sound to a common "
                "rate first, such as 16000 or 48000 Hz"
            )
        self.resample = Resample(self.old, self.new, dtype=torch.float32)
        # Samples that the filter reaches to each side, and one for rounding.
        self.reach = self.resample.width + 1
        # `old` samples in give `new` out: a period.
        self.periods = ceil(self.reach / self.old)
        self.given = 0  # of what the buffer gives
        self.latency = (self.reach + 1) / old + 1 / new

    def feed(self, block):
        """Take samples [C, n], return those that are ready, [C, m]."""
        if self.old == self.new:
            return block
        if self.buffer is not None:
            block = torch.cat([self.buffer, block], 1)
        self.buffer = block
        ready = max(0, block.shape[1] - self.reach) * self.new // self.old
        if ready <= self.given:
            return block[:, :0]
        out = self.resample(block)[:, self.given : ready]
        over = max(0, ready // self.new - self.periods)
        self.buffer = block[:, over * self.old :]
        self.given = ready - over * self.new
        return out

    def flush(self):
        """Return the rest, [C, m]."""
        if self.buffer is None:
            return torch.zeros(1, 0)
        return self.resample(self.buffer)[:, self.given :]


def resample_blocks(blocks, old, new):
    """Resample blocks [C, n] from rate ``old`` to ``new``, both in Hz."""
    if old == new:
        yield from blocks
        return
    resampler = Resampler(old, new)
    for block in blocks:
        yield resampler.feed(block)
    if resampler.buffer is not None:
        yield resampler.flush()


def partial_prefix(pid):
    """How the names of the unfinished files of a process begin."""
    return f".flashformer-{pid}-"


class SourceWriter:
    """Writes the sources of one recording, all of them or none.

    A context manager: on leaving it well the files appear under their names;
    after an exception nothing is left. Float files keep their level whatever
    it is. When a source of a PCM recording would clip, one gain brings down
    all of them, to a peak of 0.99.

    Arguments
    ---------
    paths : list of Path
        S files, which must not exist unless overwrite.
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
    >>> folder = getfixture("tmp_path")
    >>> with SourceWriter([folder / "s1.wav"], 8000, frames=100) as writer:
    ...     writer.write(torch.zeros(100, 1))
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
        needed = 4 * (self.frames or 0) * len(self.paths)
        if free < needed:
            raise OSError(
                f"{folder} has {free / 1e6:.0f} MB free, the sources need "
                f"{needed / 1e6:.0f} MB"
            )
        mark = partial_prefix(os.getpid()) + uuid.uuid4().hex
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
        """Append sources [n, S]."""
        if sources.numel():
            self.peak = max(self.peak, sources.abs().max().item())
        self.written += len(sources)
        for file, source in zip(self.files, sources.T):
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
                for partial, path in zip(self.partial, self.paths):
                    os.replace(partial, path)
        finally:
            self._discard()

    def _set_gain(self):
        if self.normalize and self.peak > 0:
            self.gain = NORMAL_PEAK / self.peak
        elif self.subtype != "FLOAT" and self.peak > 1:
            self.gain = LOUDEST / self.peak

    def _rewrite(self, path):
        """Give a finished float file its gain and its subtype."""
        second = path.with_name(path.name + "2")
        try:
            with (
                soundfile.SoundFile(str(path)) as old,
                self._open(second, self.subtype) as new,
            ):
                for block in old.blocks(2**20, dtype="float32"):
                    self._write(new, block * self.gain)
            os.replace(second, path)
        finally:
            second.unlink(missing_ok=True)

    def _open(self, path, subtype):
        # RF64 has no limit, but fewer programs read it: what may become too
        # long is written anew as WAV once it is known not to be.
        too_long = self.frames is None or 4 * self.frames > WAV_LIMIT
        try:
            return soundfile.SoundFile(
                str(path),
                "w",
                self.sample_rate,
                1,
                subtype,
                format="RF64" if too_long else "WAV",
            )
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
