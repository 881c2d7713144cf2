"""What a model makes of mixtures that are heard otherwise."""

from types import SimpleNamespace

import pytest
import torch

RATE = 8000


@pytest.fixture(scope="module")
def bench(load_benchmark):
    return load_benchmark("robustness")


@pytest.fixture
def signals():
    """A mixture and its two sources, [T, 3], 2.5 s."""
    generator = torch.Generator().manual_seed(0)
    sources = torch.randn(20000, 2, generator=generator)
    return torch.cat([sources.sum(1, keepdim=True), sources], 1)


def model(separate):
    """Gives what ``separate`` makes of mixtures [1, T]."""
    return SimpleNamespace(
        hparams=SimpleNamespace(sample_rate=RATE), separate_batch=separate
    )


def test_who_leaves_the_mixture_gains_nothing(bench, signals):
    """The same is heard and scored, whatever is done to it."""
    idle = model(lambda mixture: mixture[..., None].expand(-1, -1, 2))
    for name, change, arrange in bench.CONDITIONS:
        gain = bench.gain(idle, signals, change, arrange)
        assert gain == pytest.approx(0, abs=1e-3), name


def test_what_is_heard(bench, signals):
    heard = {
        name: change(RATE, signals) for name, change, _ in bench.CONDITIONS
    }
    alone = heard["as is"]
    assert torch.equal(alone, signals)
    late = heard["after 3 s of silence"]
    assert not late[:24000].any() and torch.equal(late[24000:], signals)
    click = heard["after a click"]
    assert torch.equal(click[800:], signals) and click.count_nonzero() == (
        signals.count_nonzero() + 1
    )
    assert click[400, 0] == 10 * signals[:, 0].abs().max()
    for name, most in (("noise at 20 dB", -20), ("noise at 10 dB", -10)):
        noise = (heard[name] - signals)[:, 0]
        ratio = noise.square().mean() / signals[:, 0].square().mean()
        assert 10 * ratio.log10() == pytest.approx(most, abs=0.2)
        assert torch.equal(heard[name][:, 1:], signals[:, 1:])
    clipped = heard["clipped"][:, 0].abs().max()
    assert clipped == pytest.approx(2 * signals[:, 0].std().item())
    assert torch.equal(heard["upside down"], -signals)
    one = heard["one speaker upside down"]
    assert torch.equal(one[:, 1:], signals[:, 1:] * torch.tensor([-1, 1]))
    rest = signals[:, 0] - signals[:, 1:].sum(1)  # noise stays
    torch.testing.assert_close(one[:, 0] - one[:, 1:].sum(1), rest)
    power = torch.fft.rfft(heard["through a telephone"], dim=0).abs().square()
    hertz = torch.linspace(0, RATE / 2, len(power))
    assert (power[hertz < 100].mean(0) < 0.01 * power.mean(0)).all()
    assert (power[hertz > 3900].mean(0) < 0.05 * power.mean(0)).all()


def test_an_order_for_each_second_mends_what_is_exchanged(bench, signals):
    sources = signals[None, :, 1:]
    # Right for a second, exchanged for the next.
    confused = torch.cat([sources[:, :8000], sources[:, 8000:].flip(2)], 1)
    arranged = bench.in_order_of_each(1, RATE, sources, confused)
    torch.testing.assert_close(arranged, sources)
    whole = bench.in_one_order(RATE, sources, confused)
    assert not torch.allclose(whole, sources)


def test_one_row_for_each_condition(bench, packed_once, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "OUT", tmp_path / "out.csv")
    monkeypatch.setattr(bench, "MIXTURES", 1)
    monkeypatch.setattr(bench, "find_sets", lambda *_: [("noise", None)])
    monkeypatch.setattr(
        bench,
        "load_mixtures",
        lambda *_: iter([list(torch.randn(3, 9000))] * 2),
    )
    scored, gain = [], bench.gain
    monkeypatch.setattr(
        bench, "gain", lambda *words: scored.append(words) or gain(*words)
    )
    bench.main(packed_once, [])
    assert len(scored) == len(bench.CONDITIONS)
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == "condition,noise"
    assert len(lines) == 1 + len(bench.CONDITIONS)
