"""Turns of a conversation come out in the output of their speaker."""

from itertools import product

import pytest
import torch
from synthetic import RATE, swapped_share, voice

from speechbrain_flashformer import build
from speechbrain_flashformer.inference import FlashFormerSeparation
from speechbrain_flashformer.inference.turns import (
    FADE,
    HEARD,
    HELD,
    ChannelTurns,
    TurnOrder,
    cheapest_path,
    segments,
)

VOICES = ((110, 1.0), (210, 1.6), (150, 0.6))


def conversation(speakers, turns, seconds=4, pause=0.6, seed=0):
    """Sources of turns one after the other, [S, T], and where each is."""
    length, step = round(seconds * RATE), round((seconds + pause) * RATE)
    sources = torch.zeros(speakers, step * turns)
    places = []
    for n in range(turns):
        pitch, tilt = VOICES[n % speakers]
        place = slice(n * step, n * step + length)
        sources[n % speakers, place] = voice(seconds, pitch, tilt, seed + n)
        places.append(place)
    return sources, places


def confuse(sources, places, seed, leak=0.1):
    """Give half of the turns to other outputs, as a network might."""
    generator = torch.Generator().manual_seed(seed)
    heard = sources + leak * sources.roll(1, 0)
    moved = 0
    for place in places[1:]:
        order = torch.randperm(len(sources), generator=generator)
        moved += not torch.equal(order, torch.arange(len(sources)))
        heard[:, place] = heard[:, place][order]
    assert moved > 1
    return heard


