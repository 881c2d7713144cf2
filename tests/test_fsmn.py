"""FSMN: the filter is the paper's sum, and its reach is what it says."""

import pytest
import torch
import torch.nn.functional as F

from speechbrain_flashformer.nnet import pieces as nnet_pieces
from speechbrain_flashformer.nnet.fsmn import FSMN, GatedFSMN


@pytest.mark.parametrize(
    "lookback, lookahead", [(4, 4), (6, 1), (0, 3), (5, 0)]
)
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("T", [1, 5, 40])
def test_equals_the_sum_over_taps(lookback, lookahead, dilation, T):
    memory = FSMN(3, lookback, lookahead, dilation).double()
    x = torch.randn(2, T, 3, dtype=torch.float64, requires_grad=True)
    expected = x.clone()
    for tap in range(-lookback, lookahead + 1):
        weight = memory.weight[:, 0, 0, tap + lookback]
        for t in range(T):
            source = t + tap * dilation
            if 0 <= source < T:
                step = torch.zeros_like(x)
                step[:, t] = 1
                expected = expected + step * (x[:, source] * weight)[:, None]
    torch.testing.assert_close(memory(x), expected)
    grad = torch.randn_like(x)
    inputs = (x, memory.weight)
    for ours, oracle in zip(
        torch.autograd.grad(memory(x), inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
    ):
        torch.testing.assert_close(ours, oracle)


# In float32 the gradient is another kernel's, which was wrong at a third of all
# lengths, these among them.
@pytest.mark.parametrize("T", [50, 125, 250, 500, 512, 1999, 2000])
@pytest.mark.parametrize("lookahead, dilation", [(20, 1), (20, 2), (0, 1)])
@pytest.mark.parametrize("B", [1, 2])
def test_gradient_in_float32_is_the_sum_over_time(B, lookahead, dilation, T):
    memory = FSMN(16, 20, lookahead, dilation)
    x, grad = torch.randn(2, B, T, 16).unbind()
    memory(x).backward(grad)
    sides = (20 * dilation, lookahead * dilation)
    wide, grad = F.pad(x.double(), (0, 0, *sides)), grad.double()
    expected = torch.stack(
        [
            (wide[:, start : start + T] * grad).sum((0, 1))
            for start in range(0, sum(sides) + 1, dilation)
        ],
        -1,
    )
    ours = memory.weight.grad[:, 0, 0].double()
    assert (ours - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("lookahead", [0, 2])
def test_reach_is_the_orders_times_the_dilation(lookahead):
    memory = FSMN(1, lookback=3, lookahead=lookahead, dilation=2)
    x = torch.zeros(1, 41, 1)
    x[0, 20] = 1
    heard = memory(x)[0, :, 0].detach().nonzero().flatten().tolist()
    assert heard == list(range(20 - 2 * lookahead, 20 + 6 + 1, 2))


def test_causal_when_nothing_is_looked_ahead():
    block = GatedFSMN(4, 8, lookback=5, lookahead=0, dilations=(1, 2))
    x = torch.randn(1, 30, 4, requires_grad=True)
    block(x)[0, 12].sum().backward()
    assert not x.grad[0, 13:].any() and x.grad[0, 12].any()


def test_one_branch_gates_what_the_other_remembers():
    block = GatedFSMN(4, 8, lookback=5, lookahead=2, dilations=(1, 3))
    x = torch.randn(2, 30, 4)
    u, v = block.expand(block.norm(x)).split(8, 2)
    remembered = block.memory[1](block.memory[0](v))
    expected = x + block.out(u * u.sigmoid() * remembered)
    torch.testing.assert_close(block(x), expected)


def test_padding_is_never_remembered():
    block = GatedFSMN(4, 8, lookback=5, lookahead=5, dilations=(1, 2)).eval()
    x = torch.randn(1, 30, 4)
    keep = (torch.arange(30) < 17).float()[None, :, None]
    torch.testing.assert_close(block(x, keep)[:, :17], block(x[:, :17]))


@pytest.mark.parametrize("T", [20, 21, 65])
@pytest.mark.parametrize("lookahead", [0, 4])
def test_segments_give_what_the_whole_gives(monkeypatch, T, lookahead):
    block = GatedFSMN(4, 8, lookback=3, lookahead=lookahead, dilations=(1, 2))
    x, keep = torch.randn(2, T, 4), torch.ones(2, T, 1)
    keep[1, T // 2 :] = 0
    sizes = []
    block.norm.register_forward_pre_hook(
        lambda _, inputs: sizes.append(inputs[0].shape[1])
    )
    for mask in (None, keep):
        whole = block(x, mask).detach()
        monkeypatch.setattr(nnet_pieces, "PIECE", 10)
        sizes.clear()
        with torch.no_grad():
            torch.testing.assert_close(block(x, mask), whole)
        monkeypatch.undo()
        # What is around a segment is as long as the memories reach.
        assert max(sizes) <= 10 + sum(block.receptive_field) and len(
            sizes
        ) == -(-T // 10)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_in_bfloat16_filters_as_the_memory_does():
    """On CPU in float32: the kernel in bfloat16 hangs for few channels."""
    memory = FSMN(8, lookback=3, lookahead=3).bfloat16()
    x = torch.randn(1, 40, 8).bfloat16()
    traced = torch.jit.trace(memory, x)
    torch.testing.assert_close(traced(x), memory(x))


def test_a_memory_begins_small():
    memory = FSMN(64, lookback=10, lookahead=5)
    assert 0.2 < memory.weight.abs().max() <= 1 / 16**0.5


@pytest.mark.parametrize("wrong", [(-1, 0, 1), (0, -1, 1), (1, 1, 0)])
def test_impossible_orders_are_refused(wrong):
    with pytest.raises(ValueError, match="FSMN needs"):
        FSMN(4, *wrong)
