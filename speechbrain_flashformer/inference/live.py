"""Live sound on pipes: PCM in, its sources out while it is heard.

Axes: C channels, n samples, S speakers.
"""

import math
import signal
import struct
import sys
from collections import Counter
from contextlib import nullcontext
from time import perf_counter

import numpy as np
import torch

from speechbrain_flashformer.inference.containers import is_placeholder
from speechbrain_flashformer.nnet.step import TOO_LOUD

ENCODINGS = {"s16le": np.dtype("<i2"), "f32le": np.dtype("<f4")}
# Of WAV: (kind of sample, bits).
WAV_ENCODINGS = {(1, 16): "s16le", (3, 32): "f32le"}
# How files begin that would be noise as PCM.
NOT_PCM = {
    b"fLaC": "FLAC",
    b"OggS": "Ogg",
    b"ID3": "MP3",
    b"RIFX": "big-endian WAV",
    b"FORM": "AIFF",
    b"caff": "CAF",
}
FULL_SCALE = 2**15
WATCHED = 5.0  # seconds of sound over which a stream may fall behind
QUIET = 30.0  # seconds of sound between two warnings


def separate_live(
    model, reader, block, sink=None, writer=None, warn=None, run=None
):
    """Separate what a reader hears until it ends, or nobody listens.

    Arguments
    ---------
    model : FlashFormerSeparation
        A causal one.
    reader : PcmReader
        Where the sound comes from.
    block : float
        Seconds that are heard at once.
    sink : binary file, optional
        Gets the sources as raw PCM, one channel each, in the reader's
        encoding. Without a buffer, so that they are heard at once.
    writer : SourceWriter, optional
        Gets them too.
    warn : callable, optional
        Called with the load (computing / audio) when it is above 1: the
        stream falls behind.
    run : callable, optional
        What runs the steps, as in ``separate_stream``.

    Returns
    -------
    Load
        How long it took.

    Raises
    ------
    ValueError
        When the model is not causal, or no sound came.
    SystemExit
        When no sound came before the signal that ended it.
    """
    rate, load = reader.sample_rate, Load(warn)
    # What torch does once, it does before the sound comes.
    warm = [torch.zeros(1, math.ceil(min(block, 0.1) * rate))] * 20
    for _ in model.separate_stream(warm, rate, run):
        pass
    with writer or nullcontext():
        heard = load.watch(reader.blocks(block), rate)
        for part in model.separate_stream(heard, rate, run):
            sources = part[0]
            if sink:
                data = load.encode(sources, reader.encoding)
            start = perf_counter()
            if writer:
                writer.write(part.transpose(1, 2))
            try:
                while sink and data:
                    data = data[sink.write(data) :]
            except BrokenPipeError:
                reader.stop()
                sink = None
            load.elsewhere += perf_counter() - start
        if not load.heard and reader.status:
            sys.exit(reader.status)
        if not load.heard:
            raise ValueError("no sound came on standard input")
    return load


