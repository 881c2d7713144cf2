"""Locate files: in the package, in a folder, on the hub or at a URL."""

import filecmp
import re
from pathlib import Path

from speechbrain_flashformer.inference.weights import one_line

HUB = "hf:"
YAML_FILE = "hyperparams.yaml"


def built_in_model(streaming=False):
    """Return the folder of the model of this package.

    Arguments
    ---------
    streaming : bool
        Whether to return the causal model, for live audio.

    Returns
    -------
    Path

    Raises
    ------
    FileNotFoundError
        When this version has no such model.

    Example
    -------
    >>> built_in_model(streaming=True).name
    'pretrained_streaming'
    """
    name = "pretrained_streaming" if streaming else "pretrained"
    folder = Path(__file__).parent.parent / name
    if not (folder / YAML_FILE).is_file():
        kind = "streaming model" if streaming else "model"
        raise FileNotFoundError(
            f"this version comes without a pretrained {kind}: give one as "
            "--model, a folder made by 'flashformer pack' or a model on a hub "
            "as hf:OWNER/NAME"
        )
    return folder


def find_file(
    name,
    source,
    savedir=None,
    local_strategy=None,
    fetch_config=None,
):
    """Return the path of a file of a model; fetch it from the hub if needed.

    Arguments
    ---------
    name : str
        Name of the file.
    source : str or Path
        A model folder, whose files are used in place, or ``hf:OWNER/NAME``.
    savedir : str or Path, optional
        Folder for a link to, or a copy of, a file from the hub. An existing
        link there is replaced, an existing file is not.
    local_strategy : LocalStrategy, optional
        Whether savedir gets a link (default) or a copy.
    fetch_config : FetchConfig, optional
        Passed to SpeechBrain's ``fetch``.

    Returns
    -------
    Path

    Raises
    ------
    FileNotFoundError
        When there is no such folder, model or file.
    NotADirectoryError
        When source is a file.
    FileExistsError
        When savedir has a different file of that name.
    ValueError
        When source has ``hf:`` but is not ``hf:OWNER/NAME``.

    Example
    -------
    >>> find_file(YAML_FILE, built_in_model()).name
    'hyperparams.yaml'
    """
    if not str(source).startswith(HUB):
        folder = Path(source)
        if folder.is_file():
            raise NotADirectoryError(
                f"{folder} is a file: give the model folder that it is in"
            )
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no model folder {folder}: give one made by 'flashformer "
                f"pack', or a model on a hub as {HUB}OWNER/NAME"
            )
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no {name} in {folder}: is it a folder made by 'flashformer "
                "pack'?"
            )
        return folder / name
    owner_name = str(source).removeprefix(HUB)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", owner_name):
        raise ValueError(
            f"{source} is not the name of a model on a hub: give it as "
            f"{HUB}OWNER/NAME"
        )
    from speechbrain.utils import fetching

    remote = fetching.FetchSource(fetching.FetchFrom.HUGGING_FACE, owner_name)
    fetch_config = fetch_config or fetching.FetchConfig()
    try:
        path = fetching.fetch(name, remote, fetch_config=fetch_config)
    # Offline, unknown or private: the hub raises a different exception for
    # each.
    except Exception as error:
        raise FileNotFoundError(
            f"cannot fetch {name} of {source}: {one_line(error)}"
        ) from error
    if savedir is None:
        return path
    kept = Path(savedir) / name
    if kept.is_file() and not kept.is_symlink():
        if not filecmp.cmp(path, kept, shallow=False):
            raise FileExistsError(
                f"{kept} is another file and is not replaced: choose another "
                "savedir"
            )
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    return fetching.link_with_strategy(
        path, kept, local_strategy or fetching.LocalStrategy.SYMLINK
    )


def local_file(path, savedir=None):
    """Return a path as it is, or download a URL into savedir.

    Arguments
    ---------
    path : str or Path
        A path or a URL.
    savedir : str or Path, optional
        Folder for the download; required for a URL.

    Returns
    -------
    str or Path

    Raises
    ------
    ValueError
        When path is a URL and savedir is not given.

    Example
    -------
    >>> local_file("meeting.wav")
    'meeting.wav'
    """
    if "://" not in str(path):
        return path
    if savedir is None:
        raise ValueError(f"give a savedir for {path}, to keep the file in")
    from speechbrain.utils.fetching import FetchConfig, LocalStrategy, fetch

    source, name = str(path).rsplit("/", 1)
    return fetch(
        name,
        source=source,
        savedir=savedir,
        local_strategy=LocalStrategy.SYMLINK,
        fetch_config=FetchConfig(overwrite=True),
    )
