"""Speech synthesis with eSpeak NG, in separate processes.

Requires the extra ``demo`` (the wheel of espeakng-loader contains eSpeak NG).
"""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.signal import resample

try:
    import espeakng_loader
except ImportError:
    espeakng_loader = None

# The output of eSpeak NG depends on what the process has spoken before. The
# sentences are therefore divided among a fixed number of new processes, so that
# all machines give the same output.
PROCESSES = 4


def speak_all(lines, sample_rate, folder, bar):
    """Speak all lines.

    Arguments
    ---------
    lines : list of dict
        Each with ``voice``, ``text``, ``rate``, ``pitch`` and ``range``.
    sample_rate : int
        Hz.
    folder : Path
        Folder for temporary files.
    bar : tqdm.tqdm
        Progress bar, updated once per line.

    Returns
    -------
    list of numpy.ndarray
        One signal [T] per line, float32.

    Raises
    ------
    OSError
        If eSpeak NG fails; its own message is on standard error.
    """
    size = -(-len(lines) // PROCESSES)
    shares = [lines[i : i + size] for i in range(0, len(lines), size)]
    files = [folder / f"spoken{i}.npz" for i in range(len(shares))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = [
            pool.submit(_speak_share, share, sample_rate, file, bar)
            for share, file in zip(shares, files)
        ]
        return [signal for share in running for signal in share.result()]


def _speak_share(lines, sample_rate, file, bar):
    """Run ``main`` of this module in a new process."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(file), str(sample_rate)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    # Writing fails if the process has died; its exit code is checked below.
    with contextlib.suppress(OSError):
        process.stdin.write(json.dumps(lines))
        process.stdin.close()
    for _ in process.stdout:
        bar.update(1)
    if process.wait():
        raise OSError(
            f"eSpeak NG failed with exit status {process.returncode}; a "
            "message above, if there is one, says why"
        )
    with np.load(file) as spoken:
        signals = [spoken[str(i)] for i in range(len(lines))]
    file.unlink()
    return signals


def main():
    """Speak the lines from standard input and write them to an npz file."""
    file, sample_rate = sys.argv[1], int(sys.argv[2])
    lines, spoken = json.load(sys.stdin), {}
    try:
        speaker = _Speaker()
        for index, line in enumerate(lines):
            spoken[str(index)] = speaker.say(line, sample_rate)
            print(index, flush=True)
        np.savez(file, **spoken)
    except (OSError, RuntimeError) as error:
        sys.exit(str(error))


class _Speaker:
    """eSpeak NG through ctypes (functions of its speak_lib.h)."""

    RETRIEVAL, UTF8 = 1, 1
    PARAMETERS = {"rate": 1, "pitch": 3, "range": 4}

    def __init__(self):
        data = espeakng_loader.get_data_path()
        self.lib = ctypes.CDLL(espeakng_loader.get_library_path())
        self.rate = self.lib.espeak_Initialize(
            self.RETRIEVAL, 0, data.encode(), 0
        )
        if self.rate <= 0:
            raise RuntimeError(f"eSpeak NG does not start with {data}")
        # Some voices add random breath noise.
        self.lib.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self.pieces = []
        callback = ctypes.CFUNCTYPE(
            ctypes.c_int,
            ctypes.POINTER(ctypes.c_short),
            ctypes.c_int,
            ctypes.c_void_p,
        )
        # A reference, so that it is not freed while the library uses it.
        self.callback = callback(self._collect)
        self.lib.espeak_SetSynthCallback(self.callback)

    def _collect(self, samples, count, _events):
        if count > 0:
            self.pieces.append(ctypes.string_at(samples, 2 * count))
        return 0

    def say(self, line, sample_rate):
        """Speak a line; returns float32 [T] without silence at the ends."""
        if self.lib.espeak_SetVoiceByName(line["voice"].encode()):
            raise RuntimeError(f"eSpeak NG has no voice {line['voice']}")
        for name, number in self.PARAMETERS.items():
            self.lib.espeak_SetParameter(number, line[name], 0)
        self.pieces.clear()
        text = line["text"].encode()
        self.lib.espeak_Synth(
            text, len(text) + 1, 0, 1, 0, self.UTF8, None, None
        )
        self.lib.espeak_Synchronize()
        signal = np.frombuffer(b"".join(self.pieces), np.int16) / 32768
        loud = np.flatnonzero(np.abs(signal) > 0.006)
        if not len(loud):
            raise RuntimeError(f"eSpeak NG said nothing: {line}")
        signal = signal[loud[0] : loud[-1] + 1].astype(np.float32)
        return resample(signal, round(len(signal) * sample_rate / self.rate))


if __name__ == "__main__":
    main()
