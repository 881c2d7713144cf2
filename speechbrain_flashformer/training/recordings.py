"""Find recordings for dynamic mixing and read excerpts of them."""

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

from speechbrain_flashformer.inference.listing import files_below
from speechbrain_flashformer.training.data import read_table

# Maximum denominator of a resampling ratio. At 44.1 kHz and 97 % speed, the
# exact ratio is 42777 to 8000, and the resampler would build a filter of 3 GB.
# The rounded ratio is off by less than 0.1 %, which is two cents of pitch.
FINEST_RATIO = 400


class Recording(NamedTuple):
    """Path, speaker and corpus of a recording of one speaker."""

    path: Path
    speaker: str
    corpus: str = ""


def find_recordings(place, speaker="folder"):
    """List recordings and their speakers.

    Arguments
    ---------
    place : str or Path
        A folder, which is searched recursively for wav and flac files. Or a CSV
        file with the columns ``wav`` (paths, relative to the CSV), ``speaker``
        and, optionally, ``corpus``.
    speaker : str
        How to find the speaker of a file in a folder. ``folder``: the name of
        its parent folder. ``file``: every file is another speaker. Any other
        value is a regular expression, searched in the path relative to
        ``place``; the speaker is the concatenation of its matched groups, or
        the match if there are none.

    Returns
    -------
    list of Recording
        From a folder sorted by path, all of one corpus; from a CSV file in its
        order.

    Raises
    ------
    FileNotFoundError
        If nothing is found.
    ValueError
        If the CSV lacks a column or has an empty cell in it, or the regular
        expression is invalid or does not match a path.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> (folder / "anna").mkdir()
    >>> soundfile.write(folder / "anna" / "1.wav", np.zeros(8), 8000)
    >>> find_recordings(folder)[0].speaker
    'anna'
    """
    place = Path(place)
    if place.is_file():
        found = list(_listed(place))
    else:
        if not place.is_dir():
            raise FileNotFoundError(f"no folder {place}")
        paths = [
            path
            for path in files_below(place)
            if path.suffix.lower() in (".wav", ".flac")
            # macOS writes such metadata files on other file systems.
            and not path.name.startswith("._")
        ]
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
    """Reads random excerpts of mono recordings of any sampling rate.

    Arguments
    ---------
    paths : list of str or Path
        Recordings; the constructor reads all headers.
    title : str
        Title of the progress bar.

    Raises
    ------
    ValueError
        If a recording cannot be read, is empty or is not mono; names it.

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
        """Read a random excerpt of a recording.

        Arguments
        ---------
        index : int
            Index of the recording in ``paths``.
        samples : int
            Maximum length; a shorter recording is read completely.
        sample_rate : int
            Sampling rate of the excerpt, Hz.
        rng : numpy.random.Generator
            Draws the start.
        percent : int
            Speed in percent; it changes pitch and formants too.

        Returns
        -------
        numpy.ndarray
            [T], float32.

        Raises
        ------
        ValueError
            If the excerpt cannot be read or is not finite; names the file.
        """
        # Speed is changed by pretending another sampling rate of the recording.
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
    """Sampling rate and number of frames of a mono recording."""
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
    if info.frames >= 2**62:  # libsndfile's number for an unknown length
        raise ValueError(f"{path} does not store its length: encode it again")
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
            f"{start} on: repair or remove it"
        )
    return signal
