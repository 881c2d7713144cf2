"""Sliding-window attention on torch's scaled_dot_product_attention.

torch's kernel has no window argument. Queries are therefore processed in
blocks, and each block attends to a slice of the keys under a mask. Memory is
linear in T, also where the scores of the blocks are held in memory.

Axes: B batch, T tokens, H heads, D head width.
"""

import contextlib
import functools
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# Queries per block, inside and at the edges of a recording. Short blocks
# compute few masked products. Each block at an edge is a separate call, so
# these blocks are longer.
BLOCK, EDGE = 64, 256
# Maximum T for one call with a T x T mask.
MOST_DENSE = 1024
# Most queries and keys of a block that runs as products, with its scores in
# memory, and most such blocks in a call without gradients.
MOST_HELD, MOST_BLOCKS = 1024, 64


def attend_window(q, k, v, left, right):
    """Attend within a window that is bounded on both sides.

    Arguments
    ---------
    q, k, v : torch.Tensor
        [B, T, H, D], T >= 1.
    left, right : int
        Keys seen before and after each query.

    Returns
    -------
    torch.Tensor
        [B, T, H, D].

    Example
    -------
    >>> q, k, v = torch.randn(3, 2, 500, 4, 16).unbind(0)
    >>> attend_window(q, k, v, left=8, right=0).shape
    torch.Size([2, 500, 4, 16])
    """
    # An exported graph may not branch on the length.
    if torch.compiler.is_exporting():
        return _attend_padded(q, k, v, left, right)
    T = q.shape[1]
    # If the window hides few keys, one call with a mask over all keys is faster
    # than many small calls.
    if T <= min(left + right + 2 * BLOCK, MOST_DENSE) and not q.is_cuda:
        # Rounded up, so that many lengths share one cached mask.
        size = -(-T // EDGE) * EDGE
        mask = band(size, size, 0, left, right, q.dtype, q.device)
        return run_kernel(q, k, v, attn_mask=mask[:T, :T])
    rows = zip(q.split(1), k.split(1), v.split(1))
    return torch.cat([_attend_row(*row, left, right) for row in rows])


def _attend_row(q, k, v, left, right):
    """Attend with a batch of one.

    One call covers all blocks whose windows lie within the recording; they
    share a mask, and their keys are overlapping views without a copy. Blocks
    at the edges take exact slices of the keys. Padding the keys there would
    create rows that see no key, and their gradients would be NaN.
    """
    T = q.shape[1]
    left, right = min(left, T), min(right, T)
    mask = band(EDGE, left + EDGE + right, left, left, right, q.dtype, q.device)
    first = min(-(-left // BLOCK) * BLOCK, T)
    last = max(first, (T - right) // BLOCK * BLOCK)

    def _edge(start, end):
        stop = min(start + EDGE, end)
        begin, until = max(0, start - left), min(T, stop + right)
        shift = left - start
        seen = mask[: stop - start, begin + shift : until + shift]
        keys, values = k[:, begin:until], v[:, begin:until]
        return run_kernel(q[:, start:stop], keys, values, attn_mask=seen)

    parts = [_edge(start, first) for start in range(0, first, EDGE)]
    if last > first:
        span = left + BLOCK + right
        # [1, T, H, D] -> [blocks, span, H, D], overlapping
        spans = [
            x[0, first - left : last + right]
            .unfold(0, span, BLOCK)
            .movedim(3, 1)
            for x in (k, v)
        ]
        queries = q[0, first:last].unflatten(0, (-1, BLOCK))
        out = run_kernel(queries, *spans, attn_mask=mask[:BLOCK, :span])
        parts.append(out.flatten(0, 1)[None])
    parts += [_edge(start, T) for start in range(last, T, EDGE)]
    return torch.cat(parts, 1)


def _attend_padded(q, k, v, left, right):
    """Attend without a branch on T, by padding all blocks to one shape."""
    B, T = q.shape[:2]
    count = (T + BLOCK - 1) // BLOCK
    rest = count * BLOCK - T
    span = left + BLOCK + right
    starts = BLOCK * torch.arange(count, device=q.device)
    place = starts[:, None] + torch.arange(span, device=q.device)
    queries = F.pad(q, (0, 0, 0, 0, 0, rest))
    queries = queries.unflatten(1, (count, BLOCK)).flatten(0, 1)
    keys, values = (
        F.pad(x, (0, 0, 0, 0, left, rest + right))[:, place].flatten(0, 1)
        for x in (k, v)
    )
    hidden = _hidden(BLOCK, span, left, left, right, q.device)
    absent = (place < left) | (place >= left + T)  # [count, span]
    # Finite, because a padded query may see no key and must not become NaN.
    lowest = torch.finfo(q.dtype).min / 2
    mask = torch.where(hidden | absent[:, None], lowest, 0.0).to(q.dtype)
    mask = mask.expand(B, -1, -1, -1).flatten(0, 1).unsqueeze(1)
    out = run_kernel(queries, keys, values, attn_mask=mask)
    return out.unflatten(0, (B, count)).flatten(1, 2)[:, :T]


def run_kernel(q, k, v, **options):
    """Call torch's scaled_dot_product_attention.

    Arguments
    ---------
    q, k, v : torch.Tensor
        [B, T, H, D]; k and v may have another T than q.
    **options
        Keyword arguments of torch's ``scaled_dot_product_attention``.

    Returns
    -------
    torch.Tensor
        [B, T, H, D].

    Raises
    ------
    RuntimeError
        On CUDA, if only a kernel that builds the T x T matrix could run.
    """
    width = q.shape[3]
    if missing := _missing_width(q):
        # Zero padding does not change the products.
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
        options["scale"] = width**-0.5
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if _runs_as_products(q, k):
        out = products(q, k, v, **options)
    else:
        with _no_dense_kernel(q):
            out = F.scaled_dot_product_attention(q, k, v, **options)
    return out.transpose(1, 2)[..., :width]


def _runs_as_products(q, k):
    """Whether a block is faster with its scores in memory.

    In bfloat16 on CPU, a training step with torch's kernel takes longer than
    with two matrix products and a softmax: see benchmarks/training_step.py.
    """
    # An exported graph may not branch on the length.
    if q.device.type != "cpu" or torch.compiler.is_exporting():
        return False
    small = max(q.shape[2], k.shape[2]) <= MOST_HELD
    # A long recording in one call would hold the scores of all its blocks.
    few = len(q) <= MOST_BLOCKS or torch.is_grad_enabled()
    return small and few and q.dtype == torch.bfloat16


def products(q, k, v, attn_mask=None, is_causal=False):
    """Attend by two matrix products, with the scores in memory.

    Arguments
    ---------
    q, k, v : torch.Tensor
        [B, H, T, D]; k and v may have another T than q.
    attn_mask : torch.Tensor, optional
        Added to the scores, [queries, keys].
    is_causal : bool
        Hide the keys after each query.

    Returns
    -------
    torch.Tensor
        [B, H, T, D].

    Example
    -------
    >>> products(*torch.randn(3, 2, 4, 50, 16).unbind(0)).shape
    torch.Size([2, 4, 50, 16])
    """
    scores = q * q.shape[3] ** -0.5 @ k.mT
    if is_causal:
        rows, columns = scores.shape[2:]
        attn_mask = band(rows, columns, 0, columns, 0, q.dtype, q.device)
    if attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(3) @ v


def _missing_width(q):
    """Padding of D: with a mask, CUDA kernels need a multiple of 8."""
    return -q.shape[3] % 8 if q.is_cuda else 0


def _no_dense_kernel(q):
    """On CUDA, make torch raise instead of building the T x T matrix."""
    if not q.is_cuda:
        return contextlib.nullcontext()
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    )


def band(rows, columns, offset, left, right, dtype, device):
    """Additive attention mask of a window.

    The last masks are cached, because all layers of a network use the same few.

    Arguments
    ---------
    rows, columns : int
        Numbers of queries and keys.
    offset : int
        Query i has the position of key ``i + offset``.
    left, right : int
        Keys seen before and after each query.
    dtype, device
        Of the mask.

    Returns
    -------
    torch.Tensor
        [rows, columns], 0 inside the window and -inf outside.

    Example
    -------
    >>> band(2, 4, 1, 1, 0, torch.float32, torch.device("cpu"))
    tensor([[0., 0., -inf, -inf],
            [-inf, 0., 0., -inf]])
    """
    # A compiled graph may not hold a tensor that another graph created.
    make = _band if torch.compiler.is_compiling() else _cached_band
    return make(rows, columns, offset, left, right, dtype, device)


def _band(rows, columns, offset, left, right, dtype, device):
    # A tensor created in inference mode could not be used in training.
    with torch.inference_mode(False):
        mask = torch.zeros(rows, columns, dtype=dtype, device=device)
        hidden = _hidden(rows, columns, offset, left, right, device)
        return mask.masked_fill(hidden, -math.inf)


_cached_band = functools.lru_cache(maxsize=4)(_band)


def _hidden(rows, columns, offset, left, right, device):
    """Booleans [rows, columns], True at the keys that a window hides."""
    place = torch.arange(rows, device=device)[:, None] + offset
    ahead = torch.arange(columns, device=device) - place
    return (ahead < -left) | (ahead > right)


def stream_mask(queries, left, seen, like):
    """Additive attention mask of the next queries of a stream.

    The keys are those of the last ``left`` tokens, followed by those of the n
    new tokens. At the start of a stream some of the ``left`` do not exist yet;
    the mask hides them.

    Arguments
    ---------
    queries : int
        n, new tokens.
    left : int
        Keys seen to the left of each query.
    seen : int or torch.Tensor
        Tokens of the stream so far; a tensor [1] in an exported graph.
    like : torch.Tensor
        Tensor whose dtype and device the mask gets.

    Returns
    -------
    torch.Tensor
        [n, left + n], 0 at visible keys and -inf at hidden ones.

    Example
    -------
    >>> stream_mask(2, left=3, seen=1, like=torch.zeros(1))
    tensor([[-inf, -inf, 0., 0., -inf],
            [-inf, -inf, 0., 0., 0.]])
    """
    columns = left + queries
    mask = band(queries, columns, left, left, 0, like.dtype, like.device)
    if isinstance(seen, int) and seen >= left:
        return mask
    absent = torch.arange(columns, device=like.device) < left - seen
    return mask.masked_fill(absent, -math.inf)
