"""Find the mixtures of a data set in one of the supported folder layouts.

A layout is recognized by its folders, never by the name of the data folder.
"""

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

from data_csv import Part, read_csvs, refuse_more


@dataclass(frozen=True)
class Layout:
    """Folders of a corpus: ``PART/MIXTURE/NAME.wav``, ``PART/SOURCE/NAME.wav``.

    Attributes
    ----------
    title : str
        Name of the corpus.
    mixtures : tuple of str
        Possible folders of mixtures; the first is the default task.
    sources : str
        Folders of sources; a star stands for the number of the speaker.
    noise : str
        Folder of the noise, or empty.
    train : tuple of str
        Possible training parts; the first that exists is used.
    valid, test : str
        The other parts.
    """

    title: str
    mixtures: tuple
    sources: str = "s*"
    noise: str = ""
    train: tuple = ("tr",)
    valid: str = "cv"
    test: str = "tt"


LAYOUTS = {
    "wsj0-mix": Layout("WSJ0-mix", ("mix",)),
    "wham": Layout(
        "WHAM!", ("mix_both", "mix_clean", "mix_single"), noise="noise"
    ),
    # The default task is SpeechBrain's: remove both noise and reverberation.
    "whamr": Layout(
        "WHAMR!",
        tuple(
            f"mix_{what}_{room}"
            for room in ("reverb", "anechoic")
            for what in ("both", "clean", "single")
        ),
        "s*_anechoic",
        "noise",
    ),
    "librimix": Layout(
        "LibriMix",
        ("mix_clean", "mix_both", "mix_single"),
        noise="noise",
        train=("train-360", "train-100"),
        valid="dev",
        test="test",
    ),
    "custom": Layout(
        "custom", ("mixture",), "source*", "", ("train",), "valid", "test"
    ),
}

CSV_PARTS = ("train.csv", "valid.csv", "test.csv")


def find_mixtures(
    datapath,
    n_spks,
    fs,
    layout="auto",
    mode="min",
    parts=None,
    mixture=None,
    sources=None,
):
    """List the mixtures of a data folder, without opening any.

    Arguments
    ---------
    datapath : str or Path
        The folder that contains ``wav8k`` (``wav16k`` for 16000 Hz), the parts
        themselves, or CSV files.
    n_spks : int
        Speakers per mixture.
    fs : int
        Sampling rate, Hz.
    layout : str
        ``auto``, a key of ``LAYOUTS``, or ``csv``.
    mode : str
        ``min``: mixtures are as long as their shortest source; ``max``: as
        their longest.
    parts : list of str, optional
        Folders or CSV files for training, validation and test.
    mixture : str, optional
        Folder of the mixtures.
    sources : str, optional
        Folders of the sources; a star stands for the number of the speaker.

    Returns
    -------
    str
        Description of what was found.
    list of Part
        Parts for training, validation and test.

    Raises
    ------
    FileNotFoundError
        If the folder, its layout or a part of it is missing.
    ValueError
        If an option is invalid, the layout is ambiguous, the parts have more or
        fewer speakers than ``n_spks``, or a CSV file lacks a column.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> for part in ("train", "valid", "test"):
    ...     for name in ("mixture", "source1", "source2"):
    ...         (folder / part / name).mkdir(parents=True)
    ...         (folder / part / name / "a.wav").touch()
    >>> text, parts = find_mixtures(folder, n_spks=2, fs=8000)
    >>> [part.name for part in parts], list(parts[0].rows[0])
    (['train', 'valid', 'test'], ['ID', 'mix', 's1', 's2'])
    """
    datapath = Path(datapath)
    if not datapath.is_dir():
        raise FileNotFoundError(f"no data folder {datapath}")
    if layout not in ("auto", "csv", *LAYOUTS):
        raise ValueError(
            f"layout {layout!r} is none of auto, csv, {', '.join(LAYOUTS)}"
        )
    if parts and len(parts) != 3:
        raise ValueError(
            f"parts must be those of training, validation and test, not {parts}"
        )
    roots = (datapath / f"wav{fs // 1000}k" / mode, datapath)
    if parts and str(parts[0]).endswith(".csv"):
        return read_csvs([datapath / part for part in parts], datapath, n_spks)
    if layout != "csv":
        train = parts[0] if parts else None
        root, known = _recognize(roots, layout, train, mixture)
        if known:
            options = (n_spks, parts, mixture, sources)
            return _list_folders(root, known, *options)
    files = _find_csvs(datapath, roots, mixture)
    if files and layout in ("auto", "csv", "librimix"):
        return read_csvs(files, datapath, n_spks)
    raise FileNotFoundError(_no_layout_message(datapath, roots[0]))


# --- folders ----------------------------------------------------------------


