"""Attention: every backend equals the dense oracle, and none is T x T."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from speechbrain_flashformer.nnet import attention
from speechbrain_flashformer.nnet import window as windows
from speechbrain_flashformer.nnet.attention import (
    Rows,
    attend,
    attention_report,
    choose_backend,
)
from speechbrain_flashformer.nnet.rotary import RotaryAngles, rotate

WINDOWS = [
    (-1, -1),
    (0, 0),
    (3, 5),
    (20, 0),
    (70, 70),
    (5, 1000),
]


def dense(q, k, v, window=(-1, -1), lengths=None):
    """The oracle: the T x T matrix, in float32 at least."""
    T = q.shape[1]
    left, right = (side if side >= 0 else T for side in window)
    ahead = torch.arange(T) - torch.arange(T)[:, None]
    hidden = ((ahead < -left) | (ahead > right))[None, None]
    if lengths is not None:
        past = torch.arange(T) >= lengths[:, None]
        hidden = hidden | past[:, None, None] | past[:, None, :, None]
    wide = [
        x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v)
    ]
    scores = torch.einsum("bqhd,bkhd->bhqk", *wide[:2]) / q.shape[3] ** 0.5
    # A row that sees nothing gives 0, with a gradient of 0.
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1).masked_fill(hidden, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, wide[2]).to(q.dtype)


def heads(B, T, dtype=torch.float64, H=2, D=8):
    torch.manual_seed(0)
    return [
        torch.randn(B, T, H, D, dtype=dtype, requires_grad=True)
        for _ in range(3)
    ]


def run_both(backend, qkv, window=(-1, -1), lengths=None):
    """Outputs and gradients of a backend and of the oracle."""
    grad = torch.randn_like(qkv[0])
    rows = None
    if lengths is not None:
        rows = Rows.of(lengths, qkv[0].shape[1], "cpu")
    results = []
    for out in (
        attend(*qkv, window, backend, rows),
        dense(*qkv, window, lengths),
    ):
        results.append([out, *torch.autograd.grad(out, qkv, grad)])
    return zip(*results)


@pytest.fixture
def small_blocks(monkeypatch):
    """Short inputs have blocks in between, at both edges, several of each."""
    monkeypatch.setattr(windows, "BLOCK", 8)
    monkeypatch.setattr(windows, "EDGE", 24)
    monkeypatch.setattr(windows, "MOST_DENSE", 0)


@pytest.mark.parametrize("window", [*WINDOWS, (-1, 0), (0, 70), (90, 2)])
@pytest.mark.parametrize("T", [1, 7, 63, 130, 301, 700])
def test_sdpa_equals_the_oracle(window, T):
    for ours, oracle in run_both("sdpa", heads(2, T), window):
        torch.testing.assert_close(ours, oracle, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "window",
    [(0, 0), (3, 5), (20, 0), (0, 9), (16, 16), (30, 50), (200, 7), (5, 200)],
)
@pytest.mark.parametrize("T", [1, 7, 24, 33, 63, 130, 301])
def test_blocks_equal_the_oracle(small_blocks, window, T):
    for ours, oracle in run_both("sdpa", heads(2, T), window):
        torch.testing.assert_close(ours, oracle, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dense_up_to", [0, 1024])
@pytest.mark.parametrize("window", [(-1, -1), (10, 10), (10, 0)])
def test_rows_of_unlike_length(monkeypatch, window, dense_up_to):
    monkeypatch.setattr(windows, "MOST_DENSE", dense_up_to)
    qkv = heads(3, 90)
    lengths = torch.tensor([90, 31, 1])
    for ours, oracle in run_both("sdpa", qkv, window, lengths):
        torch.testing.assert_close(ours, oracle, atol=1e-10, rtol=0)
    out = attend(*qkv, window, rows=Rows.of(lengths, 90, "cpu"))
    for b, n in enumerate(lengths):
        alone = attend(*(x[b : b + 1, :n] for x in qkv), window=window)
        torch.testing.assert_close(out[b : b + 1, :n], alone)
        assert not out[b, n:].any()


# (8, 7) hides a key from the last query, (7, 8) from the first.
@pytest.mark.parametrize(
    "window", [(2, 1), (7, 8), (8, 7), (8, 8), (-1, 0), (-1, -1)]
)
def test_the_oracle_against_a_loop(window):
    q, k, v = (x.detach() for x in heads(1, 9))
    out = dense(q, k, v, window)
    left, right = (9 if side < 0 else side for side in window)
    for i, h in itertools.product(range(9), range(2)):
        seen = slice(max(0, i - left), i + right + 1)
        weights = (k[0, seen, h] @ q[0, i, h] / 8**0.5).softmax(0)
        torch.testing.assert_close(out[0, i, h], weights @ v[0, seen, h])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_masks_of_inference_serve_training(mode):
    """They are kept, and what inference mode makes has no gradients."""
    qkv = heads(1, 300)
    windows._cached_band.cache_clear()
    with mode():
        attend(*qkv, window=(100, 100))
    attend(*qkv, window=(100, 100)).sum().backward()
    assert windows._cached_band.cache_info().hits
    assert qkv[0].grad.isfinite().all()


@pytest.mark.parametrize("T", [500, 2000])
def test_layers_share_their_masks(T):
    windows._cached_band.cache_clear()
    for _ in range(8):
        attend(*heads(2, T), window=(250, 250))
    assert windows._cached_band.cache_info().misses == 1


class Recorder(TorchDispatchMode):
    """The operators that ran, and the most elements any of them made."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return result


