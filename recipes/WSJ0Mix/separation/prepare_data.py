"""Find the mixtures of a folder, check them, and write SpeechBrain's CSVs.

Two layouts are known, told apart by what is there:

* WSJ0-mix: ``wav8k/min/{tr,cv,tt}/{mix,s1,s2[,s3]}/NAME.wav`` (wav16k for
  16000 Hz), as the scripts of the corpus write it;
* custom: ``{train,valid,test}/{mixture,source1,source2[,source3]}/NAME.wav``.
"""

import csv
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import soundfile
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

logger = get_logger(__name__)

CSV_FILES = ("wsj_tr.csv", "wsj_cv.csv", "wsj_tt.csv")


def prepare_wsjmix(datapath, savepath, n_spks=2, skip_prep=False, fs=8000):
    """Write ``wsj_tr.csv``, ``wsj_cv.csv`` and ``wsj_tt.csv``.

    Arguments
    ---------
    datapath : str or Path
        The data folder, in one of the layouts above.
    savepath : str or Path
        Where the CSV files go; each appears when all are complete.
    n_spks : int
        Speakers per mixture.
    skip_prep : bool
        Use the CSV files that are there.
    fs : int
        Sampling rate, Hz.

    Raises
    ------
    FileNotFoundError
        When the folder, its layout or a source is missing.
    ValueError
        When a file cannot be read, or has another rate, length or number of
        channels than it must.
    """
    datapath, savepath = Path(datapath), Path(savepath)
    if skip_prep:
        for name in CSV_FILES:
            if not (savepath / name).is_file():
                raise FileNotFoundError(
                    f"skip_prep, but there is no {savepath / name}"
                )
        return
    parts = _find_parts(datapath, n_spks, fs)
    checked = [_check_part(folders, fs) for folders in parts]
    savepath.mkdir(parents=True, exist_ok=True)
    # All written beside, then renamed: files of two data folders, or half a
    # file, are never taken for a finished preparation.
    for name in CSV_FILES:
        (savepath / name).unlink(missing_ok=True)
    for name, folders, rows in zip(CSV_FILES, parts, checked):
        partial = savepath / f"{name}.partial"
        _write_csv(partial, rows, folders, datapath)
    for name, rows in zip(CSV_FILES, checked):
        os.replace(savepath / f"{name}.partial", savepath / name)
        hours = sum(row["duration"] for row in rows) / 3600
        logger.info(f"{name}: {len(rows)} mixtures, {hours:.2f} h")


def _find_parts(datapath, n_spks, fs):
    """For each part the folders of ``mix``, ``s1``, ``s2``, ..."""
    if not datapath.is_dir():
        raise FileNotFoundError(f"no data folder {datapath}")
    numbers = range(1, n_spks + 1)
    wsj = datapath / f"wav{fs // 1000}k" / "min"
    if wsj.is_dir():
        root, parts = wsj, ("tr", "cv", "tt")
        names = ["mix", *(f"s{i}" for i in numbers)]
    elif (datapath / "train" / "mixture").is_dir():
        root, parts = datapath, ("train", "valid", "test")
        names = ["mixture", *(f"source{i}" for i in numbers)]
    else:
        raise FileNotFoundError(
            f"{datapath} has neither wav{fs // 1000}k/min/tr/mix (WSJ0-mix) "
            "nor train/mixture (custom layout); it holds: "
            + (
                ", ".join(sorted(p.name for p in datapath.iterdir()))
                or "nothing"
            )
        )
    columns = ["mix", *(f"s{i}" for i in numbers)]
    for folder in (root / part / name for part in parts for name in names):
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder} ({n_spks} speakers)")
    more = root / parts[0] / names[-1].replace(str(n_spks), str(n_spks + 1))
    if more.is_dir():
        raise ValueError(
            f"{more} exists, but num_spks is {n_spks}: the mixtures would "
            "hold a voice that is no target"
        )
    return [
        {column: root / part / name for column, name in zip(columns, names)}
        for part in parts
    ]


def _check_part(folders, fs):
    """Rows of one part, sorted by name; each file opened and compared."""
    files = sorted(folders["mix"].glob("*.wav"))
    if not files:
        raise FileNotFoundError(f"no wav file in {folders['mix']}")

    def row(file):
        paths = {name: folder / file.name for name, folder in folders.items()}
        return {"ID": file.stem, "duration": _check(paths, fs), **paths}

    with ThreadPoolExecutor() as pool:
        rows = pool.map(row, files)
        return list(tqdm(rows, f"checking {folders['mix'].parent}", len(files)))


def _check(paths, fs):
    """Seconds of a mixture whose sources are all as they must be."""
    frames = None
    for path in paths.values():
        if not path.is_file():
            raise FileNotFoundError(f"no file {path} beside {paths['mix']}")
        try:
            info = soundfile.info(path)
        except soundfile.SoundFileError as error:
            raise ValueError(f"cannot read {path}: {error}") from error
        if info.samplerate != fs:
            raise ValueError(
                f"{path} has {info.samplerate} Hz, sample_rate is {fs}: "
                "resample the files or set sample_rate"
            )
        if info.channels != 1:
            raise ValueError(f"{path} has {info.channels} channels, not 1")
        if not info.frames:
            raise ValueError(f"{path} is empty")
        if frames not in (None, info.frames):
            raise ValueError(
                f"{path} has {info.frames} samples, {paths['mix']} {frames}"
            )
        frames = info.frames
    return frames / fs


def _write_csv(path, rows, columns, datapath):
    """One row per mixture, in SpeechBrain's columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        header = [
            f"{column}_{what}"
            for column in columns
            for what in ("wav", "wav_format", "wav_opts")
        ]
        writer.writerow(["ID", "duration", *header])
        for row in rows:
            cells = [row["ID"], row["duration"]]
            for column in columns:
                place = row[column].relative_to(datapath).as_posix()
                cells += [f"$data_root/{place}", "wav", None]
            writer.writerow(cells)
