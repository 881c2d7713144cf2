"""Read and resample audio files in blocks, in bounded memory.

Axes: C channels, n and m samples.
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

# Smallest DC offset that is removed, relative to the RMS of the signal. A
# smaller one changes the sources by less than -30 dB.
MIN_OFFSET = 0.03
# Channels cancel each other if the power of their mean is below this fraction
# of the power that it would have if they were uncorrelated.
CANCELLATION = 0.1
# libsndfile reports at least this many samples if it does not know the length.
UNKNOWN_LENGTH = 2**62


class AudioReader:
    """Reads an audio file in blocks, in full.

    Arguments
    ---------
    path : str or Path
        A file in any format that libsndfile reads. A pipe, which can be read
        only once, is copied into a temporary file.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    ValueError
        When the file cannot be read, is empty or is truncated, or its streams
        differ in sampling rate or channels.

    Attributes
    ----------
    sample_rate : int
        Hz.
    channels : int
        C.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.wav"
    >>> soundfile.write(path, torch.zeros(20000, 2).numpy(), 8000)
    >>> [block.shape[1] for block in AudioReader(path).blocks(seconds=1.0)]
    [8000, 8000, 4000]
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
                    self._copy = copy_pipe(pipe)
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
                f"{self.path} changes its rate or its channels midway: {REMEDY}"
            )
        self.sample_rate, self.channels = shapes[0]
        if not any(self._lengths):
            raise ValueError(f"{self.path} has no samples")

    @cached_property
    def frames(self):
        """Samples per channel; counted if the file does not store them."""
        if max(self._lengths) < UNKNOWN_LENGTH:
            return sum(self._lengths)
        return sum(block.shape[1] for block in self._read(10.0))

    def blocks(self, seconds=10.0):
        """Read the file from its start.

        Arguments
        ---------
        seconds : float
            Length of a block.

        Yields
        ------
        torch.Tensor
            The next samples, float32 [C, n].

        Raises
        ------
        ValueError
            When the file is truncated, or a sample is NaN or infinite.
        """
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
    """The error message of libsndfile, without the name of the file."""
    return getattr(error, "error_string", error)


def copy_pipe(pipe):
    """Copy a pipe, which can be read only once, into a temporary file.

    Arguments
    ---------
    pipe : binary file
        Read to its end.

    Returns
    -------
    tempfile.NamedTemporaryFile
        The file is deleted with this object.
    """
    copy = tempfile.NamedTemporaryFile(prefix="flashformer-")
    shutil.copyfileobj(pipe, copy)
    copy.flush()
    return copy


def check_finite(block, name, start_seconds=0.0):
    """Raise a ValueError if a block holds NaN or infinity.

    Arguments
    ---------
    block : torch.Tensor
        [C, n].
    name : str or Path
        Name of the recording for the message.
    start_seconds : float
        Where the block starts, for the message.

    Raises
    ------
    ValueError
        When a sample is not finite.
    """
    if not block.isfinite().all():
        raise ValueError(
            f"{name} holds samples that are not finite numbers, in the "
            f"block at {start_seconds:.1f} s: repair the recording first"
        )


def choose_signal(blocks, each, name):
    """Choose the signal that is separated, from one pass over a recording.

    A DC offset is removed, because the network would treat it as signal.

    Arguments
    ---------
    blocks : iterable of torch.Tensor
        The whole recording in order, each block [C, n].
    each : bool
        Whether every channel is separated, instead of their mean.
    name : str or Path
        Name of the recording for a warning.

    Returns
    -------
    callable
        Maps a block [C, n] to [C, n] with each, else to [1, n]: the mean of
        the channels, or the loudest channel if they cancel each other.

    Example
    -------
    >>> left = torch.randn(1, 8000)
    >>> to_signal = choose_signal([0.5 + left], False, "left")
    >>> bool(to_signal(0.5 + left).mean().abs() < 1e-4)
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
    is_small = offset.square() <= MIN_OFFSET**2 * power
    offset = offset.masked_fill(is_small, 0).float()[:, None]
    loudest = None
    # Power of the mean, against its power for uncorrelated channels.
    if (
        not each
        and covariance.mean() < CANCELLATION * power.sum() / len(power) ** 2
    ):
        loudest = power.argmax().item()
        warnings.warn(
            f"the channels of {name} cancel each other (is the polarity of "
            f"one inverted?): channel {loudest + 1}, the loudest, is separated "
            "instead of their mean",
            stacklevel=2,
        )

    def _to_signal(block):
        if offset.any():
            block = block - offset
        if each:
            return block
        if loudest is not None:
            return block[loudest : loudest + 1]
        return block.mean(0, keepdim=True)

    return _to_signal


# Limit for the number of taps of a resampling filter (approximate). 44056 to
# 8000 Hz needs 6 million.
LARGEST_FILTER = 2 * 10**7


class Resampler:
    """``torchaudio.functional.resample`` block by block, with equal results.

    Arguments
    ---------
    old : int
        Sampling rate of the input, Hz.
    new : int
        Sampling rate of the output, Hz.

    Raises
    ------
    ValueError
        When the greatest common divisor of the rates is so small that the
        filter, which has a phase for each output sample of a period, would not
        fit into memory.

    Attributes
    ----------
    latency : float
        Maximum delay of an output sample in seconds.

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
        from torchaudio.transforms import Resample  # slow, not always needed

        if self.old * self.new > LARGEST_FILTER:
            raise ValueError(
                f"no filter of a sensible size takes {old} Hz to {new} Hz, "
                "which share no large divisor: resample the sound to a common "
                "rate first, such as 16000 or 48000 Hz"
            )
        # The same filter as that of the function in float32, made only once.
        self.resample = Resample(self.old, self.new, dtype=torch.float32)
        # Samples on each side that an output depends on, and one for rounding.
        self.margin = self.resample.width + 1
        # A period is `old` input samples and `new` output samples.
        self.periods = ceil(self.margin / self.old)
        self.given = 0  # outputs of the buffer that were already returned
        self.latency = (self.margin + 1) / old + 1 / new

    def feed(self, block):
        """Resample the next samples [*, n]; return what is ready, [*, m]."""
        if self.old == self.new:
            return block
        if self.buffer is not None:
            block = torch.cat([self.buffer, block], -1)
        self.buffer = block
        ready = max(0, block.shape[-1] - self.margin) * self.new // self.old
        if ready <= self.given:
            return block[..., :0]
        out = self.resample(block.contiguous())[..., self.given : ready]
        over = max(0, ready // self.new - self.periods)
        self.buffer = block[..., over * self.old :]
        self.given = ready - over * self.new
        return out

    def flush(self):
        """Return the remaining samples, [*, m]."""
        if self.buffer is None:
            return torch.zeros(1, 0)
        return self.resample(self.buffer.contiguous())[..., self.given :]
