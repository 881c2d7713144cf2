"""The files in a folder, listed alike for training and separation."""


def files_below(folder, above=()):
    """List the files in a folder and its subfolders, also behind links.

    Arguments
    ---------
    folder : Path
        Where to look.
    above : tuple of Path
        The folders that contain it; a link to one of them is not followed.

    Returns
    -------
    list of Path
        Sorted.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> (folder / "a.wav").touch()
    >>> [path.name for path in files_below(folder)]
    ['a.wav']
    """
    found, above = [], (*above, folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.is_file():
            found.append(path)
        elif path.is_dir() and path.resolve() not in above:
            found += files_below(path, above)
    return found