def _recognize(roots, layout, train, mixture):
    """Find the folder of the parts and its ``Layout``, or (None, None)."""
    for root in roots:
        found = {
            name: known
            for name, known in LAYOUTS.items()
            if layout in ("auto", name)
            and any(
                (root / part / folder).is_dir()
                for part in _expected(known.train, train, layout == name)
                for folder in _expected(known.mixtures, mixture, layout == name)
            )
        }
        if len(found) > 1:
            raise ValueError(
                f"{root} is laid out as {' and as '.join(found)}: choose with "
                "data_options: layout"
            )
        if found:
            return root, *found.values()
    return None, None


def _expected(known, asked, chosen):
    """Names, one of which must exist for a layout to be recognized."""
    if asked is None:
        return known
    return [asked] if chosen or asked in known else []


def _list_folders(root, layout, n_spks, parts, mixture, sources):
    if not parts:
        train = next(p for p in layout.train if (root / p).is_dir())
        parts = (train, layout.valid, layout.test)
    mixture = mixture or layout.mixtures[0]
    sources = sources or layout.sources
    alone = mixture.startswith("mix_single")
    if alone and n_spks > 1:
        raise ValueError(
            f"{root / parts[0] / mixture} holds one speaker, but num_spks is "
            f"{n_spks}: set num_spks: 1, or choose others with data_options: "
            "mixture"
        )
    columns = {"mix": mixture}
    for i in range(1, n_spks + 1):
        columns[f"s{i}"] = sources.replace("*", str(i))
    _check_folders(
        [root / part / name for part in parts for name in columns.values()],
        n_spks,
    )
    for part in parts:
        more = root / part / sources.replace("*", str(n_spks + 1))
        if more.is_dir() and not alone:
            refuse_more(more, n_spks)
    found = []
    for part in parts:
        noise = {}
        if "clean" not in mixture and layout.noise in os.listdir(root / part):
            noise["noise"] = layout.noise
        found.append(_list_part(root / part, columns | noise))
    text = (
        f"{layout.title} in {root}: mixtures in {mixture}, sources in {sources}"
    )
    return text, found


def _list_part(folder, columns):
    """List every mixture of a part, with the paths that its files must have."""
    names = {
        column: set(_wav_files(folder / place))
        for column, place in columns.items()
    }
    rows = []
    for name in sorted(names["mix"]):
        row = {"ID": os.path.splitext(name)[0]}
        for column, place in columns.items():
            row[column] = os.path.join(folder, place, name)
        rows.append(row)
    problems = [
        f"no file {folder / columns['mix'] / name} for {folder / place / name}:"
        " copy it, or remove the other"
        for column, place in columns.items()
        for name in sorted(names[column] - names["mix"])
    ]
    return Part(folder.name, rows, problems)


def _wav_files(folder):
    """Names of the wav files of a folder, without macOS metadata files."""
    return [
        name
        for name in os.listdir(folder)
        if name.lower().endswith(".wav") and not name.startswith("._")
    ]


def _check_folders(folders, n_spks):
    """Raise one error for all folders that are missing or have no wav file."""
    missing = [folder for folder in folders if not folder.is_dir()]
    text = f"no folder {{}} ({n_spks} speakers)"
    if not missing:
        missing = [folder for folder in folders if not _wav_files(folder)]
        text = "no wav file in {}"
    if missing:
        others = "".join(f", {folder}" for folder in missing[1:])
        near = missing[0].parent
        raise FileNotFoundError(
            f"{text.format(missing[0])}{others}: complete the data set, or "
            f"see num_spks and data_options; {near} holds: {_names(near)}"
        )


def _names(folder):
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else ()
    # A name that is not UTF-8 could not be printed.
    there = ", ".join(there).encode(errors="backslashreplace").decode()
    return there or "nothing"


def _no_layout_message(datapath, root):
    """Message that no layout was recognized: the folders tried, and found."""
    below = root.relative_to(datapath).as_posix()
    sought = [
        f"{below}/{known.train[0]}/{known.mixtures[0]} ({known.title})"
        for name, known in LAYOUTS.items()
        if name != "custom"
    ]
    others = sorted(datapath.glob("wav*k/m[ai][nx]"))
    return (
        f"{datapath} has neither {', '.join(sought)}, nor train/mixture "
        f"(custom), nor {CSV_PARTS[0]}; it holds: {_names(datapath)}"
        + (
            f"; for {others[0].relative_to(datapath).as_posix()} set "
            "sample_rate and data_options: mode"
            if others
            else ""
        )
    )


# --- CSV files --------------------------------------------------------------


def _find_csvs(datapath, roots, mixture):
    """CSV files of the data folder, or of LibriMix's metadata; or None."""
    libri = LAYOUTS["librimix"]
    mixture = mixture or libri.mixtures[0]
    own = [datapath / name for name in CSV_PARTS]
    if all(path.is_file() for path in own):
        return own
    for root, train in itertools.product(roots, libri.train):
        files = [
            root / "metadata" / f"mixture_{part}_{mixture}.csv"
            for part in (train, libri.valid, libri.test)
        ]
        if files[0].is_file():
            return files
    return None
