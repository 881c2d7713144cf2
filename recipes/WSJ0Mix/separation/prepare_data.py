"""Find the mixtures of a data folder, check them, write SpeechBrain's CSVs.

``data_layouts.py`` defines the supported layouts: WSJ0-mix, WHAM!, WHAMR!,
LibriMix, the custom layout, and CSV files.
"""

import csv
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from data_layouts import find_mixtures
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from speechbrain_flashformer.inference.files import written_beside

logger = get_logger(__name__)

CSV_FILES = ("wsj_tr.csv", "wsj_cv.csv", "wsj_tt.csv")
REPORT = "data_report.md"
DATA_ROOT = "$data_root"  # represents the data folder in the CSV files
# Results of earlier checks of the files. A cache of another version is ignored.
CACHE, VERSION = "data_cache.json", 1

SHOWN = 10  # problems in the error message; the report has all
BLOCK = 2**20  # samples per read

# Programs that do not know the length write a header with this size or more.
UNKNOWN_SIZE = 2**31 - 2**16

# Names that contain the speakers: WSJ0-mix (01aa010b_0.97_209a010p_-0.97) and
# LibriMix (4077-13754-0001_5142-33396-0065).
WSJ0_NAME = re.compile(r"(?:[0-9a-z]{8}_-?[\d.]+(?:_|$))+")
LIBRI_NAME = re.compile(r"(?:\d+-\d+-\d+(?:_|$))+")


def prepare_wsjmix(
    datapath,
    savepath,
    n_spks=2,
    skip_prep=False,
    fs=8000,
    layout="auto",
    mode="min",
    parts=None,
    mixture=None,
    sources=None,
):
    """Write ``wsj_tr.csv``, ``wsj_cv.csv`` and ``wsj_tt.csv``.

    Every file is read completely once; later calls read only changed files.
    ``data_report.md``, next to the CSV files, describes the data.

    Arguments
    ---------
    datapath : str or Path
        The data folder.
    savepath : str or Path
        Folder for the CSV files, which are written if all mixtures are valid.
    n_spks : int
        Speakers per mixture.
    skip_prep : bool
        Use the existing CSV files.
    fs : int
        Sampling rate, Hz.
    layout, mode, parts, mixture, sources
        Select folders; see ``find_mixtures``.

    Raises
    ------
    FileNotFoundError
        If the folder, its layout or a part of it is missing.
    ValueError
        If files are missing, unreadable, empty, silent or not finite, or have
        the wrong sampling rate, length or number of channels. One error lists
        all problems.
    OSError
        If ``savepath`` cannot be written.
    """
    savepath = Path(savepath)
    if skip_prep:
        for name in CSV_FILES:
            if not (savepath / name).is_file():
                raise FileNotFoundError(
                    f"skip_prep, but there is no {savepath / name}"
                )
        return
    # CSV files of an earlier preparation are removed before this one starts.
    outputs = [savepath / name for name in CSV_FILES]
    for part in parts or ():
        if Path(datapath, part).resolve() in [p.resolve() for p in outputs]:
            raise ValueError(
                f"{part} would be overwritten: choose another output_folder, "
                "or set skip_prep: True to use it as it is"
            )
    with _explain_write_errors(savepath):
        savepath.mkdir(parents=True, exist_ok=True)
        for path in (*outputs, report := savepath / REPORT):
            path.unlink(missing_ok=True)

    options = (layout, mode, parts, mixture, sources)
    text, found = find_mixtures(datapath, n_spks, fs, *options)
    facts = _examine_all([p.rows for p in found], savepath / CACHE)
    for part in found:
        for row in part.rows:
            part.problems += _find_problems(row, facts, fs, datapath)
    problems = [problem for part in found for problem in part.problems]
    table = _describe(found, facts)
    logger.info(f"{text}\n{table}")
    with _whole(report) as file:
        file.write(f"# {text}\n\n{table}\n")
        if problems:
            file.write("\n## Problems\n\n")
            file.writelines(f"- {problem}\n" for problem in problems)
    if problems:
        raise ValueError(
            f"{len(problems)} problems in {datapath}:\n"
            + "\n".join(problems[:SHOWN])
            + f"\nall of them are in {report}"
        )
    for path, part in zip(outputs, found):
        with _whole(path) as file:
            _write_csv(file, part.rows, facts, datapath)


# --- files ------------------------------------------------------------------


class Facts(NamedTuple):
    """Properties of an audio file; the first two show whether it changed."""

    size: int
    mtime_ns: int
    rate: int
    channels: int
    frames: int
    finite: bool
    silent: bool


def _examine_all(parts, cache):
    """Map each path to its ``Facts``, or to a message; update the cache."""
    known = _read_cache(cache)
    rows = [list(row.values())[1:] for part in parts for row in part]
    facts, pool = {}, ThreadPoolExecutor()
    try:
        found = pool.map(partial(_examine_mixture, known=known), rows)
        # disable=None shows the bar only in a terminal.
        bar = tqdm(found, "checking", len(rows), disable=None)
        for some, paths in zip(bar, rows):
            facts.update(zip(paths, some))
    finally:
        pool.shutdown(cancel_futures=True)
        # Save the results so far, also after an interruption.
        known |= {p: f for p, f in facts.items() if isinstance(f, Facts)}
        with _whole(cache) as file:
            file.write(json.dumps({"version": VERSION, "files": known}))
    return facts


