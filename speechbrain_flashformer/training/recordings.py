"""Recordings for dynamic mixing: find them, read pieces of them."""

import re
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample
from tqdm import tqdm

from speechbrain_flashformer.training.data import read_table

# Largest denominator of a ratio of rates: at 44.1 kHz, 97 % of the speed is
# 42777 to 8000, for which the resampler would build a filter of 3 GB. The
# nearest such ratio is off by less than a thousandth: two cents of pitch.
FINEST_RATIO = 400


class Recording(NamedTuple):
    """Where speech is, who speaks, and the corpus that it is from."""

    path: Path
    speaker: str
    corpus: str = ""


def find_recordings(place, speaker="folder"):
    """List recordings and who speaks in each.

    Arguments
    ---------
    place : str or Path
        A folder, searched to all depths for wav and flac files; or a CSV file
        with the columns ``wav`` (paths, relative ones beside the CSV),
        ``speaker`` and, where there are several, ``corpus``.
    speaker : str
        How a folder tells who speaks: ``folder``, the name of the folder that
        holds the file; ``file``, each file is its own; else a regular
        expression searched in the path below ``place``, whose groups that
        matched are the name.

    Returns
    -------
    list of Recording
        Those of a folder, all of one corpus, by path; those of a CSV file in
        its order.

    Raises
    ------
    FileNotFoundError
        When nothing is found.
    ValueError
        When the CSV has not these columns or an empty cell in them, or a path
        does not match.
    """
    place = Path(place)
    if place.is_file():
        found = list(_listed(place))
    else:
        paths = sorted(
            path
            for path in place.rglob("*")
            if path.suffix.lower() in (".wav", ".flac")
            # What macOS keeps beside a file on other file systems.
            and not path.name.startswith("._")
        )
        found = [Recording(x, _speaker(x, place, speaker)) for x in paths]
    if not found:
        raise FileNotFoundError(f"no wav or flac file in {place}")
    return found


def _listed(place):
    columns, rows = read_table(place)
    if missing := {"wav", "speaker"} - set(columns):
        raise ValueError(f"{place} has no column {sorted(missing)[0]}")
    for number, row in rows.items():
        if not row["wav"] or not row["speaker"]:
            raise ValueError(f"{place}, line {number}: wav or speaker is empty")
        path = place.parent / row["wav"]
        yield Recording(path, row["speaker"], row.get("corpus") or "")


def _speaker(path, place, speaker):
    below = path.relative_to(place)
    if speaker == "file":
        return below.as_posix()
    if speaker == "folder":
        return below.parent.name or path.parent.name
    try:
        match = re.search(speaker, below.as_posix())
    except re.error as error:
        raise ValueError(
            f"dm_speaker {speaker!r} is not folder, file or a regular "
            f"expression: {error}"
        ) from error
    if not match:
        raise ValueError(
            f"dm_speaker {speaker!r} does not match {below} in {place}"
        )
    return "".join(group for group in match.groups() if group) or match[0]


class RecordingReader:
    """Random pieces of mono recordings of any sampling rate.

    Arguments
    ---------
    paths : list of str or Path
        Every header is read at once.
    title : str
        Of the progress bar.

    Raises
    ------
    ValueError
        When a recording cannot be read, is empty or not mono; names it.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.wav"
    >>> soundfile.write(path, np.zeros(32000), 16000)
    >>> rng = np.random.default_rng(0)
    >>> RecordingReader([path]).cut(0, 4000, 8000, rng).shape
    (4000,)
    """

    def __init__(self, paths, title="recordings"):
        self.paths = [str(path) for path in paths]
        with ThreadPoolExecutor() as pool:
            headers = tqdm(
                pool.map(_header, self.paths),
                title,
                len(self.paths),
                dynamic_ncols=True,
                disable=None,
            )
            self.rates, self.frames = np.array(list(headers)).T

    def cut(self, index, samples, sample_rate, rng, percent=100):
        """A piece of a recording, from a random place.

        Arguments
        ---------
        index : int
            Of the recording.
        samples : int
            Longest piece; a shorter recording is taken whole.
        sample_rate : int
            Of the piece, Hz.
        rng : numpy.random.Generator
            Draws the place.
        percent : int
            Speed; pitch and formants go with it.

        Returns
        -------
        numpy.ndarray
            [T], float32.
        """
        # Faster speech is a recording that claims a higher rate.
        new, old = sample_rate * 100, int(self.rates[index]) * percent
        wanted = min(-(-samples * old // new), self.frames[index])
        start = rng.integers(self.frames[index] - wanted + 1)
        piece = _read(self.paths[index], wanted, start)
        if old != new:
            ratio = Fraction(old, new).limit_denominator(FINEST_RATIO)
            piece = resample(
                torch.from_numpy(piece), ratio.numerator, ratio.denominator
            ).numpy()
        return piece[:samples]


def _header(path):
    """Rate and frames of a mono recording."""
    try:
        info = soundfile.info(path)
    except (OSError, soundfile.SoundFileError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if info.channels != 1:
        raise ValueError(
            f"{path} has {info.channels} channels: dynamic mixing takes mono"
        )
    if not info.frames:
        raise ValueError(f"{path} is empty")
    return info.samplerate, info.frames


def _read(path, frames, start):
    try:
        signal, _ = soundfile.read(
            path, int(frames), int(start), dtype="float32"
        )
    except (OSError, soundfile.SoundFileError) as error:
        raise ValueError(
            f"cannot read {path} from frame {start} on: {error}"
        ) from error
    if not np.isfinite(signal).all():
        raise ValueError(
            f"{path} has samples that are not finite, in {frames} from frame "
            f"{start} on: mend it or take it out"
        )
    return signal
