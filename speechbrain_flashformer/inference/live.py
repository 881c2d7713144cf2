"""Separate live audio on pipes: PCM in, sources out with low latency.

Axes: C channels, S speakers, n samples.
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
# (format tag, bits per sample) of a WAV header -> encoding.
WAV_ENCODINGS = {(1, 16): "s16le", (3, 32): "f32le"}
# First bytes of encoded files, which would be noise if read as PCM.
NOT_PCM = {
    b"fLaC": "FLAC",
    b"OggS": "Ogg",
    b"ID3": "MP3",
    b"RIFX": "big-endian WAV",
    b"FORM": "AIFF",
    b"caff": "CAF",
}
FULL_SCALE = 2**15
LOAD_WINDOW = 5.0  # seconds of audio that the load for a warning is taken over
WARN_EVERY = 30.0  # seconds of audio between two warnings


def separate_live(
    model, reader, block, sink=None, writer=None, warn=None, run=None
):
    """Separate live audio until it ends or the reader of the sources is gone.

    Arguments
    ---------
    model : FlashFormerSeparation or RecordingSeparator
        A causal model.
    reader : PcmReader
        Source of the audio.
    block : float
        Length of a block in seconds.
    sink : binary file, optional
        Where the sources are written as raw PCM with S channels, in the
        encoding of the reader. Unbuffered, for low latency.
    writer : SourceWriter, optional
        Where the sources are written as files.
    warn : callable, optional
        Called with the load (computing time / audio time) when it is above 1,
        that is, when the stream falls behind.
    run : callable, optional
        Runtime of the steps, as in ``separate_stream``.

    Returns
    -------
    Load
        Statistics of the computing time.

    Raises
    ------
    ValueError
        When the model is not causal, or there was no audio.
    SystemExit
        When a signal ended the stream before there was audio.
    """
    rate, load = reader.sample_rate, Load(warn)
    # Warm up: torch initializes itself before the audio starts.
    warm = [torch.zeros(1, math.ceil(min(block, 0.1) * rate))] * 20
    for _ in model.separate_stream(warm, rate, run):
        pass
    with writer or nullcontext():
        blocks = load.watch(reader.blocks(block), rate)
        for part in model.separate_stream(blocks, rate, run):
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
        if not load.audio and reader.status:
            sys.exit(reader.status)
        if not load.audio:
            raise ValueError("no sound came on standard input")
    return load


class PcmReader:
    """Reads raw PCM or a WAV stream while it arrives.

    Use it as a context manager. The first Ctrl-C or SIGTERM ends the stream, so
    that the audio that was read can be separated. A second one raises
    ``KeyboardInterrupt``.

    Arguments
    ---------
    source : binary file
        Unbuffered: ``read`` returns the data that is available.
    sample_rate : int
        Sampling rate of raw PCM, Hz. A WAV header overrides it.
    channels : int
        C, interleaved in raw PCM. A WAV header overrides it.
    encoding : str
        ``s16le`` or ``f32le`` for raw PCM. A WAV header overrides it.

    Attributes
    ----------
    status : int
        128 plus the number of the signal that ended the stream, or 0.
    cut : int
        Number of bytes at the end that are not a whole sample.

    Raises
    ------
    ValueError
        While reading the header, when the input is an encoded file or a WAV
        stream of an unknown kind.

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
        self.left = math.inf  # remaining bytes of audio
        self.waiting = self.stopped = False
        self.before = {}  # signal -> handler to restore
        self.begun = None  # bytes that were read and not yet used

    def __enter__(self):
        """Install the signal handlers and read the header."""
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
        """Restore the signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def stop(self):
        """Stop reading; the stream then ends."""
        self.stopped = True

    def blocks(self, seconds):
        """Read the stream to its end.

        Arguments
        ---------
        seconds : float
            Length of a block; the last one may be shorter.

        Yields
        ------
        torch.Tensor
            Mean of the channels, float32 [1, n].
        """
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
        """Read ``size`` bytes, fewer only at the end."""
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
        """Read the WAV header, if there is one."""
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
            raise ValueError("the WAV header is incomplete") from error
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
        """Read the header; return (format tag, bits, bytes of audio)."""
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
                if kind == 0xFFFE:  # WAVE_FORMAT_EXTENSIBLE has it later
                    (kind,) = struct.unpack_from("<H", chunk, 24)


class Load:
    """Statistics of the computing time of blocks, in bounded memory.

    Arguments
    ---------
    warn : callable, optional
        As in ``separate_live``.

    Attributes
    ----------
    audio, spent : float
        Seconds of audio and of computing.
    overruns : int
        Number of blocks that took longer than their duration.
    clipped, silenced : int
        Number of output samples that were clipped, and of input samples that
        were replaced by silence.

    Example
    -------
    >>> load = Load()
    >>> for block in load.watch([torch.zeros(1, 80)] * 3, 8000):
    ...     pass
    >>> round(load.audio, 6), load.overruns
    (0.03, 0)
    """

    def __init__(self, warn=None):
        self.warn, self.warned = warn, -WARN_EVERY
        # Seconds; the time for output is not computing time.
        self.audio = self.spent = self.elsewhere = 0.0
        self.overruns = self.clipped = self.silenced = 0
        self.times = Counter()  # blocks by 100 * log(seconds), rounded up

    def watch(self, blocks, sample_rate):
        """Pass blocks [1, n] on; measure the time until the next is taken."""
        audio, before = self.audio, self.spent
        for block in blocks:
            self.silenced += (~(block.abs() < TOO_LOUD)).sum().item()
            self.elsewhere = 0.0
            start = perf_counter()
            yield block
            spent = perf_counter() - start - self.elsewhere
            seconds = block.shape[1] / sample_rate
            self.audio += seconds
            self.spent += spent
            self.overruns += spent > seconds
            self.times[math.ceil(100 * math.log(max(spent, 1e-9)))] += 1
            if self.audio - audio >= LOAD_WINDOW:
                self._warn((self.spent - before) / (self.audio - audio))
                audio, before = self.audio, self.spent

    def _warn(self, load):
        if self.warn and load > 1 and self.audio - self.warned >= WARN_EVERY:
            self.warned = self.audio
            self.warn(load)

    def encode(self, sources, encoding):
        """Encode sources [n, S] as bytes; count samples that clip in s16le."""
        samples = sources.numpy()
        if encoding == "s16le":
            samples = np.rint(samples * FULL_SCALE)
            low, high = -FULL_SCALE, FULL_SCALE - 1
            self.clipped += ((samples < low) | (samples > high)).sum().item()
            samples = samples.clip(low, high)
        return samples.astype(ENCODINGS[encoding]).tobytes()

    def percentile(self, percent):
        """Percentile of the computing time of a block, in seconds."""
        wanted = self.times.total() * percent / 100
        for place in sorted(self.times):
            wanted -= self.times[place]
            if wanted <= 0:
                return math.exp(place / 100)
        return 0.0
