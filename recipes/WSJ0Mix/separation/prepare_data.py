"""Find the mixtures of a data folder, check them, write SpeechBrain's CSVs.

``data_layouts.py`` knows where they are: WSJ0-mix, WHAM!, WHAMR!, LibriMix,
the custom layout, or CSV files.
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
DATA_ROOT = "$data_root"  # stands for the data folder in the CSV files
# What the files were when they were last read. Another version reads them all.
CACHE, VERSION = "data_cache.json", 1

SHOWN = 10  # problems in the error message; the report has all
BLOCK = 2**20  # samples read at a time

# A writer that could not know the length leaves a size like this, bytes.
UNKNOWN_SIZE = 2**31 - 2**16

# Who speaks, from the names of WSJ0-mix (01aa010b_0.97_209a010p_-0.97) and of
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

    Every file is opened and read once; later calls read again what has
    changed. Beside the CSVs, ``data_report.md`` says what was found.

    Arguments
    ---------
    datapath : str or Path
        The data folder.
    savepath : str or Path
        Where the CSV files go; each appears when all mixtures are in order.
    n_spks : int
        Speakers per mixture.
    skip_prep : bool
        Use the CSV files that are there.
    fs : int
        Sampling rate, Hz.
    layout, mode, parts, mixture, sources
        Which of the folders are taken, see ``find_mixtures``.

    Raises
    ------
    FileNotFoundError
        When the folder, its layout or a part of it is missing.
    ValueError
        When files are missing, cannot be read, hold nothing or what is no
        sound, or have another rate, length or number of channels than they
        must: one error for all of them.
    OSError
        When ``savepath`` cannot be written.
    """
    savepath = Path(savepath)
    if skip_prep:
        for name in CSV_FILES:
            if not (savepath / name).is_file():
                raise FileNotFoundError(
                    f"skip_prep, but there is no {savepath / name}"
                )
        return
    # What an earlier preparation left is never taken for the result of this.
    outputs = [savepath / name for name in CSV_FILES]
    for part in parts or ():
        if Path(datapath, part).resolve() in [p.resolve() for p in outputs]:
            raise ValueError(
                f"{part} would be overwritten: choose another output_folder, "
                "or set skip_prep: True to use it as it is"
            )
    with _telling(savepath):
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
    """What there is to know of a file; the first two say if it has changed."""

    size: int
    mtime_ns: int
    rate: int
    channels: int
    frames: int
    finite: bool
    silent: bool


def _examine_all(parts, cache):
    """Path -> ``Facts``, or a problem in words; the cache is brought up."""
    known = _read_cache(cache)
    rows = [list(row.values())[1:] for part in parts for row in part]
    facts, pool = {}, ThreadPoolExecutor()
    try:
        found = pool.map(partial(_examine_mixture, known=known), rows)
        # None: only where somebody looks.
        bar = tqdm(found, "checking", len(rows), disable=None)
        for some, paths in zip(bar, rows):
            facts.update(zip(paths, some))
    finally:
        pool.shutdown(cancel_futures=True)
        # What was known stays so: an interruption loses nothing.
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
        pass  # None yet, or not ours: all files are read
    return {}


def _examine_mixture(paths, known):
    return [_examine(path, known.get(path)) for path in paths]


def _examine(path, known):
    """``Facts`` of a file, from the cache if it is unchanged; or a problem."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return (
            f"{path!r} is no UTF-8, and SpeechBrain's CSV files must be: "
            "rename it"
        )
    try:
        stat = os.stat(path)
        if known and known[:2] == (stat.st_size, stat.st_mtime_ns):
            return known
        promised = _promised_size(path)
        # One byte of padding may be left out.
        if stat.st_size + 1 < promised < UNKNOWN_SIZE:
            return (
                f"{path} is truncated: {stat.st_size} bytes of {promised}; "
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


def _promised_size(path):
    """Size in bytes that the header of a wav file gives; 0 for others."""
    with open(path, "rb") as file:
        head = file.read(8)
    if head[:4] != b"RIFF":
        return 0
    return int.from_bytes(head[4:], "little") + 8


def _find_problems(row, facts, fs, datapath):
    """What is wrong with a mixture, each with its mend."""
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


# --- what is written --------------------------------------------------------


def _describe(parts, facts):
    """A table of what was found, a row for each part."""
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
            _count_speakers(row["ID"] for row in part.rows) or "not told",
            ", ".join(map(str, rates)),
            len(part.problems),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _count_speakers(names):
    """How many speak in mixtures of these names; 0 if a name does not tell."""
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
    """One row per mixture, in SpeechBrain's columns."""
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
    """A path as SpeechBrain's CSV files have it."""
    path = Path(path)
    if path.is_relative_to(datapath):
        return f"{DATA_ROOT}/{path.relative_to(datapath).as_posix()}"
    return str(path.absolute())


@contextmanager
def _whole(path):
    """Open a text file that appears under its name when it is complete."""
    with (
        _telling(path),
        written_beside(path) as beside,
        beside.open("w", newline="", encoding="utf-8") as file,
    ):
        yield file


@contextmanager
def _telling(path):
    """Say what could not be written, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write {path} ({error.strerror}): make room there, or "
            "choose another output_folder",
        ) from error
