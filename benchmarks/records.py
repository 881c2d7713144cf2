"""Helpers of the benchmarks: atomic files, CSV, memory use."""

import contextlib
import csv
import os
from pathlib import Path


@contextlib.contextmanager
def written_whole(path):
    """Yield a temporary path; it replaces ``path`` at the end.

    Arguments
    ---------
    path : Path
        Its folder is created if needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_csv(path, rows, columns=None):
    """Write rows, each a dict, as a CSV file.

    Arguments
    ---------
    path : Path
    rows : list of dict
    columns : tuple of str, optional
        Default: the keys of the first row. Needed if there may be no row.
    """
    with (
        written_whole(path) as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, columns or list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path):
    """Read columns and rows of a CSV file; both are empty without a file.

    Returns
    -------
    tuple of str, list of dict
    """
    if not path.exists():
        return (), []
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return tuple(rows.fieldnames or ()), list(rows)


def write_text(path, text):
    """Write a text file."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_figure(path, figure):
    """Write a matplotlib figure as PNG."""
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def megabytes(name):
    """Return a memory figure of this process in MB, e.g. VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def with_table(text, name, table):
    """Return a page with the table of a name replaced.

    Arguments
    ---------
    text : str
        The page; ``<!-- table: NAME -->`` and ``<!-- end of table -->`` stand
        around the table.
    name : str
    table : str
        Lines of Markdown.
    """
    start, end = f"<!-- table: {name} -->\n", "<!-- end of table -->\n"
    before, after = text.split(start)
    return before + start + table + end + after.split(end, 1)[1]
