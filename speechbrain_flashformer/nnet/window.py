"""Attention through a sliding window, on torch's own kernel alone.

torch's kernel has no window: queries go in blocks, and each block sees a slice
of keys under a mask. Memory is linear in T.

Axes: B batch, T tokens, H heads, D head width.
"""

import contextlib
import functools
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# Queries of a block, and of one at an edge. Short blocks compute few products
# that the mask hides; edges are calls of their own, which should be few.
BLOCK, EDGE = 64, 256
# Most tokens whose mask is a square.
MOST_DENSE = 1024


def attend_window(q, k, v, left, right):
    """Attention through a window that is bounded on both sides.

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
    # An exported graph is for all lengths, and may not branch on this one.
    if torch.compiler.is_exporting():
        return _attend_padded(q, k, v, left, right)
    T = q.shape[1]
    # A window that hides little is a mask on all keys, in one call for all
    # rows: many small calls cost more than the products it hides.
    if T <= min(left + right + 2 * BLOCK, MOST_DENSE) and not q.is_cuda:
        # One mask for many lengths.
        size = -(-T // EDGE) * EDGE
        mask = band(size, size, 0, left, right, q.dtype, q.device)
        return run_kernel(q, k, v, attn_mask=mask[:T, :T])
    rows = zip(q.split(1), k.split(1), v.split(1))
    return torch.cat([_attend_row(*row, left, right) for row in rows])


def _attend_row(q, k, v, left, right):
    """Attend with a batch of one.

    The blocks whose keys all exist go in one call under one mask, their keys
    being overlapping views (no copy). Those at the edges take exact slices:
    padding would make rows that see nothing, whose gradients are NaN.
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
    """Attend without a branch on T: all blocks are padded to be alike."""
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
    # Finite: a padded query may see nothing at all, and must not give NaN.
    lowest = torch.finfo(q.dtype).min / 2
    mask = torch.where(hidden | absent[:, None], lowest, 0.0).to(q.dtype)
    mask = mask.expand(B, -1, -1, -1).flatten(0, 1).unsqueeze(1)
    out = run_kernel(queries, keys, values, attn_mask=mask)
    return out.unflatten(0, (B, count)).flatten(1, 2)[:, :T]


def run_kernel(q, k, v, **options):
    """torch's kernel on q, k, v [B, T, H, D], with its options."""
    width = q.shape[3]
    if missing := _missing_width(q):
        # Zeros add nothing to a product.
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
        options["scale"] = width**-0.5
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with _no_dense_kernel(q):
        out = F.scaled_dot_product_attention(q, k, v, **options)
    return out.transpose(1, 2)[..., :width]


def _missing_width(q):
    """What heads lack: CUDA's kernels take multiples of 8 under a mask."""
    return -q.shape[3] % 8 if q.is_cuda else 0


def _no_dense_kernel(q):
    """On CUDA, make torch raise rather than build the T x T matrix."""
    if not q.is_cuda:
        return contextlib.nullcontext()
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    )


def band(rows, columns, offset, left, right, dtype, device):
    """The additive mask [rows, columns] of a window.

    Row i stands at column ``i + offset``. All layers of a network ask for the
    same few masks, so the last ones are kept.

    Example
    -------
    >>> band(2, 4, 1, 1, 0, torch.float32, torch.device("cpu"))
    tensor([[0., 0., -inf, -inf],
            [-inf, 0., 0., -inf]])
    """
    # A graph may keep no tensor of another.
    make = _band if torch.compiler.is_compiling() else _kept_band
    return make(rows, columns, offset, left, right, dtype, device)


def _band(rows, columns, offset, left, right, dtype, device):
    # What is made in inference mode cannot be used in training.
    with torch.inference_mode(False):
        mask = torch.zeros(rows, columns, dtype=dtype, device=device)
        hidden = _hidden(rows, columns, offset, left, right, device)
        return mask.masked_fill(hidden, -math.inf)


_kept_band = functools.lru_cache(maxsize=4)(_band)


def _hidden(rows, columns, offset, left, right, device):
    """What a window hides, [rows, columns]."""
    place = torch.arange(rows, device=device)[:, None] + offset
    ahead = torch.arange(columns, device=device) - place
    return (ahead < -left) | (ahead > right)


def stream_mask(queries, left, seen, like):
    """The mask [n, left + n] of the next n queries of a stream.

    The keys before them are the last ``left``, of which only those exist that
    the stream has had.

    Arguments
    ---------
    queries : int
        n.
    left : int
        Keys seen to the left of each query.
    seen : int or torch.Tensor
        Tokens that the stream has had; a tensor [1] in an exported graph.
    like : torch.Tensor
        The mask has its dtype and device.

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
