"""How the commands here write their figures."""

import csv


def write_csv(path, rows, columns=None):
    """Write rows, each a dict, as a CSV file: whole or not at all.

    Arguments
    ---------
    path : Path
        The folder it is in is made.
    rows : list of dict
    columns : tuple of str, optional
        Those of the first row by default; needed where there may be no row.
    """
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)
