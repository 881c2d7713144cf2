"""Losses: equal to slow references, blind to padding; silence teaches."""

import itertools

import pytest
import torch
from speechbrain.nnet.losses import get_si_snr_with_pitwrapper

from speechbrain_flashformer.training.losses import (
    fixes_level,
    is_defined_for_silence,
    pit_mixed_loss,
    pit_si_snr_loss,
    pit_snr_loss,
)

LOSSES = (pit_si_snr_loss, pit_snr_loss, pit_mixed_loss)


@pytest.mark.parametrize("num_spks", [1, 2, 3])
def test_loss_equals_speechbrains_when_nothing_is_padded(num_spks):
    targets, predictions = torch.randn(2, 4, 800, num_spks)
    expected = get_si_snr_with_pitwrapper(targets, predictions)
    torch.testing.assert_close(
        pit_si_snr_loss(targets, predictions), expected, atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_does_not_count(loss):
    targets, predictions = torch.randn(2, 2, 800, 2)
    lengths = torch.tensor([1.0, 0.4])
    alone = loss(targets[1:, :320], predictions[1:, :320])
    targets[1, 320:], predictions[1, 320:] = 5.0, -7.0
    padded = loss(targets, predictions, lengths)
    torch.testing.assert_close(padded[1:], alone)


def test_scale_of_the_estimate_does_not_count():
    targets, predictions = torch.randn(2, 1, 800, 2)
    torch.testing.assert_close(
        pit_si_snr_loss(targets, 0.01 * predictions + 3),
        pit_si_snr_loss(targets, predictions),
        atol=1e-3,
        rtol=0,
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_silent_signals_are_finite_with_finite_gradients(loss):
    targets = torch.randn(2, 100, 2)
    targets[0] = 0
    predictions = torch.zeros(2, 100, 2, requires_grad=True)
    values = loss(targets, predictions)
    values.sum().backward()
    assert values.isfinite().all() and predictions.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_an_estimate_for_each_source(loss):
    with pytest.raises(ValueError, match="one shape"):
        loss(torch.randn(1, 100, 2), torch.randn(1, 100, 1))


# --- SNR ---------------------------------------------------------------------


@pytest.mark.parametrize("num_spks", [1, 2, 3])
def test_snr_by_its_definition(num_spks):
    targets = torch.randn(3, 400, num_spks, dtype=torch.float64)
    noise = torch.randn(3, 400, num_spks, dtype=torch.float64)
    predictions = targets.roll(1, 2) + 0.5 * noise
    for b in range(3):
        tried = []
        for order in itertools.permutations(range(num_spks)):
            errors = (
                (targets - predictions[..., list(order)])[b].square().sum(0)
            )
            ratios = errors / targets[b].square().sum(0)
            tried.append((10 * (ratios + 1e-3).log10()).mean().item())
        ours = pit_snr_loss(targets[b : b + 1], predictions[b : b + 1])
        assert ours.item() == pytest.approx(min(tried), abs=1e-4)


def test_snr_stops_at_its_limit():
    targets = torch.randn(1, 400, 2)
    assert pit_snr_loss(targets, targets).item() == pytest.approx(-30)
    assert pit_snr_loss(targets, targets, limit_db=20).item() == pytest.approx(
        -20
    )


@pytest.mark.parametrize("change", [lambda x: -x, lambda x: 0.5 * x])
def test_snr_fixes_level_and_polarity(change):
    targets = torch.randn(1, 400, 2)
    assert pit_snr_loss(targets, change(targets)) > -6.1
    assert pit_si_snr_loss(targets, change(targets)) < -60


def test_a_silent_source_teaches_silence():
    targets = torch.randn(2, 400, 2)
    targets[..., 1] = 0
    predictions = torch.randn(2, 400, 2, requires_grad=True)
    pit_snr_loss(targets, predictions).sum().backward()
    # Of the pair, one is to become the source and the other quieter.
    for x, target, slope in zip(predictions, targets, predictions.grad):
        quieter = (slope * x.detach()).sum(0) / (
            slope.norm(dim=0) * x.detach().norm(dim=0)
        )
        other = quieter.argmax()
        assert quieter[other] == pytest.approx(1, abs=1e-5)
        assert (slope[:, 1 - other] * target[:, 0]).sum() < 0


def test_for_a_silent_source_the_other_estimate_is_measured():
    targets = torch.randn(1, 400, 2)
    targets[..., 1] = 0
    # 20 dB below the only source: 10 log10(1e-2 + 1e-3).
    predictions = torch.stack([0.1 * targets[..., 0], targets[..., 0]], 2)
    expected = (-30 + 10 * torch.tensor(1.1e-2).log10()) / 2
    torch.testing.assert_close(
        pit_snr_loss(targets, predictions), expected[None]
    )


def test_a_source_far_below_the_others_counts_as_silent():
    targets = torch.randn(1, 400, 2) * torch.tensor([1.0, 1e-4])
    predictions = targets * torch.tensor([1.0, 0.0])
    assert pit_snr_loss(targets, predictions).item() == pytest.approx(
        -30, abs=1e-3
    )


def test_only_snr_tells_the_level():
    assert fixes_level(pit_snr_loss) and not fixes_level(pit_si_snr_loss)
    assert not fixes_level(lambda *x: get_si_snr_with_pitwrapper(*x[:2]))


def test_only_si_snr_is_not_defined_for_silence():
    assert [is_defined_for_silence(loss) for loss in LOSSES] == [
        False,
        True,
        True,
    ]
    assert not is_defined_for_silence(
        lambda *x: get_si_snr_with_pitwrapper(*x[:2])
    )


def test_sound_past_the_end_is_silence_to_the_mixed_loss():
    targets, predictions = torch.randn(2, 1, 400, 2)
    targets[:, :200, 1] = 0
    lengths = torch.tensor([0.5])
    found = pit_mixed_loss(targets, predictions, lengths)
    torch.testing.assert_close(
        found, pit_snr_loss(targets, predictions, lengths)
    )


@pytest.mark.parametrize("silent", [[], [0], [1, 2], [0, 1, 2]])
def test_the_mixed_loss_is_that_of_each_mixture(silent):
    targets, predictions = torch.randn(2, 3, 400, 2)
    targets[silent, :, 1] = 0
    predictions.requires_grad_()
    lengths = torch.tensor([1.0, 0.5, 0.7])
    found = pit_mixed_loss(targets, predictions, lengths)
    for i in range(3):
        loss = pit_snr_loss if i in silent else pit_si_snr_loss
        alone = (x[i : i + 1] for x in (targets, predictions, lengths))
        torch.testing.assert_close(found[i : i + 1], loss(*alone))
    found.sum().backward()
    assert predictions.grad.isfinite().all()
