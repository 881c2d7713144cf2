"""Process long inputs piece by piece when no gradient is needed.

The activations of a long recording do not fit into the CPU's cache, and they
need much memory.
"""

import torch

PIECE = 4096  # maximum size of a piece, in frames or tokens


def pieces(length):
    """Slices that divide frames or tokens into pieces of at most ``PIECE``.

    There is one slice with gradients, and in a compiled or exported graph,
    which must fit all lengths.

    Arguments
    ---------
    length : int
        Number of frames or tokens.

    Returns
    -------
    list of slice
        The pieces, in order.

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
    # The length is compared first, because the comparison becomes part of a
    # trace, and torch.jit.trace checks a trace with gradients against one
    # without: both must contain it.
    if length <= PIECE or torch.is_grad_enabled():
        return [slice(None)]
    starts = range(0, length, PIECE)
    return [slice(start, min(start + PIECE, length)) for start in starts]


def in_pieces(function, length, reach=(0, 0)):
    """Apply a function to each of the ``pieces`` and concatenate the results.

    Arguments
    ---------
    function : callable
        Takes a slice of n frames, returns a tensor [B, n, C].
    length : int
        T, number of frames.
    reach : tuple of int
        Receptive field of the function, in frames to the (left, right). Each
        piece is extended by as many frames, and the extension is cut off the
        output: the result equals that of one call.

    Returns
    -------
    torch.Tensor
        [B, T, C].

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
        # Written in place: a list of parts would fragment the memory.
        if whole is None:
            whole = part.new_empty(len(part), length, part.shape[2])
        whole[:, span] = part
    return whole
