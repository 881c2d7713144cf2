"""Augmentation: a mixture stays the sum of its sources and its noise."""

from types import SimpleNamespace

import pytest
import torch
from speechbrain.augment.time_domain import DropChunk, DropFreq, SpeedPerturb
from speechbrain.dataio.batch import PaddedBatch

from speechbrain_flashformer.training.augment import augment

EVERYTHING = {
    "num_spks": 2,
    "use_speedperturb": True,
    "speed_perturb": SpeedPerturb(8000, [90, 110]),
    "use_rand_shift": True,
    "min_shift": -300,
    "max_shift": 300,
    "use_wavedrop": True,
    "drop_freq": DropFreq(),
    "drop_chunk": DropChunk(),
}
OFF = {k: False for k in EVERYTHING if k.startswith("use_")}


def batch(*lengths, noise=0.3):
    items = []
    for length in lengths:
        s1, s2, rest = torch.randn(3, length)
        mixture = s1 + s2 + noise * rest
        items.append({"mix_sig": mixture, "s1_sig": s1, "s2_sig": s2})
    return PaddedBatch(items)


def run(x, **settings):
    augment(x, SimpleNamespace(**EVERYTHING | OFF | settings))
    return x.mix_sig.data, x.s1_sig.data, x.s2_sig.data


def test_nothing_asked_nothing_done():
    x = batch(4000)
    before = x.mix_sig.data.clone(), x.s1_sig.data.clone()
    mixture, s1, _ = run(x)
    assert torch.equal(mixture, before[0]) and torch.equal(s1, before[1])
    augment(batch(4000), SimpleNamespace(num_spks=2))


def test_speed_changes_all_signals_alike_and_the_noise_stays():
    x = batch(4000)
    noise = x.mix_sig.data - x.s1_sig.data - x.s2_sig.data
    torch.manual_seed(0)
    changed = EVERYTHING["speed_perturb"](noise)
    torch.manual_seed(0)
    mixture, s1, s2 = run(x, use_speedperturb=True)
    assert mixture.shape == s1.shape == s2.shape == changed.shape
    assert mixture.shape[1] != 4000
    torch.testing.assert_close(mixture - s1 - s2, changed, atol=1e-4, rtol=0)


def test_speed_is_left_to_dynamic_mixing():
    x = batch(4000)
    mixture, *_ = run(x, use_speedperturb=True, dynamic_mixing=True)
    assert mixture.shape == (1, 4000)


def test_shift_moves_each_source_and_leaves_padding_and_noise():
    x = batch(4000, 1000)
    before = [getattr(x, n).data.clone() for n in ("mix_sig", "s1_sig")]
    second = x.s2_sig.data.clone()
    noise = before[0] - before[1] - second
    mixture, s1, s2 = run(x, use_rand_shift=True)
    torch.testing.assert_close(mixture - s1 - s2, noise, atol=1e-5, rtol=0)
    shifts = set()
    for b, n in enumerate((4000, 1000)):
        assert not s1[b, n:].any() and not mixture[b, n:].any()
        for shift in range(-300, 301):
            if torch.equal(before[1][b, :n].roll(shift), s1[b, :n]):
                shifts.add(shift)
    assert len(shifts) == 2
    # The sources of a mixture do not move together.
    moved = (torch.fft.rfft(x[0]) for x in (before[1], s1, second, s2))
    old, new, other_old, other_new = moved
    one = torch.fft.irfft(old.conj() * new).argmax()
    other = torch.fft.irfft(other_old.conj() * other_new).argmax()
    assert one != other


def test_wavedrop_changes_the_mixture_alone():
    x = batch(4000)
    before = [getattr(x, n).data.clone() for n in ("mix_sig", "s1_sig")]
    mixture, s1, _ = run(x, use_wavedrop=True)
    assert torch.equal(s1, before[1])
    assert not torch.equal(mixture, before[0])


def test_wavedrop_takes_frequencies_and_pieces():
    x = batch(4000)
    before = x.mix_sig.data.clone()
    mixture, *_ = run(
        x,
        use_wavedrop=True,
        drop_freq=lambda signal: 2 * signal,
        drop_chunk=lambda signal, lengths: signal + lengths[:, None],
    )
    torch.testing.assert_close(mixture, 2 * before + 1)


@pytest.mark.parametrize("seed", range(3))
def test_the_same_state_of_chance_gives_the_same(seed):
    results = []
    for _ in range(2):
        torch.manual_seed(seed)
        results.append(run(batch(2000), **{k: True for k in OFF}))
    assert all(map(torch.equal, *results))