class PcmReader:
    """Raw PCM or a WAV stream, as it comes.

    Beyond the first Ctrl-C or SIGTERM nothing more is read, so that what was
    heard can be finished; a second one is a ``KeyboardInterrupt``. Use it as a
    context manager.

    Arguments
    ---------
    source : binary file
        Without a buffer: its ``read`` gives what is there.
    sample_rate : int
        Of raw PCM, Hz; a WAV header says its own.
    channels : int
        C, interleaved; their mean is heard.
    encoding : str
        ``s16le`` or ``f32le``.

    Attributes
    ----------
    status : int
        128 and the number of the signal that ended it, or 0.
    cut : int
        Bytes at the end that were no whole sample.

    Raises
    ------
    ValueError
        When a WAV header says something that cannot be read.

    Example
    -------
    >>> import io
    >>> reader = PcmReader(io.BytesIO(bytes(700)), 8000, 2, "s16le")
    >>> [block.shape[1] for block in reader.blocks(0.01)]
    [80, 80, 15]
    """

    def __init__(self, source, sample_rate, channels=1, encoding="s16le"):
        self.source = source
        self.sample_rate, self.channels = sample_rate, channels
        self.encoding = encoding
        self.wav = False
        self.status = self.cut = 0
        self.left = math.inf  # bytes of sound still to come
        self.waiting = self.stopped = False
        self.before = {}
        self.begun = None  # bytes that turned out to be no header

    def __enter__(self):
        """Hear signals, then the header."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._end)
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        """Leave signals to others."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def stop(self):
        """Read no more."""
        self.stopped = True

    def blocks(self, seconds):
        """Yield the sound, float32 [1, n], each of so many seconds."""
        if self.begun is None:
            self._begin()
        kind = ENCODINGS[self.encoding]
        frame = self.channels * kind.itemsize
        size = frame * max(1, round(seconds * self.sample_rate))
        while data := self._gather(size):
            self.cut = len(data) % frame
            if len(data) == self.cut:
                break
            samples = np.frombuffer(data[: len(data) - self.cut], kind)
            samples = torch.from_numpy(samples.astype(np.float32))
            if kind.kind == "i":
                samples = samples / FULL_SCALE
            yield samples.view(1, -1, self.channels).mean(2)

    def _gather(self, size):
        """So many bytes, fewer only at the end."""
        size = min(size, self.left)
        data, self.begun = self.begun or b"", b""
        while len(data) < size and (more := self._read(size - len(data))):
            data += more
        data, self.begun = data[:size], data[size:]
        self.left -= len(data)
        return data

    def _read(self, size):
        self.waiting = True
        try:
            return b"" if self.stopped else self.source.read(size)
        except KeyboardInterrupt:
            return b""
        finally:
            self.waiting = False

    def _end(self, number, _):
        again, self.stopped = self.stopped, True
        self.status = 128 + number
        if again or self.waiting:
            raise KeyboardInterrupt

    def _begin(self):
        """Read the header, if there is one."""
        self.begun = b""
        first = self._gather(12)
        for magic, name in NOT_PCM.items():
            if first.startswith(magic):
                raise ValueError(
                    f"standard input is {name}, not PCM: decode it first "
                    "(ffmpeg -i - -f wav -)"
                )
        if first[:4] not in (b"RIFF", b"RF64") or first[8:] != b"WAVE":
            self.begun = first
            return
        self.wav = True
        try:
            kind, bits, size = self._header()
        except struct.error as error:
            raise ValueError("the header of the WAV stream is cut") from error
        if kind is None:
            raise ValueError("the WAV stream has no fmt chunk before its data")
        if min(self.channels, self.sample_rate) < 1:
            raise ValueError(
                f"the WAV header says {self.channels} channels at "
                f"{self.sample_rate} Hz"
            )
        if (kind, bits) not in WAV_ENCODINGS:
            raise ValueError(
                f"the WAV stream is of kind {kind} with {bits} bits: give 16-"
                "bit PCM or 32-bit float (ffmpeg: -c:a pcm_s16le)"
            )
        self.encoding = WAV_ENCODINGS[kind, bits]
        if not is_placeholder(size):
            self.left = size

    def _header(self):
        """Kind of sample, its bits, bytes of sound; rate and channels too."""
        kind = bits = None
        while True:
            name, size = struct.unpack("<4sI", self._gather(8))
            if name == b"data":
                return kind, bits, size
            chunk = self._gather(size + size % 2)
            if name == b"fmt ":
                kind, self.channels, self.sample_rate, _, _, bits = (
                    struct.unpack_from("<HHIIHH", chunk)
                )
                if kind == 0xFFFE:  # extensible: the kind is further on
                    (kind,) = struct.unpack_from("<H", chunk, 24)


class Load:
    """What blocks cost, in memory that does not grow.

    Arguments
    ---------
    warn : callable, optional
        As for ``separate_live``.

    Example
    -------
    >>> load = Load()
    >>> for block in load.watch([torch.zeros(1, 80)] * 3, 8000):
    ...     pass
    >>> round(load.heard, 6), load.overruns
    (0.03, 0)
    """

    def __init__(self, warn=None):
        self.warn, self.warned = warn, -QUIET
        self.heard = self.spent = self.elsewhere = 0.0  # seconds
        self.overruns = self.clipped = self.silenced = 0
        self.times = Counter()  # by their logarithm, to a hundredth

    def watch(self, blocks, sample_rate):
        """Yield blocks [1, n]; until the next is asked for, time runs."""
        heard, before = self.heard, self.spent
        for block in blocks:
            self.silenced += (~(block.abs() < TOO_LOUD)).sum().item()
            self.elsewhere = 0.0
            start = perf_counter()
            yield block
            spent = perf_counter() - start - self.elsewhere
            seconds = block.shape[1] / sample_rate
            self.heard += seconds
            self.spent += spent
            self.overruns += spent > seconds
            self.times[math.ceil(100 * math.log(max(spent, 1e-9)))] += 1
            if self.heard - heard >= WATCHED:
                self._warn((self.spent - before) / (self.heard - heard))
                heard, before = self.heard, self.spent

    def _warn(self, load):
        if self.warn and load > 1 and self.heard - self.warned >= QUIET:
            self.warned = self.heard
            self.warn(load)

    def encode(self, sources, encoding):
        """Sources [n, S] as bytes; 16 bits clip."""
        samples = sources.numpy()
        if encoding == "s16le":
            samples = np.rint(samples * FULL_SCALE)
            low, high = -FULL_SCALE, FULL_SCALE - 1
            self.clipped += ((samples < low) | (samples > high)).sum().item()
            samples = samples.clip(low, high)
        return samples.astype(ENCODINGS[encoding]).tobytes()

    def percentile(self, percent):
        """Seconds that so many percent of the blocks took at most."""
        wanted = self.times.total() * percent / 100
        for place in sorted(self.times):
            wanted -= self.times[place]
            if wanted <= 0:
                return math.exp(place / 100)
        return 0.0
