"""Exact attention without the T x T matrix: one call, four backends.

``attend`` takes flash-attn's layout and window semantics and sends the work to
the first backend that can do it. A backend that cannot says why; nothing is
dropped, cast or widened silently.

============  ===========  =====================================================
backend       devices      what it needs
============  ===========  =====================================================
flash_attn    CUDA         the flash-attn package, float16 or bfloat16
torch_flash   CUDA         ``torch.nn.attention.varlen`` with a window argument
sdpa          CPU, CUDA    torch alone; windows in blocks, linear in T
reference     any          the dense T x T matrix: an oracle, never automatic
============  ===========  =====================================================

Axes: B batch, T tokens (Tq of queries, Tk of keys), H heads, D head width.

Source: "FlashAttention-2" (Dao, arXiv:2307.08691).
"""

import contextlib
import contextvars
import math

import torch
import torch.nn.functional as F

try:
    from flash_attn import flash_attn_func, flash_attn_varlen_func
except ImportError:
    flash_attn_func = flash_attn_varlen_func = None

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

# Queries per block of a window: fewer and the calls cost more than the
# products, more and too many products are masked out.
MIN_BLOCK, MAX_BLOCK = 64, 256

_RAN = contextvars.ContextVar("attention_report", default=None)


def attend(
    q,
    k,
    v,
    window=(-1, -1),
    causal=False,
    backend="auto",
    dropout_p=0.0,
    lengths=None,
):
    """Scaled dot-product attention, exact, with an optional sliding window.

    Query i sees the keys j with ``i - left <= j <= i + right`` (both ends
    included, -1 is unbounded). With more keys than queries, the last query
    stands at the last key, as in flash-attn.

    Arguments
    ---------
    q : torch.Tensor
        Queries, [B, Tq, H, D].
    k : torch.Tensor
        Keys, [B, Tk, H, D], Tk >= Tq.
    v : torch.Tensor
        Values, [B, Tk, H, D].
    window : tuple of int
        Keys seen to the (left, right) of each query; -1 is unbounded.
    causal : bool
        Nothing to the right is seen: the same as right = 0.
    backend : str
        "auto" (the first of flash_attn, torch_flash, sdpa that can run) or one
        of the names in the table above.
    dropout_p : float
        Dropout on the attention weights. No CPU kernel has it.
    lengths : torch.Tensor, optional
        Tokens that count in each row, integers [B]; only with Tq = Tk. Keys
        past the length are not seen, outputs past it are 0.

    Returns
    -------
    torch.Tensor
        [B, Tq, H, D], in the dtype of q.

    Raises
    ------
    ValueError
        For inputs that do not fit together, or an unknown backend.
    RuntimeError
        When the chosen backend (or, with "auto", each one) cannot run; the
        message lists every reason.

    Example
    -------
    >>> q, k, v = torch.randn(3, 2, 50, 4, 16).unbind(0)
    >>> attend(q, k, v, window=(8, 8)).shape
    torch.Size([2, 50, 4, 16])
    """
    _check(q, k, v, window, lengths)
    window = (window[0], 0) if causal else tuple(window)
    # An exported graph is for all lengths, and may not ask for this one.
    if not torch.compiler.is_exporting():
        window = _plainest(window, q, k)
    name, reasons = choose_backend(q, k, window, backend, dropout_p, lengths)
    if not torch.compiler.is_compiling() and _RAN.get() is not None:
        _RAN.get().append({"backend": name, "not_used": reasons})
    return BACKENDS[name][1](q, k, v, window, dropout_p, lengths)


def choose_backend(q, k, window, backend="auto", dropout_p=0.0, lengths=None):
    """Name the backend that will run, and why those before it cannot.

    Arguments are those of ``attend``.

    Returns
    -------
    tuple
        The name, and a dict from each backend passed over to its reason.

    Example
    -------
    >>> x = torch.randn(1, 9, 2, 8)
    >>> choose_backend(x, x, (-1, -1))[0]
    'sdpa'
    """
    check_backend(backend)
    reasons = {}
    for name, (why_not, _) in BACKENDS.items():
        reason = why_not(q, k, window, dropout_p, lengths)
        if reason is None and (
            name == backend or (backend == "auto" and name != "reference")
        ):
            return name, reasons
        if reason is not None:
            reasons[name] = reason
    able = [name for name in BACKENDS if name not in reasons]
    raise RuntimeError(
        f"attention backend {backend!r} cannot run here. "
        + "; ".join(f"{name}: {why}" for name, why in reasons.items())
        + ". Can run: "
        + ", ".join(
            f"{name} (T x T memory)" if name == "reference" else name
            for name in able
        )
    )


