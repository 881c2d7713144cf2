"""Exact attention without the T x T matrix: one call, three backends.

``attend`` has the layout and window semantics of flash-attn and calls the first
backend that can run. A backend that cannot run gives its reason; no option is
dropped and no input is cast silently.

===========  =========  ======================================================
backend      devices    what it needs
===========  =========  ======================================================
flash_attn   CUDA       the flash-attn package, float16 or bfloat16
torch_flash  CUDA       torch's varlen_attn, half precision, D a multiple of 8
sdpa         CPU, CUDA  torch alone; windows in blocks, linear in T
===========  =========  ======================================================

Axes: B batch, T tokens, H heads, D head width.

Source: "FlashAttention-2" (Dao, arXiv:2307.08691).
"""

import contextlib
import contextvars
from typing import NamedTuple

import torch
import torch.nn.functional as F

from speechbrain_flashformer.nnet.window import attend_window, run_kernel

try:
    from flash_attn import flash_attn_func, flash_attn_varlen_func
except ImportError:
    flash_attn_func = flash_attn_varlen_func = None

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

_REPORT = contextvars.ContextVar("attention_report", default=None)


class Rows(NamedTuple):
    """Valid tokens of a padded batch, computed once for all layers.

    Attributes
    ----------
    lengths : list of int
        Valid tokens of each row, [B].
    index : torch.Tensor
        Indices of the valid tokens in the flattened batch [B T].
    starts : torch.Tensor
        Start of each row in the packed valid tokens, and their total; int32,
        [B + 1].
    """

    lengths: list
    index: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def of(cls, lengths, size, device):
        """Build from lengths.

        Arguments
        ---------
        lengths : torch.Tensor
            Valid tokens of each row, integers [B].
        size : int
            T, tokens with padding.
        device : torch.device
            Device of index and starts.

        Returns
        -------
        Rows
            The valid tokens.

        Example
        -------
        >>> rows = Rows.of(torch.tensor([1, 3]), 4, "cpu")
        >>> rows.index.tolist(), rows.starts.tolist()
        ([0, 4, 5, 6], [0, 1, 4])
        """
        # Computed on the CPU, so that a GPU synchronizes at most once.
        lengths = lengths.cpu()
        places = torch.arange(size) < lengths[:, None]
        starts = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        index = places.flatten().nonzero().squeeze(1)
        return cls(lengths.tolist(), index.to(device), starts.to(device))


def attend(q, k, v, window=(-1, -1), backend="auto", rows=None):
    """Exact scaled dot-product attention with an optional sliding window.

    Query i sees the keys j with ``i - left <= j <= i + right``; -1 means
    unbounded. The window (-1, 0) is causal attention.

    Arguments
    ---------
    q, k, v : torch.Tensor
        Queries, keys and values, [B, T, H, D].
    window : tuple of int
        Keys seen to the (left, right) of each query; -1 means unbounded.
    backend : str
        "auto" (the first that can run) or a name in the table above.
    rows : Rows, optional
        Valid tokens of a padded batch. Queries do not see padded tokens, and
        the outputs of padded tokens are 0.

    Returns
    -------
    torch.Tensor
        [B, T, H, D], in the dtype of q.

    Raises
    ------
    ValueError
        If the shapes do not match, the window is invalid, or the backend is
        unknown.
    RuntimeError
        If the chosen backend (or, with "auto", every backend) cannot run. The
        message lists the reasons.

    Example
    -------
    >>> q, k, v = torch.randn(3, 2, 50, 4, 16).unbind(0)
    >>> attend(q, k, v, window=(8, 8)).shape
    torch.Size([2, 50, 4, 16])
    """
    if q.ndim != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(
            "attention takes q, k and v [B, T, H, D], got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    check_window(window)
    window = _simplify_window(tuple(window), q.shape[1])
    name, reasons = choose_backend(q, window, backend)
    if not torch.compiler.is_compiling() and _REPORT.get() is not None:
        _REPORT.get().append({"backend": name, "not_used": reasons})
    return BACKENDS[name][1](q, k, v, window, rows)


def choose_backend(q, window, backend="auto"):
    """Choose the backend that runs a call of ``attend``.

    Arguments
    ---------
    q : torch.Tensor
        Queries, [B, T, H, D]; keys and values have the same shape.
    window : tuple of int
        Keys seen to the (left, right); -1 means unbounded.
    backend : str
        "auto" or the name of a backend.

    Returns
    -------
    tuple
        The name of the backend, and a dict from each skipped backend to the
        reason why it cannot run.

    Raises
    ------
    ValueError
        If the backend is unknown.
    RuntimeError
        If the chosen backend (or, with "auto", every backend) cannot run.

    Example
    -------
    >>> choose_backend(torch.randn(1, 9, 2, 8), (-1, -1))[0]
    'sdpa'
    """
    check_backend(backend)
    reasons = {}
    for name, (why_not, _) in BACKENDS.items():
        reason = why_not(q, window)
        if reason is not None:
            reasons[name] = reason
        elif backend in ("auto", name):
            return name, reasons
    able = [name for name in BACKENDS if name not in reasons] or ["none"]
    raise RuntimeError(
        f"attention backend {backend!r} cannot run here. "
        + "; ".join(f"{name}: {why}" for name, why in reasons.items())
        + f". Can run: {', '.join(able)}"
    )


def check_backend(backend):
    """Raise a ValueError unless the name is "auto" or a known backend."""
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
            "window must be (left, right), whole numbers of -1 or more, got "
            f"{window}"
        )


