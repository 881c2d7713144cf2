"""Weights as files: read without running code, given to a module strictly."""

from pathlib import Path

import torch

MEND = "copy it again from where it is whole, or pack its training again"
OF_ONE_MODEL = "give both of the same model"


def load_weights(module, path):
    """Give a module the weights of a checkpoint, all or none.

    Arguments
    ---------
    module : torch.nn.Module
        On any device.
    path : str or Path
        The checkpoint, NAME.ckpt.

    Raises
    ------
    OSError
        When it cannot be read.
    ValueError
        When it holds no weights, or not this module's.

    Example
    -------
    >>> path = getfixture("tmp_path") / "encoder.ckpt"
    >>> torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    >>> load_weights(torch.nn.Linear(2, 3), path)
    """
    fit_weights(module, read_weights(path), path)


def read_weights(path):
    """A state dict on the CPU; a checkpoint runs no code."""
    check_readable(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # It was readable: what fails now is the unzipper or the unpickler.
    except Exception as error:
        raise ValueError(
            f"{path} is cut, or no checkpoint of weights: {MEND}"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor)
        for key, value in state.items()
    ):
        raise ValueError(f"{path} holds no weights by name: {MEND}")
    return state


def fit_weights(module, state, path, mend=OF_ONE_MODEL):
    """Give a module a state dict that was read from a path, all or none."""
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
        # As they will be: what is finite here may be too large for a half.
        state = {key: value.to(own[key]) for key, value in state.items()}
        broken = [key for key, value in state.items() if not _is_finite(value)]
    # Quantized, without storage, and what else a tensor can be.
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
    """Names of the weights in which a state dict is another network's.

    Arguments
    ---------
    state : dict
        Loaded from a checkpoint.
    module : torch.nn.Module
        What it should fit.

    Returns
    -------
    list of str
        Sorted: missing, unknown or of another shape.

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
    """Tell what is wrong with a file in words, before it is parsed."""
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
    """What an exception says, in one line of moderate length."""
    parts = [error] if isinstance(error, OSError) else error.args
    said = " ".join(": ".join(map(str, parts)).split()) or repr(error)
    return said if len(said) < 300 else f"{said[:300]} ..."
