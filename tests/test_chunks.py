"""Long recordings: chunked equals whole, and speakers stay in order."""

import pytest
import torch
from speechbrain.lobes.models.dual_path import Decoder, Encoder
from synthetic import RATE, swapped_share, voice

from speechbrain_flashformer import FlashFormer
from speechbrain_flashformer.inference.chunks import (
    FADE,
    ChunkPlan,
    ChunkSeparator,
)
from speechbrain_flashformer.inference.pipeline import flow
from speechbrain_flashformer.inference.speakers import SpeakerOrder
from speechbrain_flashformer.nnet.separator import encoder_statistics, separate

PLAN = ChunkPlan(chunk=4 * RATE, overlap=RATE, align=64)


def run(mixture, network, plan=PLAN, block=12345, num_spks=2):
    blocks = mixture.split(block, 1)
    separator = ChunkSeparator(
        lambda x: network(x).transpose(1, 2), RATE, plan, num_spks
    )
    return torch.cat(list(flow(blocks, [separator])), 2).transpose(1, 2)


def identity(mixture):
    return torch.stack([mixture, 0.5 * mixture], 2)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("block", [999, 50000])
@pytest.mark.parametrize(
    "samples",
    [1, 100, 4 * RATE - 1, 4 * RATE, 4 * RATE + 1, 7 * RATE + 40, 123457],
)
def test_identity_network_gives_the_input(samples, block, batch):
    mixture = torch.randn(2, samples)
    plan = ChunkPlan(PLAN.chunk, PLAN.overlap, 64, batch)
    out = run(mixture, identity, plan, block)
    torch.testing.assert_close(out, identity(mixture), rtol=0, atol=1e-6)