UNBOUNDED = [(-1, -1), (-1, 0)]


@pytest.mark.parametrize(
    "dtype, window",
    [
        *itertools.product([torch.float32], [*UNBOUNDED, (64, 64), (64, 0)]),
        *itertools.product([torch.bfloat16], UNBOUNDED),
    ],
)
def test_cpu_runs_the_flash_kernel_and_nothing_dense(dtype, window):
    T = 4096
    qkv = heads(1, T, dtype=dtype)
    with Recorder() as ran:
        attend(*qkv, window=window).sum().backward()
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    assert flash in ran.names and flash + "_backward" in ran.names
    assert not {"_softmax", "bmm", "baddbmm"} & ran.names
    # Largest is an input, the mask of a block, or the gradients of the keys
    # of all blocks, not T x T.
    assert ran.largest <= 4 * qkv[0].numel() < T * T


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (70, 70), (250, 0)])
@pytest.mark.parametrize("T", [1, 300, 1500])
def test_bfloat16_on_cpu_is_as_exact_as_its_digits(window, T):
    """Short blocks run as products of matrices there."""
    found = run_both("sdpa", heads(2, T, torch.bfloat16, H=4, D=32), window)
    for ours, oracle in found:
        error = (ours.float() - oracle.float()).norm()
        assert error <= 0.01 * oracle.float().norm()


def test_bfloat16_on_cpu_holds_the_scores_of_blocks_only():
    T, window = 8192, (64, 64)
    with Recorder() as ran:
        attend(*heads(1, T, torch.bfloat16), window=window).sum().backward()
    assert "_scaled_dot_product_flash_attention_for_cpu" not in ran.names
    span = sum(window) + windows.BLOCK
    assert ran.largest <= 2 * T * span  # two heads


def test_a_long_recording_in_bfloat16_holds_no_scores():
    qkv = heads(1, 16384, torch.bfloat16)
    with torch.no_grad(), Recorder() as ran:
        attend(*qkv, window=(64, 64))
    assert "_scaled_dot_product_flash_attention_for_cpu" in ran.names
    assert ran.largest <= 4 * qkv[0].numel()


def test_strided_heads_keep_the_flash_kernel():
    packed = torch.randn(2, 100, 16, 2, 3)  # last stride is not 1
    q, k, v = packed.permute(4, 0, 1, 3, 2).unbind(0)
    with Recorder() as ran:
        attend(q, k, v, window=(8, 8))
    assert "_softmax" not in ran.names


def test_backward_of_a_window_is_linear_in_length():
    def most(T):
        with Recorder() as ran:
            attend(*heads(1, T), window=(16, 16)).sum().backward()
        return ran.largest

    assert most(8192) <= 2.1 * most(4096)