def run(heard, block=7777):
    stage = TurnOrder(len(heard), RATE)
    parts = [stage.feed(part) for part in heard[None].split(block, 2)]
    return torch.cat([*parts, stage.flush()], 2)[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("speakers", [2, 3])
def test_turns_come_out_with_their_speaker(speakers, seed):
    sources, places = conversation(speakers, 12)
    heard = confuse(sources, places, seed)
    out = run(heard)
    assert out.shape == heard.shape
    assert swapped_share(out, sources) == 0


@pytest.mark.parametrize("seed, since", [(1, 9), (2, 7), (2, 11)])
def test_the_network_may_change_its_order_for_good(seed, since):
    """Its later order is not the one of the profiles."""
    sources, places = conversation(2, 30, seed=100 * seed)
    heard = sources + 0.1 * sources.roll(1, 0)
    generator = torch.Generator().manual_seed(seed)
    for n, place in enumerate(places):
        other = torch.rand(1, generator=generator).item() < 0.2
        if other != (n >= since):
            heard[:, place] = heard[:, place].flip(0)
    assert swapped_share(run(heard), sources) == 0


def test_a_loud_click_changes_nothing():
    sources, places = conversation(2, 12)
    heard = confuse(sources, places, 0)
    click = slice(places[5].stop, places[5].stop + 80)
    heard[0, click] = 100 * heard.abs().max() * torch.hann_window(80)
    out = run(heard)
    out[:, click] = 0
    assert swapped_share(out, sources) == 0


def test_a_profile_has_every_segment_once():
    sources, places = conversation(2, 40)
    turns = ChannelTurns(2, RATE)
    _, alone, energy = turns.profile.frames(sources)
    spans = zip(*segments(energy, energy.shape[1]))
    frames = sum(alone[:, a:b].sum().item() for a, b in spans)
    half = round(HELD / 2 * RATE)
    for start in range(0, sources.shape[1], half):
        turns.arrange(sources[:, start : start + 2 * half], half)
    # Seams cut some frames.
    heard = turns.profile.counts.sum().item()
    assert heard == pytest.approx(frames, rel=0.02)


def test_voices_are_remembered_for_longer_than_is_held():
    """The second speaker is silent for twice the time that is compared."""
    first, places = conversation(2, 8)
    alone = torch.zeros(2, round(2.2 * HELD * RATE))
    alone[0] = voice(2.2 * HELD, *VOICES[0], seed=50)
    sources = torch.cat([first, alone, first.roll(1, 1)], 1)
    heard = torch.cat(
        [confuse(first, places, 1), alone.flip(0), first.roll(1, 1).flip(0)], 1
    )
    assert swapped_share(run(heard), sources) == 0


def test_blocks_do_not_matter():
    sources, places = conversation(2, 30)
    heard = confuse(sources, places, 5)
    assert heard.shape[1] > 2 * HELD * RATE
    whole = run(heard, heard.shape[1])
    for block in (999, 100000):
        assert torch.equal(run(heard, block), whole)


def test_the_sum_of_the_outputs_stays():
    sources, places = conversation(3, 24)
    heard = confuse(sources, places, 2)
    out = run(heard)
    assert not torch.equal(out, heard)
    torch.testing.assert_close(out.sum(0), heard.sum(0), atol=1e-6, rtol=0)


def test_an_order_fades_into_the_next():
    turns = ChannelTurns(2, RATE)
    which = torch.zeros(RATE, dtype=torch.long)
    which[RATE // 2 :] = 1
    constant = torch.tensor([[1.0], [-1.0]]).expand(2, RATE)
    out = turns._reorder(constant, which)
    # What comes next begins in the other order.
    more = turns._reorder(constant, torch.zeros(RATE, dtype=torch.long))
    assert more[0, 0] == -1 and more[0, -1] == 1
    assert more.diff().abs().max() < 2.01 / (FADE * RATE)
    assert out[0, 0] == 1 and out[0, -1] == -1 and abs(out[0, RATE // 2]) < 0.01
    assert out.diff().abs().max() < 2.01 / (FADE * RATE)


def test_who_talks_at_the_same_time_all_along_stays():
    """There is no turn that could be moved: the outputs are not changed."""
    both = torch.stack([voice(60, *VOICES[n], seed=n + 1) for n in range(2)])
    assert torch.equal(run(both), both)


def test_a_short_recording_stays_as_it_is():
    sources, places = conversation(2, 3, seconds=2, pause=0.3)
    assert sources.shape[1] < HEARD * RATE
    heard = sources.clone()
    heard[:, places[2]] = heard[:, places[2]].flip(0)
    assert torch.equal(run(heard), heard)


def test_little_speech_stays_as_it_is():
    sources, places = conversation(2, 3, seconds=2, pause=2)
    assert sources.shape[1] > HEARD * RATE
    heard = sources.clone()
    heard[:, places[2]] = heard[:, places[2]].flip(0)
    assert torch.equal(run(heard), heard)


@pytest.mark.parametrize("samples", [0, 1, 300, 5 * RATE])
def test_single_samples_and_noise_pass(samples):
    noise = torch.randn(2, samples)
    assert torch.equal(run(noise), noise)


def test_silence_passes():
    silence = torch.zeros(2, 70 * RATE)
    assert torch.equal(run(silence), silence)


def test_two_channels_pass_unchanged():
    sources, places = conversation(2, 12)
    heard = torch.stack([confuse(sources, places, seed) for seed in (1, 2)])
    stage = TurnOrder(2, RATE)
    out = torch.cat([stage.feed(heard), stage.flush()], 2)
    assert torch.equal(out, heard)


def test_the_path_is_the_cheapest_of_all():
    torch.manual_seed(0)
    costs, change = torch.rand(5, 3).double(), [0.1, 0.4, 0.2, 0.9, 0.0]

    def _cost(path):
        moves = zip(change, (1, *path), path)
        moved = sum(price for price, a, b in moves if a != b)
        return moved + sum(costs[g, o].item() for g, o in enumerate(path))

    best = min(product(range(3), repeat=5), key=_cost)
    path, cost = cheapest_path(costs, change, 1)
    assert path.tolist() == list(best)
    assert cost == pytest.approx(_cost(best))


def test_the_option_leaves_turns_with_the_network(monkeypatch):
    model = FlashFormerSeparation(
        dict(build("tiny", num_layers=1).eval().named_children()),
        {"num_spks": 2, "sample_rate": RATE},
    )
    sources, places = conversation(2, 12)
    heard = confuse(sources, places, 3)
    start = 0

    def separate(chunks, *networks, statistics):
        nonlocal start
        piece = heard[:, start : start + chunks.shape[1]]
        start += chunks.shape[1]
        return piece.T[None]

    monkeypatch.setattr(
        "speechbrain_flashformer.inference.pipeline.separate", separate
    )
    options = {"chunk": 100.0, "overlap": 1.0}
    outputs = {}
    for turns in ("network", "voice"):
        start = 0
        mixture = heard.sum(0, keepdim=True)
        out = model.separate_audio(mixture, turns=turns, **options)
        outputs[turns] = out[0].T
    assert torch.equal(outputs["network"], heard)
    assert swapped_share(outputs["voice"], sources) == 0
    with pytest.raises(ValueError, match="turns cannot be set with streaming"):
        model.separate_audio(heard[:1], turns="network", streaming=True)
    with pytest.raises(ValueError, match="turns is one of voice, network"):
        model.separate_audio(heard[:1], turns="speaker")