def test_one_chunk_gives_way_to_the_next_in_mid_overlap():
    """The n-th chunk is heard as n, of which the seam is a ramp."""
    count = 0

    def network(chunks):
        nonlocal count
        count += 1
        return torch.full((1, chunks.shape[1], 1), float(count))

    out = run(torch.randn(1, 7 * RATE), network, num_spks=1)[0, :, 0]
    fade = round(FADE * RATE)
    middle = PLAN.hop + PLAN.overlap // 2
    assert (out[: middle - fade // 2] == 1).all()
    assert (out[middle + fade // 2 :] == 2).all()
    ramp = out[middle - fade // 2 : middle + fade // 2]
    step = torch.full((fade - 1,), 1 / fade)
    torch.testing.assert_close(ramp.diff(), step, atol=1e-6, rtol=0)
    assert ramp.mean().item() == pytest.approx(1.5)


def test_chunks_in_one_call_are_as_long_as_the_plan_says():
    sizes = []

    def network(chunks):
        sizes.append(tuple(chunks.shape))
        return identity(chunks)

    run(torch.randn(1, 20 * RATE), network, ChunkPlan(32000, 8000, 1, 2))
    assert sizes[:3] == [(2, 32000), (2, 32000), (2, 32000)]
    assert all(size[1] == 32000 for size in sizes)


def test_nothing_in_gives_nothing_out():
    assert list(flow([], [ChunkSeparator(identity, RATE, PLAN, 2)])) == []


@pytest.mark.parametrize("chunk, overlap", [(100, 50), (100, 0)])
def test_plan_refuses_chunks_that_do_not_fit(chunk, overlap):
    with pytest.raises(ValueError, match="more than twice"):
        ChunkPlan(chunk, overlap)


def test_plan_starts_chunks_on_tokens():
    plan = ChunkPlan(16000, 4000, align=64)
    assert plan.hop % 64 == 0 and plan.chunk == plan.hop + plan.overlap


# --- chunked = whole ---------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A network with a short reach, so that chunks can hold it."""
    torch.manual_seed(0)
    encoder = Encoder(kernel_size=16, out_channels=16)
    masknet = FlashFormer(
        16,
        d_model=32,
        num_layers=2,
        nhead=2,
        d_ffn=32,
        d_frame=16,
        window=(8, 8),
        lookback=4,
        lookahead=4,
        dilations=(1, 2),
    )
    decoder = Decoder(16, 1, kernel_size=16, stride=8, bias=False)
    return encoder.eval(), masknet.eval(), decoder.eval()


def test_reach_is_what_the_outputs_depend_on(small):
    _, masknet, _ = small
    left, right = masknet.receptive_field
    middle = 1000
    mix_w = torch.rand(1, 16, 2000, requires_grad=True)
    # Handed in, or every output would depend on every input.
    one = torch.ones(1)
    masks = masknet(mix_w, statistics=(one, 2 * one))
    masks[..., middle].sum().backward()
    seen = mix_w.grad.abs().sum((0, 1)).nonzero()
    first, last = seen.min().item(), seen.max().item()
    # A token's place within the reach is not its first or last frame only.
    assert 0 <= first - (middle - left) < 2 * masknet.token_stride
    assert 0 <= (middle + right) - last < 2 * masknet.token_stride


def test_reach_of_an_unbounded_window():
    assert FlashFormer(16, d_model=48, window=None).receptive_field == (-1, -1)


@torch.no_grad()
@pytest.mark.parametrize("samples", [100000, 100001, 123456])
def test_chunks_with_enough_overlap_equal_the_whole(small, samples):
    encoder, masknet, decoder = small
    mixture = torch.randn(1, samples) * torch.linspace(0.1, 1, samples)
    whole = separate(mixture, encoder, masknet, decoder)
    statistics = encoder_statistics(mixture.split(777, 1), encoder)
    reach = 8 * max(masknet.receptive_field) + 16
    plan = ChunkPlan(6 * reach, 2 * reach + 1000, align=64)
    assert plan.chunk < samples / 3

    def network(chunks):
        return separate(
            chunks, encoder, masknet, decoder, statistics=statistics
        )

    out = run(mixture, network, plan)
    scale = whole.abs().max().item()
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-5 * scale)


@torch.no_grad()
def test_chunks_keep_the_loudness_of_the_whole(small):
    mixture = torch.randn(1, 30 * RATE)
    out = run(mixture, lambda chunks: separate(chunks, *small))
    whole = separate(mixture, *small)
    loudness = 10 * torch.log10(
        out.square().mean((0, 1)) / whole.square().mean((0, 1))
    )
    assert loudness.abs().max() < 0.1


@pytest.mark.parametrize("samples", [5, 16, 23, 24, 25, 8000, 8003])
def test_encoder_statistics_are_those_of_the_whole(small, samples):
    encoder = small[0]
    mixture = torch.randn(2, samples)
    given = []

    def masknet(mix_w):
        given.append(mix_w)
        return mix_w[None]

    separate(mixture, encoder, masknet, small[2])
    mean, power = encoder_statistics(mixture.split(7, 1), encoder)
    energy = given[0].square().mean(1)
    weight = energy.sqrt()
    for found, frames in ((mean, given[0].mean(1)), (power, energy)):
        expected = (frames * weight).sum(1) / weight.sum(1)
        torch.testing.assert_close(found.float(), expected)


# --- order of the speakers ---------------------------------------------------


class Oracle:
    """A network that knows the sources [S, T] and orders them at random."""

    def __init__(self, sources, leak=0.1):
        self.sources, self.leak = sources, leak
        self.mixture = sources.sum(0, keepdim=True)
        self.generator = torch.Generator().manual_seed(3)
        self.swaps = 0

    def __call__(self, chunks):
        out = []
        for chunk in chunks:
            start = self._find(chunk)
            true = self.sources[:, start : start + len(chunk)]
            true = true + self.leak * true.flip(0)
            order = torch.randperm(len(true), generator=self.generator)
            self.swaps += bool(order[0])
            out.append(true[order].T)
        return torch.stack(out)

    def _find(self, chunk):
        for start in range(0, self.mixture.shape[1], 32):
            if torch.equal(self.mixture[0, start:][: len(chunk)], chunk):
                return start
        raise AssertionError("not a piece of the mixture")


@pytest.fixture
def sources():
    return torch.stack(
        [voice(60, 110, 1.0, seed=1), voice(60, 210, 1.6, seed=2)]
    )


def test_swapped_outputs_come_out_in_order(sources):
    oracle = Oracle(sources)
    out = run(oracle.mixture, oracle)[0].T
    assert oracle.swaps >= 5
    assert swapped_share(out, sources) == 0


def test_order_holds_through_a_pause_of_one_speaker(sources):
    sources[0, 20 * RATE : 32 * RATE] = 0
    oracle = Oracle(sources)
    out = run(oracle.mixture, oracle)[0].T
    assert oracle.swaps >= 5
    assert swapped_share(out, sources) == 0


def test_order_holds_through_a_pause_of_both(sources):
    # No overlap has speech in it: only the voices tell.
    sources[:, 20 * RATE : 32 * RATE] = 0
    oracle = Oracle(sources)
    out = run(oracle.mixture, oracle)[0].T
    assert oracle.swaps >= 5
    assert swapped_share(out, sources) == 0


def test_turns_are_given_to_their_speakers(sources):
    """Each speaks alone for 7 s, with 3 s of silence between."""
    for turn in range(6):
        start = turn * 10 * RATE
        sources[1 - turn % 2, start : start + 10 * RATE] = 0
        sources[:, start + 7 * RATE : start + 10 * RATE] = 0
    oracle = Oracle(sources, leak=0.02)
    out = run(oracle.mixture, oracle)[0].T
    assert oracle.swaps >= 5
    assert swapped_share(out, sources) == 0


def test_three_speakers_come_out_in_order(sources):
    third = voice(60, 150, 0.6, seed=5)
    sources = torch.cat([sources, third[None]])
    oracle = Oracle(sources, leak=0)
    out = run(oracle.mixture, oracle, num_spks=3)[0].T
    assert oracle.swaps >= 5
    assert swapped_share(out, sources) == 0


@pytest.mark.parametrize("who, order", [(0, [1, 0]), (1, [0, 1])])
def test_a_voice_is_known_from_the_first_chunk(sources, who, order):
    """After a silence one speaks: who was heard before, or somebody new."""
    silence = torch.zeros(15 * RATE)
    heard = SpeakerOrder(2, RATE)
    heard.arrange(None, torch.stack([sources[0, : 15 * RATE], silence]))
    # It comes as the second output, and is the first speaker or the other.
    fresh = torch.stack([silence, sources[who, : 15 * RATE]])
    assert heard.arrange(torch.zeros(2, 900), fresh) == order


def at_random(channels, seed):
    """A network that knows each channel's sources, [C, S, T]."""
    generator = torch.Generator().manual_seed(seed)
    calls, swaps = [], []

    def network(chunks):
        start = PLAN.hop * len(calls)
        calls.append(len(chunks))
        out = []
        for sources in channels:
            order = torch.randperm(len(sources), generator=generator)
            swaps.append(order[0].item())
            piece = sources[:, start : start + chunks.shape[1]]
            out.append(piece[order].T)
        return torch.stack(out)

    return network, swaps


# Ends on a chunk, so that each chunk begins where the plan says.
SAMPLES = PLAN.hop * 5 + PLAN.chunk


@pytest.mark.parametrize("seed", range(6))
def test_channels_of_one_conversation_have_one_order(sources, seed):
    sources = sources[:, :SAMPLES]
    if seed % 2:  # one speaker is late
        sources[1, : 2 * RATE] = 0
    # A microphone at another place: other levels, 4 ms later.
    far = torch.tensor([[0.1], [0.9]]) * sources.roll(32, 1)
    network, swaps = at_random([sources, far], seed)
    out = run(torch.randn(2, SAMPLES), network)
    assert 0 < sum(swaps) < len(swaps)
    for channel, true in zip(out, (sources, far)):
        assert swapped_share(channel.T, true) == 0
    one, other = (channel.T / channel.norm(dim=0)[:, None] for channel in out)
    alike = one @ other.roll(-32, 1).T
    assert alike.diag().min() > 0.7 > alike.fliplr().diag().max()


@pytest.mark.parametrize("seed", range(4))
def test_channels_of_other_conversations_stay_in_order(sources, seed):
    other = torch.stack(
        [voice(60, 130, 1.2, seed=3), voice(60, 230, 1.4, seed=4)]
    )
    both = sources[:, :SAMPLES], other[:, :SAMPLES]
    network, swaps = at_random(both, seed)
    out = run(torch.randn(2, SAMPLES), network)
    assert 0 < sum(swaps) < len(swaps)
    for channel, true in zip(out, both):
        assert swapped_share(channel.T, true) == 0


def test_the_middle_of_an_overlap_counts_most():
    """At its ends one of the chunks has heard little of what is around."""
    speech = torch.randn(2, 4000)
    fresh = speech.clone()
    for end in (slice(0, 500), slice(-500, None)):
        fresh[:, end] = 3 * speech[:, end].flip(0)
    assert SpeakerOrder(2, RATE).arrange(speech, fresh) == [0, 1]
    assert SpeakerOrder(2, RATE).arrange(speech, speech.flip(0)) == [1, 0]


def test_silence_and_noise_do_not_upset_the_order():
    order = SpeakerOrder(2, RATE)
    silence = torch.zeros(2, 4000)
    assert order.arrange(None, silence) == [0, 1]
    assert order.arrange(None, silence, silence) == [0, 1]
    assert order.arrange(torch.zeros(2, 900), torch.zeros(2, 8000)) == [0, 1]
    noise = torch.randn(2, 8000)
    assert order.arrange(noise[:, :900], noise.flip(0)) == [1, 0]