def test_errors_name_the_matter():
    q, k, v = heads(1, 5)
    with pytest.raises(ValueError, match="unknown attention backend 'flash'"):
        attend(q, k, v, backend="flash")
    for other in (q[0], q[:, :3], q[..., :4]):
        with pytest.raises(ValueError, match=r"q, k and v \[B, T, H, D\]"):
            attend(other, k, v)
    with pytest.raises(ValueError, match="even head width, got 7"):
        RotaryAngles(7)


def test_a_backend_that_cannot_run_says_why_and_what_can():
    q, k, v = heads(1, 5, dtype=torch.float32)
    with pytest.raises(RuntimeError) as error:
        attend(q, k, v, backend="flash_attn")
    assert "flash_attn: " in str(error.value)
    assert "Can run: sdpa" in str(error.value)


@pytest.mark.parametrize("window", [(-1, 4), (4, -1)])
def test_one_unbounded_side_is_refused_not_dense(window):
    q, k, v = heads(1, 50)
    with pytest.raises(RuntimeError, match="unbounded on one side"):
        attend(q, k, v, window=window)


@pytest.mark.parametrize("window", [(0,), (1, 2, 3), 5, (1.5, 1), (-2, 0)])
def test_windows_are_two_whole_numbers(window):
    q, k, v = heads(1, 5)
    with pytest.raises(ValueError, match=r"window must be \(left, right\)"):
        attend(q, k, v, window=window)


def test_report_names_what_ran_and_why_not_the_others():
    q, k, v = heads(1, 5, dtype=torch.float32)
    with attention_report() as ran:
        attend(q, k, v)
        attend(q, k, v, backend="sdpa")
    assert [entry["backend"] for entry in ran] == ["sdpa", "sdpa"]
    assert set(ran[0]["not_used"]) == {"flash_attn", "torch_flash"}


class FakeFlash:
    """flash-attn's contract, checked; the oracle computes.

    Signature and semantics as documented by flash-attn 2: half precision,
    [B, T, H, D] (or packed [total, H, D] with int32 starts), a window of
    inclusive sides where -1 is unbounded.
    """

    def __init__(self):
        self.calls = 0

    def check(self, q, k, v, window_size):
        self.calls += 1
        for x in (q, k, v):
            assert x.dtype in (torch.float16, torch.bfloat16)
            assert x.stride(-1) == 1 and x.shape[-1] <= 256
        assert len(window_size) == 2 and min(window_size) >= -1

    def dense(self, q, k, v, dropout_p=0.0, causal=False, window_size=(-1, -1)):
        assert q.ndim == 4 and not dropout_p and not causal
        self.check(q, k, v, window_size)
        return dense(q, k, v, window_size)

    def packed(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        window_size=(-1, -1),
    ):
        assert q.ndim == 3
        self.check(q, k, v, window_size)
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert type(max_seqlen_q) is type(max_seqlen_k) is int
        starts = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist())
        rows = []
        for (q0, k0), (q1, k1) in itertools.pairwise(starts):
            assert q1 - q0 <= max_seqlen_q and k1 - k0 <= max_seqlen_k
            row = [x[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1])]
            rows.append(dense(*row, window_size)[0])
        return torch.cat(rows)


@pytest.mark.parametrize("backend", ["flash_attn", "torch_flash"])
@pytest.mark.parametrize("window", [(-1, -1), (5, 2), (5, 0), (99, 0)])
@pytest.mark.parametrize("lengths", [None, torch.tensor([40, 17, 1])])
def test_flash_adapters_keep_the_contract(
    monkeypatch, backend, window, lengths
):
    fake = FakeFlash()
    monkeypatch.setattr(attention, "flash_attn_func", fake.dense)
    monkeypatch.setattr(attention, "flash_attn_varlen_func", fake.packed)
    monkeypatch.setattr(attention, "varlen_attn", fake.packed)
    # The stand-in runs on the CPU; only the check of the device is lifted.
    monkeypatch.setattr(attention, "_why_not_flash_kernel", lambda q: None)
    qkv = heads(3, 40, dtype=torch.bfloat16)
    for ours, oracle in run_both(backend, qkv, window, lengths):
        torch.testing.assert_close(ours, oracle)
    assert fake.calls


