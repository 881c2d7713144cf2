"""Read checkpoints without running code, and load them strictly."""

from pathlib import Path

import torch

# Remedies in error messages.
MEND = "copy it again from an intact source, or pack the training run again"
OF_ONE_MODEL = "use the yaml and the weights of the same model"


def load_weights(module, path):
    """Load a checkpoint into a module, all weights or none.

    Arguments
    ---------
    module : torch.nn.Module
        On any device.
    path : str or Path
        The checkpoint, NAME.ckpt.

    Raises
    ------
    OSError
        When the file cannot be read.
    ValueError
        When the file has no weights, or those of another module, or a weight
        is not finite.

    Example
    -------
    >>> path = getfixture("tmp_path") / "encoder.ckpt"
    >>> torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    >>> load_weights(torch.nn.Linear(2, 3), path)
    """
    fit_weights(module, read_weights(path), path)


def read_weights(path):
    """Read a state dict onto the CPU, without running code from the file.

    Arguments
    ---------
    path : str or Path
        The checkpoint.

    Returns
    -------
    dict of torch.Tensor
        By name.

    Raises
    ------
    OSError
        When the file cannot be read.
    ValueError
        When the file is broken or holds no state dict.
    """
    check_readable(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # The file is readable: any error now comes from unzipping or unpickling.
    except Exception as error:
        raise ValueError(
            f"{path} is incomplete, or not a checkpoint of weights: {MEND}"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor)
        for key, value in state.items()
    ):
        raise ValueError(f"{path} has no weights by name: {MEND}")
    return state


def fit_weights(module, state, path, mend=OF_ONE_MODEL):
    """Load a state dict into a module, all weights or none.

    Arguments
    ---------
    module : torch.nn.Module
        On any device.
    state : dict of torch.Tensor
        By name.
    path : str or Path
        Where the state dict is from, for messages.
    mend : str
        Remedy in the message if the weights are those of another module.

    Raises
    ------
    ValueError
        When names, shapes or types differ, or a weight is not finite.
    """
    own = module.state_dict()
    wrong = mismatched(state, module) or [
        key
        for key, value in state.items()
        if value.layout != torch.strided
        or value.is_complex()
        or value.is_floating_point() != own[key].is_floating_point()
    ]
    if wrong:
        raise ValueError(
            f"{path} does not fit the {Path(path).stem} of the yaml in "
            f"{len(wrong)} weights, such as {wrong[0]}: {mend}"
        )
    try:
        # Check them in the type of the module: a finite float32 can be
        # infinite in half precision.
        state = {key: value.to(own[key]) for key, value in state.items()}
        broken = [key for key, value in state.items() if not _is_finite(value)]
    # Quantized tensors, tensors without storage, and the like.
    except Exception as error:
        raise ValueError(f"{path}: {one_line(error)}: {MEND}") from error
    if broken:
        raise ValueError(
            f"{path} has weights that are not finite, such as {broken[0]}: "
            "pack another checkpoint"
        )
    module.load_state_dict(state)


def _is_finite(value):
    return value.isfinite().all().item()


def mismatched(state, module):
    """Names of the weights that differ between a state dict and a module.

    Arguments
    ---------
    state : dict
        Loaded from a checkpoint.
    module : torch.nn.Module
        The module that it should fit.

    Returns
    -------
    list of str
        Sorted names of weights that are missing, unknown or of another shape.

    Example
    -------
    >>> state = torch.nn.Linear(2, 3).state_dict()
    >>> mismatched(state, torch.nn.Linear(4, 3, bias=False))
    ['bias', 'weight']
    """
    shapes, own = (
        {name: weight.shape for name, weight in weights.items()}
        for weights in (state, module.state_dict())
    )
    return sorted({name for name, _ in shapes.items() ^ own.items()})


def check_readable(path):
    """Raise a clear error for an unreadable file, before it is parsed.

    Arguments
    ---------
    path : str or Path
        The file.

    Raises
    ------
    OSError
        When the file cannot be opened.
    ValueError
        When the file is empty or a pointer of Git LFS.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(40)
    except OSError as error:
        raise type(error)(
            error.errno, f"cannot read it ({error.strerror})", str(path)
        ) from error
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a pointer of Git LFS: fetch the file itself with 'git "
            "lfs pull'"
        )
    if not head:
        raise ValueError(f"{path} is empty: {MEND}")


def one_line(error):
    """Format the message of an exception as one line of limited length.

    Arguments
    ---------
    error : Exception
        Any.

    Returns
    -------
    str

    Example
    -------
    >>> one_line(ValueError("one\\n  two"))
    'one two'
    """
    parts = [error] if isinstance(error, OSError) else error.args
    said = " ".join(": ".join(map(str, parts)).split()) or repr(error)
    return said if len(said) < 300 else f"{said[:300]} ..."
