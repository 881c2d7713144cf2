"""Where files are: in the package, a folder, on a hub or at a URL."""

import filecmp
import re
from pathlib import Path

from speechbrain_flashformer.inference.weights import one_line

HUB = "hf:"
YAML_FILE = "hyperparams.yaml"


def built_in_model(streaming=False):
    """The folder of the model that comes with the package.

    Arguments
    ---------
    streaming : bool
        Whether it is that for live sound, which is causal.

    Raises
    ------
    FileNotFoundError
        When this version has none.
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
    """The path of one file of a model, fetched if the model is on a hub.

    What is in a folder stays there. Of a hub savedir, if given, gets a link
    or, by its local_strategy, a copy; a link there is replaced, a file is
    not. Arguments are those of ``FlashFormerSeparation.from_hparams``.

    Raises
    ------
    FileNotFoundError
        When there is no such folder, model or file.
    FileExistsError
        When savedir has another file of that name.
    ValueError
        When source is no name of a model.
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
            f"{source} is no model on a hub: give it as {HUB}OWNER/NAME"
        )
    from speechbrain.utils import fetching

    remote = fetching.FetchSource(fetching.FetchFrom.HUGGING_FACE, owner_name)
    fetch_config = fetch_config or fetching.FetchConfig()
    try:
        path = fetching.fetch(name, remote, fetch_config=fetch_config)
    # Offline, unknown, private: the hub has an exception for each.
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
    """A path on this machine, fetched into savedir when it is a URL."""
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
