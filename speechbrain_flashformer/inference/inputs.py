"""Find the recordings that a command line names, and their output paths."""

import glob
import os
import re
import shutil
import sys
from pathlib import Path

import soundfile

from speechbrain_flashformer.inference.files import was_separated
from speechbrain_flashformer.inference.listing import files_below

# Formats that need more than the file, or whose suffix usually means another
# format.
NOT_BY_SUFFIX = {"RAW", "MAT4", "MAT5", "SD2"}
MORE_SUFFIXES = (
    ".8svx .aif .aifc .bwf .iff .mp1 .mp2 .mpga .oga .opus .sf .snd .sph .wave"
)
AUDIO_SUFFIXES = {
    f".{name.lower()}"
    for name in soundfile.available_formats()
    if name not in NOT_BY_SUFFIX
} | set(MORE_SUFFIXES.split())
MAX_LISTED = 5  # file names in a note


def find_inputs(words, out, folder):
    """Find the recordings that a command line names.

    Arguments
    ---------
    words : list of str
        Files, folders, globs, or - for standard input.
    out : Path
        Output folder.
    folder : Path
        Folder for copies of pipes, which can be read only once.

    Returns
    -------
    tuple
        The recordings, a list of (path, output folder, name); error messages
        and notes on skipped files, both lists of str.

    Raises
    ------
    ValueError
        When a source would overwrite a recording or another source, or when
        several processes would have to share a pipe.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> soundfile.write(folder / "a.wav", [0.0] * 80, 8000)
    >>> found, _, _ = find_inputs([str(folder)], Path("out"), folder)
    >>> [(path.name, out.as_posix(), name) for path, out, name in found]
    [('a.wav', 'out', 'a')]
    """
    found, failures, notes = [], [], []
    for word in words:
        paths = [Path(word)]
        # The name of an existing file is not a pattern, even with brackets.
        if word != "-" and not paths[0].exists():
            matching = map(Path, sorted(glob.glob(word, recursive=True)))
            paths = _without_sources(list(matching), notes) or paths
        for path in paths:
            if word == "-":
                found.append(
                    (_copy_pipe(sys.stdin.buffer, folder, path), out, "stdin")
                )
            elif path.is_dir():
                inside = _search(path, out, notes)
                if not inside:
                    failures.append(f"no audio file in {path}")
                found += [
                    (file, out / file.parent.relative_to(path), file.stem)
                    for file in inside
                ]
            elif path.exists() and not path.is_file():
                with path.open("rb") as pipe:
                    copy = _copy_pipe(pipe, folder, path)
                found.append((copy, out, path.stem))
            else:
                found.append((path, out, path.stem))
    _check_places(found)
    return list(dict.fromkeys(found)), failures, notes


def _search(folder, out, notes):
    """Find the recordings in a folder and its subfolders."""
    # An output folder inside it holds sources, not recordings.
    below = folder.resolve() in out.resolve().parents
    files = [
        file
        for file in files_below(folder)
        if not file.name.startswith(".")
        and not (below and out.resolve() in file.resolve().parents)
    ]
    audio = [file for file in files if file.suffix.lower() in AUDIO_SUFFIXES]
    others = [file.name for file in files if file not in set(audio)]
    if others:
        notes.append(
            f"passed over in {folder}, as libsndfile reads no such files: "
            f"{_some(others)}"
        )
    return _without_sources(audio, notes)


def _without_sources(paths, notes):
    """Remove the paths of sources whose recording is among the paths."""
    stems = {path.stem for path in paths}
    kept, sources = [], []
    for path in paths:
        name = re.fullmatch(r"(.+?)(_c[1-9]\d*)?_s[1-9]\d*", path.stem)
        is_source = (
            name
            and stems & {name[1], name[1] + (name[2] or "")}
            and was_separated(path)
        )
        (sources if is_source else kept).append(path)
    if sources:
        notes.append(
            "passed over, as they were separated from others here: "
            + _some([path.name for path in sources])
        )
    return kept


def _some(names):
    """List the first names and count the others."""
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" * (more > 0))


def _check_places(found):
    """Raise a ValueError if an output would overwrite another file."""
    taken = {}
    for path, folder, name in found:
        other = taken.setdefault((folder.resolve(), name), path)
        if other.resolve() != path.resolve():
            raise ValueError(
                f"{other} and {path} would both be written as "
                f"{folder / name}_s1.wav: separate them into different folders"
            )
    for path, _, _ in found:
        name = re.fullmatch(r"(.+?)(_c[1-9]\d*)?_s[1-9]\d*", path.stem)
        if not name or path.suffix != ".wav":
            continue
        for stem in (name[1], name[1] + (name[2] or "")):
            if other := taken.get((path.resolve().parent, stem)):
                raise ValueError(
                    f"a source of {other} would be written over the recording "
                    f"{path}: separate into another folder"
                )


def _copy_pipe(pipe, folder, path):
    """Copy a pipe into a file in a folder, because readers must seek."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"{path} can be read once and cannot be shared by several "
            "processes: make it a file"
        )
    number = len(list(folder.iterdir()))
    copy = folder / str(number) / (path.name if path.name != "-" else "stdin")
    copy.parent.mkdir()
    with copy.open("wb") as file:
        shutil.copyfileobj(pipe, file)
    return copy