def test_auto_takes_flash_attn_first(monkeypatch):
    q = torch.zeros(1, 4, 1, 8, dtype=torch.bfloat16)
    monkeypatch.setattr(attention, "flash_attn_func", FakeFlash().dense)
    monkeypatch.setattr(attention, "_why_not_flash_kernel", lambda q: None)
    assert choose_backend(q, (-1, -1))[0] == "flash_attn"
    assert choose_backend(q, (-1, -1), "sdpa")[0] == "sdpa"


def test_rotary_positions_turn_pairs_as_complex_numbers():
    """RoFormer, eq. 15: pair i at position m turns by m * 10000^(-2i/D)."""
    x = torch.randn(1, 30, 2, 16, dtype=torch.float64)
    place = torch.arange(30)[:, None, None] + 7
    turn = place * 10000.0 ** (-torch.arange(8) / 8)
    turned = torch.complex(*x.chunk(2, 3)) * torch.polar(turn * 0 + 1, turn)
    torch.testing.assert_close(
        rotate(x, RotaryAngles(16)(30, offset=7)),
        torch.cat([turned.real, turned.imag], 3),
        atol=1e-5,
        rtol=0,
    )


def test_rotary_positions_are_relative():
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 30, 1, 16)
    rotary = RotaryAngles(16)
    angles = rotary(30)
    scores = torch.einsum("bqhd,bkhd->qk", rotate(q, angles), rotate(k, angles))
    for distance in (-7, 0, 12):
        band = scores.diagonal(distance)
        torch.testing.assert_close(band, band[:1].expand_as(band))
    # The same far into a recording of an hour.
    far = rotary(30, offset=450_000)
    late = torch.einsum("bqhd,bkhd->qk", rotate(q, far), rotate(k, far))
    torch.testing.assert_close(late, scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "window", [(-1, -1), (-1, 0), (20, 20), (100, 0), (0, 7), (300, 5)]
)
def test_exported_attention_is_exact_at_every_length(window):
    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v, window=window)

    q, k, v = torch.randn(3, 2, 701, 2, 8)
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        Attend(), (q, k, v), dynamic_shapes=(any_size,) * 3
    ).module()
    # One block, or whole blocks, torch.export takes for other programs;
    # onnxruntime does not, see test_export.py.
    for B, T in ((1, 301), (2, 513), (3, 777)):
        q, k, v = torch.randn(3, B, T, 2, 8)
        expected = dense(q, k, v, window)
        torch.testing.assert_close(
            program(q, k, v), expected, rtol=0, atol=1e-5
        )


class OnCuda:
    """What a backend is asked about, as if it were on a GPU."""

    is_cuda, device = True, torch.device("cuda")
    dtype = torch.bfloat16

    def __init__(self, width):
        self.shape = (1, 9, 2, width)


@pytest.mark.parametrize(
    "width, backend, reason",
    [
        (64, "flash_attn", None),
        (256, "torch_flash", None),
        # flash-attn fills such heads up.
        (12, "flash_attn", None),
        (12, "torch_flash", "multiple of 8, got 12"),
        (264, "flash_attn", "at most 256, got 264"),
        (264, "torch_flash", "at most 256, got 264"),
        (12, "sdpa", None),
        (264, "sdpa", None),
    ],
)
def test_head_widths_that_a_kernel_refuses_fall_to_the_next(
    monkeypatch, width, backend, reason
):
    monkeypatch.setattr(attention, "flash_attn_func", FakeFlash().dense)
    monkeypatch.setattr(attention, "varlen_attn", FakeFlash().packed)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (8, 0)
    )
    q = OnCuda(width)
    why_not, _ = attention.BACKENDS[backend]
    found = why_not(q, (5, 5))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (5, 2), (70, 70)])
def test_filled_up_heads_change_nothing(monkeypatch, window):
    qkv = heads(2, 300, D=12)
    monkeypatch.setattr(windows, "_missing_width", lambda q: -q.shape[3] % 8)
    for ours, oracle in run_both("sdpa", qkv, window):
        torch.testing.assert_close(ours, oracle)
