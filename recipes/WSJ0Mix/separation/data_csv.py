"""Read CSV files of mixtures, with the columns of SpeechBrain or LibriMix."""

import os
from dataclasses import dataclass, field

from speechbrain_flashformer.training.data import read_table

# Columns of name, mixture, sources (by number) and noise.
COLUMNS = ("ID", "mix_wav", "s{}_wav", "noise_wav")
LIBRI_COLUMNS = ("mixture_ID", "mixture_path", "source_{}_path", "noise_path")


@dataclass
class Part:
    """One part of a data set.

    Attributes
    ----------
    name : str
        Name of the part.
    rows : list of dict
        Mixtures sorted by ``ID``, each with the paths ``mix``, ``s1``, ``s2``,
        ... and, optionally, ``noise``.
    problems : list of str
        Problems of the part, each with its remedy.
    """

    name: str
    rows: list
    problems: list = field(default_factory=list)


def read_csvs(files, datapath, n_spks):
    """Read CSV files.

    Arguments
    ---------
    files : list of Path
        One file per part.
    datapath : Path
        The data folder, which replaces ``$data_root``.
    n_spks : int
        Speakers per mixture.

    Returns
    -------
    str
        Description of what was read.
    list of Part
        One part per file.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If a file is not CSV, lacks a column, has no rows or has more speakers.
    """
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"no file {', '.join(missing)}")
    text = f"CSV files: {', '.join(map(str, files))}"
    return text, [_read_csv(path, datapath, n_spks) for path in files]


def _read_csv(path, datapath, n_spks):
    """Read one CSV file into a ``Part``."""
    header, lines = read_table(path)
    libri = "mixture_path" in header
    name, mix, source, noise = LIBRI_COLUMNS if libri else COLUMNS
    columns = {"ID": name, "mix": mix}
    for i in range(1, n_spks + 1):
        columns[f"s{i}"] = source.format(i)
    missing = [column for column in columns.values() if column not in header]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)} ({n_spks} speakers); "
            f"it has: {', '.join(header) or 'none'}"
        )
    more = source.format(n_spks + 1)
    if more in header and any(line[more] for line in lines.values()):
        refuse_more(f"column {more} of {path}", n_spks)
    if not lines:
        raise ValueError(f"{path} has no rows")
    if noise in header and all(line[noise] for line in lines.values()):
        columns["noise"] = noise

    part, taken = Part(path.stem, []), set()
    for number, line in lines.items():
        row = {column: line[name] for column, name in columns.items()}
        empty = [columns[column] for column in row if not row[column]]
        if empty:
            part.problems.append(f"{path}, line {number}: no {empty[0]}")
        elif row["ID"] in taken:
            part.problems.append(
                f"{path}, line {number}: the ID {row['ID']} was there before"
            )
        else:
            taken.add(row["ID"])
            part.rows.append(_resolve(row, path.parent, datapath))
    part.rows.sort(key=lambda row: row["ID"])
    return part


def _resolve(row, beside, datapath):
    """Resolve paths relative to ``$data_root`` or to the folder of the CSV."""
    found = {"ID": row["ID"]}
    for column in list(row)[1:]:
        place = row[column].removeprefix("$data_root")
        if place == row[column]:
            found[column] = os.path.join(beside, place)
        else:
            found[column] = os.path.join(datapath, place.lstrip("/\\"))
    return found


def refuse_more(what, n_spks):
    """Raise the error for mixtures with more speakers than ``num_spks``.

    Arguments
    ---------
    what : str or Path
        The folder or column of the additional speaker.
    n_spks : int
        Speakers per mixture.

    Raises
    ------
    ValueError
        Always.
    """
    raise ValueError(
        f"{what} exists, but num_spks is {n_spks}: the mixtures would hold a "
        "voice that is not a target"
    )
