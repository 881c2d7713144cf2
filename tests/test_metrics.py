"""Metrics: equal to slow references, blind to padding, order and scale."""

import itertools

import mir_eval
import numpy as np
import pytest
import torch

from speechbrain_flashformer.nnet.attention import attend
from speechbrain_flashformer.nnet.macs import count_macs
from speechbrain_flashformer.training.metrics import (
    best_order,
    padding_mask,
    reorder,
    sdr,
    si_snr,
)


def test_si_snr_by_its_definition():
    rng = np.random.default_rng(0)
    target, noise = rng.normal(size=(2, 500)) + 0.3
    estimate = 0.4 * target + noise
    s, e = target - target.mean(), estimate - estimate.mean()
    wanted = s * (e @ s) / (s @ s)
    expected = 10 * np.log10((wanted @ wanted) / ((e - wanted) ** 2).sum())
    ours = si_snr(
        torch.tensor(target)[None, :, None],
        torch.tensor(estimate)[None, :, None],
    )
    assert ours.item() == pytest.approx(expected, abs=1e-3)


def test_relative_lengths_are_rounded_to_whole_samples():
    """In float32 most lengths over T times T are not whole again."""
    samples = torch.arange(1, 1001)
    lengths = samples / 1001
    marked = padding_mask(torch.zeros(1000, 1001), lengths)
    assert torch.equal(marked.sum((1, 2)).long(), samples)


@pytest.mark.parametrize("num_spks", [2, 3, 4])
def test_best_order_is_the_best_of_all(num_spks):
    targets = torch.randn(3, 300, num_spks)
    # Of three and more no order that undoes itself.
    predictions = targets.roll(1, 2) + torch.randn(3, 300, num_spks)
    scores, order = best_order(targets, predictions)
    for b in range(3):
        tried = [
            si_snr(targets[b : b + 1], predictions[b : b + 1, :, list(p)])
            for p in itertools.permutations(range(num_spks))
        ]
        best = max(tried, key=lambda x: x.mean())
        torch.testing.assert_close(scores[b : b + 1], best)
    torch.testing.assert_close(
        si_snr(targets, reorder(predictions, order)), scores
    )


def test_sdr_agrees_with_mir_eval():
    rng = np.random.default_rng(1)
    target = rng.normal(size=(2, 4000))
    # Filtered, which SDR forgives, with interference and noise, which it
    # does not.
    estimate = np.stack(
        [np.convolve(x, [0.2, 0.9, -0.4])[:4000] for x in target]
    )
    estimate = estimate + 0.3 * target[::-1] + 0.1 * rng.normal(size=(2, 4000))
    expected, *_ = mir_eval.separation.bss_eval_sources(
        target, estimate, compute_permutation=False
    )
    ours = sdr(torch.tensor(target), torch.tensor(estimate))
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_sdr_of_silence_is_finite():
    x = torch.randn(1, 2000)
    assert sdr(torch.zeros(1, 2000), x).isfinite()
    assert sdr(x, torch.zeros(1, 2000)).isfinite()


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        best_order(torch.randn(1, 100, 2), torch.randn(1, 90, 2))


@pytest.mark.parametrize("length, window", [(40, (-1, -1)), (4096, (64, 64))])
def test_macs_count_the_attention_products(length, window):
    q = torch.zeros(1, length, 2, 8)
    # Scores and sums: each a product of width 8 for every key seen; blocks
    # of a window see a little more than the window.
    keys = length if window[0] < 0 else sum(window) + 1
    least = 2 * length * keys * 2 * 8
    macs = count_macs(attend, q, q, q, window)
    assert least <= macs <= 1.6 * least
    if window[0] < 0:
        assert macs == least
