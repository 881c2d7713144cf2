"""Audio files in blocks: read and resample, in memory that does not grow.

Axes: C channels, n samples.
"""

import shutil
import tempfile
import warnings
from functools import cached_property
from math import ceil, gcd
from pathlib import Path

import soundfile
import torch

from speechbrain_flashformer.inference.containers import REMEDY, find_streams
from speechbrain_flashformer.inference.view import open_sound

# Of the RMS: so little of an offset changes the sources by less than -30 dB.
LEAST_OFFSET = 0.03
# Channels cancel each other when their mean has less than this share of the
# power that it would have if they had nothing in common.
CANCELLED = 0.1
ENDLESS = 2**62  # samples, at least, where libsndfile knows no length


class AudioReader:
    """An audio file to be read in blocks, to its end.

    Arguments
    ---------
    path : str or Path
        Any format that libsndfile reads. A pipe, which can be read once, is
        copied into a temporary file.

    Raises
    ------
    ValueError
        When the file cannot be read, is empty, is cut short or (while
        reading) holds samples that are not finite numbers.

    Attributes
    ----------
    sample_rate : int
        Hz.
    channels : int
        C.
    """

    def __init__(self, path):
        self.path = self._stored = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"no file {self.path}")
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder, not an audio file")
        try:
            if not self.path.is_file():
                with self.path.open("rb") as pipe:
                    self._copy = keep(pipe)
                self._stored = Path(self._copy.name)
            self._streams = find_streams(self._stored, self.path)
            shapes, self._lengths = [], []
            for pieces, samples in self._streams:
                with open_sound(self._stored, pieces) as sound:
                    shapes.append((sound.samplerate, sound.channels))
                    self._lengths.append(samples or sound.frames)
        except (OSError, soundfile.SoundFileError) as error:
            raise ValueError(
                f"cannot read {self.path} as audio: {_reason(error)}"
            ) from error
        if len(set(shapes)) > 1:
            raise ValueError(
                f"{self.path} changes its rate or its channels on the way: "
                f"{REMEDY}"
            )
        self.sample_rate, self.channels = shapes[0]
        if not any(self._lengths):
            raise ValueError(f"{self.path} holds no samples")

    @cached_property
    def frames(self):
        """Samples per channel, counted where the format does not tell."""
        if max(self._lengths) < ENDLESS:
            return sum(self._lengths)
        return sum(block.shape[1] for block in self._read(10.0))

    def blocks(self, seconds=10.0):
        """Yield the samples in order, float32 [C, n]."""
        read = 0
        for block in self._read(seconds):
            check_finite(block, self.path, read / self.sample_rate)
            read += block.shape[1]
            yield block
        if read != self.frames:
            raise ValueError(
                f"{self.path} is cut short, {read} of {self.frames} samples "
                f"can be read: {REMEDY}"
            )

    def _read(self, seconds):
        size = max(1, round(seconds * self.sample_rate))
        read = 0
        try:
            for pieces, _ in self._streams:
                with open_sound(self._stored, pieces) as sound:
                    while len(
                        block := sound.read(size, "float32", always_2d=True)
                    ):
                        read += len(block)
                        yield torch.from_numpy(block).T.contiguous()
        except soundfile.SoundFileError as error:
            raise ValueError(
                f"cannot read {self.path} beyond "
                f"{read / self.sample_rate:.1f} s, {_reason(error)} {REMEDY}"
            ) from error


def _reason(error):
    """What libsndfile says, without the name that it was given."""
    return getattr(error, "error_string", error)


def keep(pipe):
    """Copy what can be read once into a temporary file.

    Arguments
    ---------
    pipe : binary file
        Read to its end.

    Returns
    -------
    tempfile.NamedTemporaryFile
        Goes with the object.
    """
    copy = tempfile.NamedTemporaryFile(prefix="flashformer-")
    shutil.copyfileobj(pipe, copy)
    copy.flush()
    return copy


def check_finite(block, name, start_seconds=0.0):
    """Raise a ValueError if a block [C, n] holds NaN or infinity."""
    if not block.isfinite().all():
        raise ValueError(
            f"{name} holds samples that are not finite numbers, in the "
            f"block at {start_seconds:.1f} s: mend the recording first"
        )


def plan_hearing(blocks, each, name):
    """Choose what is heard of a recording.

    An offset, which is no sound but would be taken for one, is removed.

    Arguments
    ---------
    blocks : iterable of torch.Tensor
        All of the recording, [C, n].
    each : bool
        Hear each channel apart, not their mean.
    name : str or Path
        The recording's, for a warning.

    Returns
    -------
    callable
        Blocks [C, n] -> [C, n] with each, else [1, n]: the mean of the
        channels, or the loudest one where they cancel each other.

    Example
    -------
    >>> left = torch.randn(1, 8000)
    >>> hear = plan_hearing([0.5 + left], False, "left")
    >>> bool(hear(0.5 + left).mean().abs() < 1e-4)
    True
    """
    count, sums, products = 0, 0.0, 0.0
    for block in blocks:
        block = block.double()
        count += block.shape[1]
        sums = sums + block.sum(1)
        products = products + block @ block.T
    offset = sums / count
    covariance = products / count - torch.outer(offset, offset)
    power = covariance.diag()
    is_small = offset.square() <= LEAST_OFFSET**2 * power
    offset = offset.masked_fill(is_small, 0).float()[:, None]
    loudest = None
    # Of the mean; and if each product of two channels were 0.
    if (
        not each
        and covariance.mean() < CANCELLED * power.sum() / len(power) ** 2
    ):
        loudest = power.argmax().item()
        warnings.warn(
            f"the channels of {name} cancel each other (is the polarity of "
            f"one inverted?): channel {loudest + 1}, the loudest, is separated "
            "instead of their mean",
            stacklevel=2,
        )

    def _hear(block):
        if offset.any():
            block = block - offset
        if each:
            return block
        if loudest is not None:
            return block[loudest : loudest + 1]
        return block.mean(0, keepdim=True)

    return _hear


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
        from torchaudio.transforms import Resample  # for those who need it

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
        """Take samples [*, n], return those that are ready, [*, m]."""
        if self.old == self.new:
            return block
        if self.buffer is not None:
            block = torch.cat([self.buffer, block], -1)
        self.buffer = block
        ready = max(0, block.shape[-1] - self.reach) * self.new // self.old
        if ready <= self.given:
            return block[..., :0]
        out = self.resample(block.contiguous())[..., self.given : ready]
        over = max(0, ready // self.new - self.periods)
        self.buffer = block[..., over * self.old :]
        self.given = ready - over * self.new
        return out

    def flush(self):
        """Return the rest, [*, m]."""
        if self.buffer is None:
            return torch.zeros(1, 0)
        return self.resample(self.buffer.contiguous())[..., self.given :]
