"""Frames or tokens run piece by piece, where no gradient needs them all.

Inner values of a long recording would fall out of the cache, and need much
memory.
"""

import torch

PIECE = 4096  # frames or tokens


def pieces(length):
    """The slices of so many frames that are run one after another.

    With gradients, and in a compiled or exported graph, which is for all
    lengths, there is but one.

    Example
    -------
    >>> with torch.no_grad():
    ...     pieces(6000)
    [slice(0, 4096, None), slice(4096, 6000, None)]
    >>> pieces(6000)
    [slice(None, None, None)]
    """
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return [slice(None)]
    # The length is looked at first, as torch.jit.trace checks a trace with
    # gradients by one without, and what is looked at is in the trace.
    if length <= PIECE or torch.is_grad_enabled():
        return [slice(None)]
    starts = range(0, length, PIECE)
    return [slice(start, min(start + PIECE, length)) for start in starts]


def in_pieces(function, length, reach=(0, 0)):
    """``function(frames)`` [B, n, C] of each of the ``pieces``, in a row.

    With a reach each is given so many frames more to the (left, right), which
    are cut off what comes out: a filter gives what it gives for the whole.

    Example
    -------
    >>> x = torch.tensor([[[-1.0], [2.0]]])
    >>> in_pieces(lambda frames: x[:, frames].abs(), 2).flatten()
    tensor([1., 2.])
    """
    spans, whole = pieces(length), None
    if len(spans) == 1:
        return function(spans[0])
    for span in spans:
        first = max(0, span.start - reach[0])
        part = function(slice(first, min(span.stop + reach[1], length)))
        part = part[:, span.start - first : span.stop - first]
        # Not a list of parts: they would be in the way of larger tensors.
        if whole is None:
            whole = part.new_empty(len(part), length, part.shape[2])
        whole[:, span] = part
    return whole