def _read_cache(path):
    try:
        cache = json.loads(path.read_text(encoding="utf-8"))
        if cache["version"] == VERSION:
            return {p: Facts(*facts) for p, facts in cache["files"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no cache, or an invalid one: all files are read
    return {}


def _examine_mixture(paths, known):
    return [_examine(path, known.get(path)) for path in paths]


def _examine(path, known):
    """Return the ``Facts`` of a file, cached if unchanged; or a message."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return (
            f"{path!r} is not valid UTF-8, as SpeechBrain's CSV files need "
            "it: rename it"
        )
    try:
        stat = os.stat(path)
        if known and known[:2] == (stat.st_size, stat.st_mtime_ns):
            return known
        expected = _header_size(path)
        # A missing byte of padding is allowed.
        if stat.st_size + 1 < expected < UNKNOWN_SIZE:
            return (
                f"{path} is truncated: {stat.st_size} bytes of {expected}; "
                "copy it again"
            )
        with soundfile.SoundFile(path) as file:
            frames, finite, silent = 0, True, True
            for block in file.blocks(BLOCK, dtype="float32"):
                frames += len(block)
                finite = finite and bool(np.isfinite(block).all())
                silent = silent and not block.any()
            rate, channels = file.samplerate, file.channels
    except FileNotFoundError:
        return f"no file {path}: copy it, or remove the mixture"
    except soundfile.LibsndfileError as error:
        return f"cannot read {path} ({error.error_string}): copy it again"
    except OSError as error:
        return f"cannot read {path} ({error.strerror}): copy it again"
    facts = (rate, channels, frames, finite, silent)
    return Facts(stat.st_size, stat.st_mtime_ns, *facts)


def _header_size(path):
    """Size in bytes according to the header of a wav file; 0 for others."""
    with open(path, "rb") as file:
        head = file.read(8)
    if head[:4] != b"RIFF":
        return 0
    return int.from_bytes(head[4:], "little") + 8


def _find_problems(row, facts, fs, datapath):
    """Yield the problems of a mixture, each with its remedy."""
    mix = facts[row["mix"]]
    for column, path in list(row.items())[1:]:
        file = facts[path]
        if isinstance(file, str):
            yield file
            continue
        if "$" in _place(path, datapath).removeprefix(DATA_ROOT):
            yield (
                f"{path} has a $, which means something in SpeechBrain's CSV "
                "files: rename it"
            )
        if file.rate != fs:
            yield (
                f"{path} has {file.rate} Hz, sample_rate is {fs}: resample "
                "the files or set sample_rate"
            )
        if file.channels != 1:
            yield f"{path} has {file.channels} channels: keep one"
        if not file.finite:
            yield f"{path} has samples that are NaN or infinite: make it again"
        if not file.frames:
            yield f"{path} is empty: copy or make it again"
        elif file.silent and column != "noise":
            yield (
                f"{path} is silent, all samples are 0: make it again, or "
                "remove the mixture"
            )
        if isinstance(mix, Facts) and file.frames != mix.frames:
            yield (
                f"{path} has {file.frames} samples, {row['mix']} has "
                f"{mix.frames}: cut them to one length"
            )


# --- outputs ----------------------------------------------------------------


def _describe(parts, facts):
    """Format a table of the data, with one row per part."""
    lines = [
        "| part | mixtures | hours | seconds | speakers | Hz | problems |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in parts:
        mixtures = [facts[row["mix"]] for row in part.rows]
        readable = [mix for mix in mixtures if isinstance(mix, Facts)]
        seconds = [mix.frames / mix.rate for mix in readable] or [0]
        rates = sorted({mix.rate for mix in readable})
        cells = (
            part.name,
            len(mixtures),
            f"{sum(seconds) / 3600:.2f}",
            f"{min(seconds):.1f} to {max(seconds):.1f}",
            _count_speakers(row["ID"] for row in part.rows) or "unknown",
            ", ".join(map(str, rates)),
            len(part.problems),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _count_speakers(names):
    """Count the speakers in names of mixtures; 0 if a name has another form."""
    speakers = set()
    for name in names:
        if WSJ0_NAME.fullmatch(name):
            speakers.update(said[:3] for said in name.split("_")[::2])
        elif LIBRI_NAME.fullmatch(name):
            speakers.update(said.split("-")[0] for said in name.split("_"))
        else:
            return 0
    return len(speakers)


def _write_csv(file, rows, facts, datapath):
    """Write one row per mixture, with SpeechBrain's columns."""
    writer = csv.writer(file)
    columns = list(rows[0])[1:]
    what = ("wav", "wav_format", "wav_opts")
    header = [f"{column}_{end}" for column in columns for end in what]
    writer.writerow(["ID", "duration", *header])
    for row in rows:
        mix = facts[row["mix"]]
        cells = [row["ID"], mix.frames / mix.rate]
        for column in columns:
            suffix = Path(row[column]).suffix[1:].lower()
            cells += [_place(row[column], datapath), suffix, None]
        writer.writerow(cells)


def _place(path, datapath):
    """Format a path for SpeechBrain's CSV files."""
    path = Path(path)
    if path.is_relative_to(datapath):
        return f"{DATA_ROOT}/{path.relative_to(datapath).as_posix()}"
    return str(path.absolute())


@contextmanager
def _whole(path):
    """Open a text file under a temporary name; rename it when complete."""
    with (
        _explain_write_errors(path),
        written_beside(path) as beside,
        beside.open("w", newline="", encoding="utf-8") as file,
    ):
        yield file


@contextmanager
def _explain_write_errors(path):
    """Add the path and the remedy to an OSError."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write {path} ({error.strerror}): make room there, or "
            "choose another output_folder",
        ) from error
