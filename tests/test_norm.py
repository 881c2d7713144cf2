"""Norms of the input: what counts, what does not, what stays finite."""

import pytest
import torch

from speechbrain_flashformer import FlashFormer
from speechbrain_flashformer.nnet.norm import CumulativeNorm, GlobalNorm


def reference(x):
    """The last frame of x [L, N] by the mean and variance over all of x."""
    weight = x.square().mean(1).sqrt()
    weight = (weight / weight.sum())[:, None]
    mean = (weight * x).sum() / x.shape[1]
    variance = (weight * (x - mean).square()).sum() / x.shape[1]
    return (x[-1] - mean) / variance.sqrt()


def test_each_frame_counts_by_its_amplitude():
    x = torch.randn(2, 50, 12) * torch.rand(2, 50, 1) + 1
    normed = GlobalNorm(12)(x)
    for row, frames in zip(normed, x):
        torch.testing.assert_close(row[-1], reference(frames))


def test_a_stream_counts_the_frames_of_its_span():
    x = torch.randn(1, 60, 12) * torch.rand(1, 60, 1) + 1
    normed = CumulativeNorm(12, span=20)(x)
    for place in (0, 5, 19, 20, 21, 59):
        span = x[0, max(0, place - 19) : place + 1]
        torch.testing.assert_close(normed[0, place], reference(span))


@pytest.mark.parametrize("kind", [GlobalNorm, CumulativeNorm])
def test_gain_and_bias_are_of_each_channel(kind):
    norm = kind(*([12] if kind is GlobalNorm else [12, 20]))
    x = torch.randn(2, 50, 12)
    plain = norm(x).detach()
    gain, bias = torch.randn(2, 12)
    norm.load_state_dict({"weight": gain, "bias": bias})
    torch.testing.assert_close(norm(x), plain * gain + bias)


def test_silence_changes_nothing():
    x = torch.randn(2, 50, 12)
    silence = torch.zeros(2, 400, 12)
    for norm in (GlobalNorm(12), CumulativeNorm(12, span=1000)):
        among = norm(torch.cat([silence, x[:, :20], silence, x[:, 20:]], 1))
        spoken = torch.cat([among[:, 400:420], among[:, 820:]], 1)
        torch.testing.assert_close(spoken, norm(x), atol=1e-5, rtol=1e-5)


def test_padded_frames_do_not_count():
    x = torch.randn(1, 50, 12)
    keep = torch.arange(50)[None, :, None] < 30
    norm, loud = GlobalNorm(12), torch.cat([x[:, :30], 9 * x[:, 30:]], 1)
    alone, padded = norm(x[:, :30]), norm(loud, norm.reference(loud, keep))
    torch.testing.assert_close(padded[:, :30], alone)


def test_sums_in_half_precision_do_not_overflow():
    x = (100 * torch.randn(1, 5000, 12)).half()
    normed = GlobalNorm(12)(x)
    assert normed.dtype == torch.float16
    expected = GlobalNorm(12)(x.float())
    torch.testing.assert_close(normed.float(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("level", [1e-5, 1e10])
def test_the_level_makes_no_difference(level):
    x = torch.rand(1, 4000, 12)
    for norm in (GlobalNorm(12), CumulativeNorm(12, span=1000)):
        given = (level * x).requires_grad_()
        normed = norm(given)
        torch.testing.assert_close(normed, norm(x), atol=1e-3, rtol=1e-3)
        normed.square().sum().backward()
        assert given.grad.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 77, 2000])
def test_sums_are_exact_without_float64(cut):
    """Over spans as long as the yamls', after a click, however it is cut."""
    norm = CumulativeNorm(8, span=2000)
    x = torch.rand(1, 9000, 8) * torch.rand(1, 9000, 1)
    x[:, 100] *= 1e6
    context, parts = norm.make_streaming_context(x), []
    assert context["sums"].dtype == torch.float32
    for part in x[:, : 9000 if cut > 1 else 3000].split(cut, 1):
        parts.append(norm(part, context=context))
    found = torch.cat(parts, 1)
    wide = CumulativeNorm(8, span=2000).double()
    exact = wide(x.double())[:, : found.shape[1]].float()
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_norm_forgets():
    """A loud beginning is over when the span is, in both forms."""
    norm = CumulativeNorm(8, span=50)
    x = torch.randn(1, 300, 8)
    loud = x.clone()
    loud[:, :100] *= 1000
    torch.testing.assert_close(norm(x)[:, 150:], norm(loud)[:, 150:])
    context, parts = norm.make_streaming_context(x), []
    for part in loud.split(7, 1):
        parts.append(norm(part, context=context))
    torch.testing.assert_close(torch.cat(parts, 1), norm(loud))


def test_a_causal_network_remembers_500_tokens_unless_told():
    for stride in 1, 4, 8:
        model = FlashFormer(
            8, d_model=24, num_layers=1, token_stride=stride, causal=True
        )
        assert model.norm_in.span == 500 * stride