@contextlib.contextmanager
def attention_report():
    """Record the backend of each ``attend`` call in a with block.

    Yields
    ------
    list of dict
        One entry per call, in order: ``backend`` (its name) and ``not_used``
        (skipped backend -> reason).

    Example
    -------
    >>> x = torch.randn(1, 9, 2, 8)
    >>> with attention_report() as ran:
    ...     _ = attend(x, x, x)
    >>> ran[0]["backend"]
    'sdpa'
    """
    ran = []
    token = _REPORT.set(ran)
    try:
        yield ran
    finally:
        _REPORT.reset(token)


# --- CUDA kernels -----------------------------------------------------------


def _why_not_flash_kernel(q):
    """Check the limits that both CUDA flash kernels share."""
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


def _why_not_flash_attn(q, window):
    if flash_attn_func is None:
        return "flash-attn is not installed (pip extra 'flash')"
    return _why_not_flash_kernel(q)


def _why_not_torch_flash(q, window):
    if varlen_attn is None:
        return "this torch has no torch.nn.attention.varlen"
    reason = _why_not_flash_kernel(q)
    # Only flash-attn pads heads to a multiple of 8.
    if reason is None and q.shape[3] % 8:
        reason = f"needs heads of a multiple of 8, got {q.shape[3]}"
    return reason


def _run_flash_attn(q, k, v, window, rows):
    if rows is None:
        return flash_attn_func(q, k, v, window_size=window)
    return _run_packed(flash_attn_varlen_func, q, k, v, window, rows)


def _run_torch_flash(q, k, v, window, rows):
    return _run_packed(varlen_attn, q, k, v, window, rows)


def _run_packed(kernel, q, k, v, window, rows):
    """Call a kernel for packed rows: [tokens, H, D] and the row starts."""
    B, T = q.shape[:2]
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    if rows is None:
        starts = torch.arange(0, (B + 1) * T, T, device=q.device)
        starts = starts.to(torch.int32)
        out = kernel(*packed, starts, starts, T, T, window_size=window)
    else:
        packed = [x[rows.index] for x in packed]
        sizes = rows.starts, rows.starts, T, T
        found = kernel(*packed, *sizes, window_size=window)
        out = found.new_zeros(B * T, *q.shape[2:])
        out = out.index_copy(0, rows.index, found)
    return out.view(q.shape)


# --- torch's scaled_dot_product_attention -----------------------------------


def _why_not_sdpa(q, window):
    if q.dtype == torch.float64 and q.is_cuda:
        return "float64 would need the T x T matrix on CUDA"
    if (window[0] < 0) != (window[1] < 0) and window != (-1, 0):
        return (
            f"the window {window} is unbounded on one side, which would need "
            "a T x T mask (causal attention does not)"
        )
    return None


def _run_sdpa(q, k, v, window, rows):
    if rows is None:
        return _sdpa(q, k, v, window)
    # Rows of different lengths run one by one. One mask per row would cost
    # more than the calls, and this way a row gives exactly the same result in
    # a batch as alone.
    T, outs = q.shape[1], []
    for b, n in enumerate(rows.lengths):
        row = (x[b : b + 1, :n] for x in (q, k, v))
        out = _sdpa(*row, _simplify_window(window, n))
        outs.append(F.pad(out, (0, 0, 0, 0, 0, T - n)))
    return torch.cat(outs)


def _sdpa(q, k, v, window):
    if q.shape[1] == 0:
        return q
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if window in ((-1, -1), (-1, 0)):
        return run_kernel(q, k, v, is_causal=window == (-1, 0))
    return attend_window(q, k, v, *window)


def _simplify_window(window, size):
    """Return (-1, -1) or (-1, 0) if equivalent, because these run faster."""
    left, right = window
    # An exported graph may not branch on the length.
    if not torch.compiler.is_exporting() and (left < 0 or left >= size - 1):
        if right < 0 or right >= size - 1:
            return (-1, -1)
        if right == 0:
            return (-1, 0)
    return (left, right)


BACKENDS = {
    "flash_attn": (_why_not_flash_attn, _run_flash_attn),
    "torch_flash": (_why_not_torch_flash, _run_torch_flash),
    "sdpa": (_why_not_sdpa, _run_sdpa),
}