def check_backend(backend):
    """Raise a ValueError unless the name is "auto" or that of a backend."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"unknown attention backend {backend!r}: choose 'auto' or one of "
            + ", ".join(BACKENDS)
        )


def check_window(window):
    """Raise a ValueError unless the window is (left, right), each >= -1."""
    sides = list(window) if isinstance(window, (tuple, list)) else []
    if len(sides) != 2 or not all(
        isinstance(side, int) and side >= -1 for side in sides
    ):
        raise ValueError(
            "window is (left, right), whole numbers of -1 or more, got "
            f"{window}"
        )


@contextlib.contextmanager
def attention_report():
    """Collect which backend each ``attend`` call used, in order.

    Yields
    ------
    list of dict
        One entry per call: ``backend``, and ``not_used`` (name -> reason) for
        the backends passed over.

    Example
    -------
    >>> x = torch.randn(1, 9, 2, 8)
    >>> with attention_report() as ran:
    ...     _ = attend(x, x, x)
    >>> ran[0]["backend"]
    'sdpa'
    """
    ran = []
    token = _RAN.set(ran)
    try:
        yield ran
    finally:
        _RAN.reset(token)


def _check(q, k, v, window, lengths):
    """Raise one clear error for inputs that do not fit together."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            "attention takes q [B, Tq, H, D] and k, v [B, Tk, H, D], got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    same = q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
    if not same or k.shape[1] < q.shape[1]:
        raise ValueError(
            "queries and keys must agree in batch, heads and head width, with "
            f"Tk >= Tq: got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    check_window(window)
    if lengths is not None and (
        lengths.shape != q.shape[:1] or q.shape[1] != k.shape[1]
    ):
        raise ValueError(
            f"lengths is [B] with Tq = Tk, got {tuple(lengths.shape)} for "
            f"q {tuple(q.shape)} and k {tuple(k.shape)}"
        )


def _plainest(window, q, k):
    """Windows that hide nothing become the plain ones, which run faster."""
    left, right = window
    tq, tk = q.shape[1], k.shape[1]
    if left < 0 or left >= tk - 1:
        if right < 0 or right >= tq - 1:
            return (-1, -1)
        if right == 0 and tq == tk:
            return (-1, 0)
    return (left, right)


# --- CUDA kernels -----------------------------------------------------------


def _why_not_flash_kernel(q):
    """The limits that both CUDA flash kernels share."""
    if not q.is_cuda:
        return f"needs a CUDA device, the tensors are on {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16 (autocast), got {q.dtype}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    if q.shape[3] > 256:
        return f"needs heads of at most 256, got {q.shape[3]}"
    if torch.compiler.is_exporting():
        return "cannot be exported"
    return None


def _why_not_flash_attn(q, k, window, dropout_p, lengths):
    if flash_attn_func is None:
        return "flash-attn is not installed (pip extra 'flash')"
    return _why_not_flash_kernel(q)


def _why_not_torch_flash(q, k, window, dropout_p, lengths):
    if varlen_attn is None:
        return "this torch has no torch.nn.attention.varlen"
    if dropout_p > 0:
        return "has no attention dropout"
    reason = _why_not_flash_kernel(q)
    # flash-attn fills such heads up itself.
    if reason is None and q.shape[3] % 8:
        reason = f"needs heads of a multiple of 8, got {q.shape[3]}"
    return reason


def _run_flash_attn(q, k, v, window, dropout_p, lengths):
    if lengths is None:
        return flash_attn_func(q, k, v, dropout_p=dropout_p, window_size=window)
    packed, sizes, unpack = _pack(q, k, v, lengths)
    return unpack(
        flash_attn_varlen_func(
            *packed, *sizes, dropout_p=dropout_p, window_size=window
        )
    )


def _run_torch_flash(q, k, v, window, dropout_p, lengths):
    packed, sizes, unpack = _pack(q, k, v, lengths)
    return unpack(varlen_attn(*packed, *sizes, window_size=window))


def _pack(q, k, v, lengths):
    """Rows end to end, [tokens, H, D], with where each begins."""
    B, tq, tk = q.shape[0], q.shape[1], k.shape[1]
    if lengths is None:
        lens_q = torch.full((B,), tq, device=q.device)
        lens_k = torch.full((B,), tk, device=q.device)
        packed = [x.flatten(0, 1) for x in (q, k, v)]
    else:
        lens_q = lens_k = lengths.to(q.device)
        keep = torch.arange(tq, device=q.device) < lens_q[:, None]
        packed = [x[keep] for x in (q, k, v)]
    starts = [
        F.pad(lens.cumsum(0), (1, 0)).to(torch.int32)
        for lens in (lens_q, lens_k)
    ]

    def _unpack(out):
        if lengths is None:
            return out.view(q.shape)
        whole = out.new_zeros(q.shape)
        whole[keep] = out
        return whole

    return packed, (*starts, tq, tk), _unpack


# --- torch's scaled_dot_product_attention -----------------------------------


def _why_not_sdpa(q, k, window, dropout_p, lengths):
    if dropout_p > 0 and not q.is_cuda:
        return "attention dropout would need the T x T matrix on this device"
    if dropout_p > 0 and window != (-1, -1):
        return "has no attention dropout with a window"
    if q.dtype == torch.float64 and q.is_cuda:
        return "float64 would need the T x T matrix on CUDA"
    one_side = (window[0] < 0) != (window[1] < 0)
    if one_side and not (window == (-1, 0) and q.shape[1] == k.shape[1]):
        return (
            f"the window {window} is unbounded on one side, which would need "
            "a T x T mask (causal attention with Tq = Tk does not)"
        )
    return None


def _run_sdpa(q, k, v, window, dropout_p, lengths):
    if lengths is None:
        return _sdpa(q, k, v, window, dropout_p)
    # Rows of unlike length are run one by one: a mask per row would cost more
    # than the calls, and each row stays exactly what it is alone.
    rows = []
    for b, n in enumerate(lengths.tolist()):
        row = [x[b : b + 1, :n] for x in (q, k, v)]
        out = _sdpa(*row, _plainest(window, *row[:2]), dropout_p)
        rows.append(F.pad(out, (0, 0, 0, 0, 0, q.shape[1] - n)))
    return torch.cat(rows)


def _sdpa(q, k, v, window, dropout_p):
    if q.shape[1] == 0:
        return q
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    causal = bool(window == (-1, 0) and q.shape[1] == k.shape[1])
    if window != (-1, -1) and not causal and torch.compiler.is_exporting():
        return _window_blocks(q, k, v, *window)
    if window != (-1, -1) and not causal:
        tq, tk = q.shape[1], k.shape[1]
        # A window that hides little is a mask on all keys, in one call for
        # all rows: many small calls cost more than the products it hides.
        if tk <= sum(window) + 2 * MIN_BLOCK and not q.is_cuda:
            mask = _band(q, tq, tk, tk - tq, *window)
            return attend_masked(q, k, v, mask)
        rows = zip(q.split(1), k.split(1), v.split(1))
        return torch.cat([_window_row(*row, *window) for row in rows])
    return _run_kernel(q, k, v, dropout_p=dropout_p, is_causal=causal)


def _window_row(q, k, v, left, right):
    """A window over one row: q [1, Tq, H, D], k and v [1, Tk, H, D].

    Queries go in blocks; each block sees a slice of keys under one mask. The
    interior blocks all look alike, so they share one mask and one call, their
    keys being overlapping views (no copy). The blocks at the edges take exact
    slices: padding would make rows that see nothing, whose gradients are NaN.
    """
    tq, tk = q.shape[1], k.shape[1]
    left, right = min(left, tk), min(right, tk)
    shift = tk - tq
    block = min(max(MIN_BLOCK, min(left, right, MAX_BLOCK)), tq)
    span = block + left + right
    # Interior blocks are those whose keys all exist.
    first = min(max(0, -(-(left - shift) // block)), -(-tq // block))
    last = max(first, min(tq, tq - right) // block)

    def _edge(start):
        stop = min(start + block, tq)
        k0, k1 = max(0, start + shift - left), min(tk, stop + shift + right)
        mask = _band(q, stop - start, k1 - k0, start + shift - k0, left, right)
        return attend_masked(q[:, start:stop], k[:, k0:k1], v[:, k0:k1], mask)

    parts = [_edge(i * block) for i in range(first)]
    if last > first:
        k0 = first * block + shift - left
        k1 = last * block + shift + right
        # [1, Tk, H, D] -> [blocks, span, H, D], overlapping
        spans = [
            x[0, k0:k1].unfold(0, span, block).movedim(3, 1) for x in (k, v)
        ]
        queries = q[0, first * block : last * block]
        queries = queries.unflatten(0, (last - first, block))
        mask = _band(q, block, span, left, left, right)
        parts.append(attend_masked(queries, *spans, mask).flatten(0, 1)[None])
    parts += [_edge(start) for start in range(last * block, tq, block)]
    return torch.cat(parts, 1)


def _window_blocks(q, k, v, left, right):
    """A window without a branch on T, for export; Tq = Tk, both sides bounded.

    All tensors are padded to whole blocks; each block of queries sees as many
    blocks of keys as the window can touch.
    """
    B, T = q.shape[:2]
    block = max(MIN_BLOCK, min(max(left, right), MAX_BLOCK))
    before, after = -(-left // block), -(-right // block)
    count = (T + block - 1) // block

    def _blocks(x, before, after):
        room = (count + after) * block - T
        x = F.pad(x, (0, 0, 0, 0, before * block, room))
        x = x.unflatten(1, (count + before + after, block))
        shifted = [x[:, i : i + count] for i in range(before + 1 + after)]
        return torch.cat(shifted, 2).flatten(0, 1).transpose(1, 2)

    queries = _blocks(q, 0, 0)  # [B count, H, block, D]
    keys, values = (_blocks(x, before, after) for x in (k, v))
    span = (before + 1 + after) * block
    hidden = _hidden(block, span, before * block, left, right, q.device)
    starts = torch.arange(count, device=q.device) * block
    place = starts[:, None] + torch.arange(span, device=q.device)
    place = place - before * block
    absent = (place < 0) | (place >= T)  # [count, span]
    # Finite: a padded query may see nothing at all, and must not give NaN.
    lowest = torch.finfo(q.dtype).min / 2
    mask = torch.where(hidden | absent[:, None], lowest, 0.0).to(q.dtype)
    mask = mask.expand(B, -1, -1, -1).flatten(0, 1).unsqueeze(1)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    out = out.transpose(1, 2).unflatten(0, (B, count)).flatten(1, 2)
    return out[:, :T]


def attend_masked(q, k, v, mask):
    """``attend`` under an additive mask [Tq, Tk]: torch's kernel, no checks."""
    return _run_kernel(q, k, v, attn_mask=mask)


def _run_kernel(q, k, v, **options):
    """torch's kernel on [B, T, H, D], with its options."""
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


def _band(q, rows, columns, offset, left, right):
    """The additive mask [rows, columns] of a window, in the dtype of q."""
    mask = torch.zeros(rows, columns, dtype=q.dtype, device=q.device)
    hidden = _hidden(rows, columns, offset, left, right, q.device)
    return mask.masked_fill(hidden, -math.inf)


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
    hidden = _hidden(queries, left + queries, left, left, 0, like.device)
    # Not a branch: an exported graph has it for all tokens.
    absent = torch.arange(left + queries, device=like.device) < left - seen
    mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill(hidden | absent, -math.inf)


def _hidden(rows, columns, offset, left, right, device):
    """What a window hides, [rows, columns]: row i stands at i + offset."""
    place = torch.arange(rows, device=device)[:, None] + offset
    ahead = torch.arange(columns, device=device) - place
    return (ahead < -left) | (ahead > right)


def _no_dense_kernel(q):
    """On CUDA, make torch raise rather than build the T x T matrix."""
    if not q.is_cuda:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    )


# --- the oracle -------------------------------------------------------------


def _why_not_reference(q, k, window, dropout_p, lengths):
    return None


def _run_reference(q, k, v, window, dropout_p, lengths):
    """Dense attention in float32 (float64 stays); T x T memory."""
    wide = torch.promote_types(q.dtype, torch.float32)
    tq, tk = q.shape[1], k.shape[1]
    left, right = (side if side >= 0 else tk for side in window)
    hidden = _hidden(tq, tk, tk - tq, left, right, q.device)
    if lengths is not None:
        past = torch.arange(tk, device=q.device) >= lengths[:, None]
        hidden = hidden | past[:, None, None] | past[:, None, :, None]
    # An oracle has no half precision, whatever surrounds it.
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k.to(wide))
        scores = scores / math.sqrt(q.shape[3])
        # A row that sees nothing gives 0, with a gradient of 0.
        scores = scores.masked_fill(hidden, torch.finfo(wide).min)
        weights = scores.softmax(-1).masked_fill(hidden, 0.0)
        weights = F.dropout(weights, dropout_p)
        out = torch.einsum("bhqk,bkhd->bqhd", weights, v.to(wide))
    return out.to(q.dtype)


BACKENDS = {
    "flash_attn": (_why_not_flash_attn, _run_flash_attn),
    "torch_flash": (_why_not_torch_flash, _run_torch_flash),
    "sdpa": (_why_not_sdpa, _run_sdpa),
    "reference": (_why_not_reference, _run_reference),
}
