"""Streaming is the same network: any cutting gives what the whole gives."""

import copy
import io

import pytest
import torch
from speechbrain.lobes.models.dual_path import Decoder, Encoder

from speechbrain_flashformer import FlashFormer
from speechbrain_flashformer.nnet.separator import separate
from speechbrain_flashformer.nnet.step import CompiledSteps, StreamingStep
from speechbrain_flashformer.nnet.streaming import (
    MOST_TOKENS,
    StreamingSeparator,
    lookahead_tokens,
)

OPTIONS = {
    "in_channels": 16,
    "d_model": 32,
    "num_layers": 2,
    "nhead": 2,
    "d_ffn": 32,
    "d_frame": 16,
    "token_stride": 4,
    "window": (12, 12),
    "lookback": 5,
    "dilations": (1, 2),
    "causal": True,
}


def make(kernel=16, **options):
    torch.manual_seed(1)
    modules = (
        Encoder(kernel_size=kernel, out_channels=16),
        FlashFormer(**{**OPTIONS, **options}),
        Decoder(16, 1, kernel_size=kernel, stride=kernel // 2, bias=False),
    )
    return [module.eval() for module in modules]


def stream(modules, mixture, sizes):
    separator = StreamingSeparator(*modules, batch_size=len(mixture))
    out, place = [], 0
    for size in sizes:
        out.append(separator.feed(mixture[:, place : place + size]))
        place += size
    assert place >= mixture.shape[1]
    return torch.cat([*out, separator.flush()], 1)


def cuts(how, samples):
    generator = torch.Generator().manual_seed(2)
    if how == "random":
        sizes = torch.randint(0, 700, (samples,), generator=generator).tolist()
    else:
        sizes = [how] * (samples // how + 1)
    total, chosen = 0, []
    for size in sizes:
        if total >= samples:
            break
        chosen.append(size)
        total += size
    return chosen


# --- exactness ---------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("how", [1, 7, 32, 128, 10**6, "random"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"future_tokens": 2},
        {"token_stride": 1},
        {"token_stride": 8, "future_tokens": 1},
        {"kernel": 32},
        {"num_spks": 3},
        {"lookback": 0, "window": (0, 0)},
    ],
    ids=str,
)
def test_any_cutting_gives_the_whole(options, how):
    modules = make(**options)
    samples = 700 if how == 1 else 5003
    mixture = torch.randn(1, samples)
    whole = separate(mixture, *modules)
    out = stream(modules, mixture, cuts(how, samples))
    scale = whole.abs().max().item()
    assert out.shape == whole.shape
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-5 * scale)


@torch.no_grad()
def test_the_whole_is_given_beyond_what_is_remembered():
    """Longer than the span of the norm and than one run."""
    encoder, masknet, _ = modules = make(future_tokens=1)
    mixture = torch.randn(1, 50_000)
    whole = separate(mixture, *modules)
    blocks, pieces = [], []
    for part, sizes in ((encoder, blocks), (masknet.project, pieces)):
        part.register_forward_pre_hook(
            lambda _, inputs, sizes=sizes: sizes.append(inputs[0].shape[1])
        )
    for sizes in ([50_000], [777] * 65):
        out = stream(modules, mixture, sizes)
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-5)
    # However long a block is, no more of it is held at once.
    assert max(pieces) == MOST_TOKENS * 4
    assert max(blocks) == MOST_TOKENS * 4 * 8 + 8


@torch.no_grad()
def test_after_a_click_all_is_as_exact_as_before():
    """In sums over the past nothing of it stays."""
    modules = make()
    mixture = 0.1 * torch.randn(1, 60_000)
    mixture[:, 20_000] = 1e9
    whole = separate(mixture, *modules)[:, 40_000:]
    out = stream(modules, mixture, [128] * 470)[:, 40_000:]
    scale = whole.abs().max().item()
    assert scale < 1
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-5 * scale)


@torch.no_grad()
@pytest.mark.parametrize("samples", [0, 1, 15, 16, 17, 24, 40, 41, 47, 48, 80])
def test_streams_of_any_length_are_whole(samples):
    modules = make(future_tokens=1)
    mixture = torch.randn(2, samples)
    out = stream(modules, mixture, [9] * 10)
    assert out.shape == (2, samples, 2)
    if samples:
        whole = separate(mixture, *modules)
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"future_tokens": 2},
        {"token_stride": 1, "future_tokens": 1},
        {"kernel": 32},
        {"lookback": 0, "window": (0, 0), "num_spks": 3},
    ],
    ids=str,
)
def test_steps_with_their_state_give_the_stream(options, tokens):
    modules = make(**options)
    step = StreamingStep(*modules)
    size, overlap = tokens * step.token, step.kernel - step.stride
    mixture = torch.randn(2, overlap + 40 * size)
    mixture[:, 300:310] = torch.nan
    expected = StreamingSeparator(*modules, batch_size=2).feed(mixture)
    state = step.make_state(2)
    state["samples"], out = mixture[:, :overlap], []
    for block in mixture[:, overlap:].split(size, 1):
        sources, *new = step(block, *state.values())
        state = dict(zip(state, new))
        out.append(sources)
    out = torch.cat(out, 1)[:, step.delay :]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_of_unlike_length_are_as_alone():
    modules = make(future_tokens=1)
    mixture = torch.randn(2, 3000)
    lengths = torch.tensor([1.0, 0.63])
    together = separate(mixture, *modules, lengths)
    alone = separate(mixture[1:, :1890], *modules)
    torch.testing.assert_close(together[1:, :1890], alone, rtol=0, atol=1e-5)


def test_weights_are_those_of_the_offline_network():
    causal = FlashFormer(**{**OPTIONS, "lookahead": 0})
    offline = FlashFormer(**{**OPTIONS, "causal": False, "lookahead": 0})
    causal.load_state_dict(offline.state_dict())


# --- causality and latency ---------------------------------------------------


@pytest.mark.parametrize("future_tokens", [0, 2])
@pytest.mark.parametrize("kernel", [16, 32])
def test_nothing_is_heard_beyond_the_latency(kernel, future_tokens):
    modules = make(kernel, future_tokens=future_tokens)
    latency = StreamingSeparator(*modules).latency
    stride = kernel // 2
    assert latency == (4 * (1 + future_tokens) - 1) * stride + kernel
    furthest = 0
    for place in range(1600, 1600 + 4 * stride):
        mixture = torch.randn(1, 4000, requires_grad=True)
        separate(mixture, *modules)[0, place].sum().backward()
        heard = mixture.grad[0].nonzero().max().item()
        furthest = max(furthest, heard - place + 1)
    # It is the least such number: some sample needs all of it.
    assert furthest == latency


@torch.no_grad()
def test_samples_come_out_within_the_latency():
    modules = make(future_tokens=1)
    separator = StreamingSeparator(*modules)
    given = 0
    for fed in range(1, 1000):
        given += separator.feed(torch.randn(1, 1)).shape[1]
        assert given > fed - separator.latency


@torch.no_grad()
@pytest.mark.parametrize("future_tokens", [0, 2])
def test_an_impulse_is_heard_as_early_as_the_latency(future_tokens):
    modules = make(future_tokens=future_tokens)
    sound = 0.1 * torch.randn(1, 2000)
    plain = stream(modules, sound, [100] * 20)
    earliest = 0
    for place in range(1000, 1032):  # each place in a token of 32 samples
        impulse = sound.clone()
        impulse[:, place] += 1
        heard = (stream(modules, impulse, [100] * 20) != plain).any(2)
        earliest = max(earliest, place - heard.int().argmax().item() + 1)
    assert earliest == StreamingSeparator(*modules).latency


# --- state -------------------------------------------------------------------


def sizes_of(state):
    if isinstance(state, torch.Tensor):
        return [state.untyped_storage().nbytes()]
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list):
        return [size for part in state for size in sizes_of(part)]
    return []


@torch.no_grad()
def test_state_does_not_grow():
    separator = StreamingSeparator(*make(future_tokens=1))
    block, totals = torch.randn(1, 32), []
    for _ in range(300):
        separator.feed(block)
        totals.append(sum(sizes_of(separator.state)))
    assert max(totals[50:]) == max(totals[200:]) and totals[-1] < 200_000


@torch.no_grad()
def test_state_can_be_copied_saved_and_put_back():
    modules = make()
    mixture = torch.randn(1, 4000)
    separator = StreamingSeparator(*modules)
    separator.feed(mixture[:, :1111])
    file = io.BytesIO()
    torch.save(separator.state, file)
    file.seek(0)
    copied = copy.deepcopy(separator.state)
    expected = separator.feed(mixture[:, 1111:])
    for state in (torch.load(file, weights_only=True), copied):
        again = StreamingSeparator(*modules)
        again.state = state
        torch.testing.assert_close(again.feed(mixture[:, 1111:]), expected)


@torch.no_grad()
def test_streams_do_not_hear_each_other():
    modules = make()
    mixture = torch.randn(2, 2000)
    one, other = (StreamingSeparator(*modules) for _ in range(2))
    out = []
    for place in range(0, 2000, 100):
        piece = mixture[:, place : place + 100]
        out.append(one.feed(piece[:1]))
        other.feed(piece[1:])
    expected = stream(modules, mixture[:1], [2000])
    out = torch.cat([*out, one.flush()], 1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_contexts_can_be_copied_and_saved():
    _, masknet, _ = make(future_tokens=1)
    mix_w = torch.rand(2, 16, 52)
    context = masknet.make_streaming_context(2)
    masknet.step(mix_w, context=context)
    file = io.BytesIO()
    torch.save(context, file)
    file.seek(0)
    copies = copy.deepcopy(context), torch.load(file, weights_only=True)
    expected = masknet.step(mix_w, context=context)
    for each in copies:
        out = masknet.step(mix_w, context=each)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


# --- bad input ---------------------------------------------------------------


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return all(map(same, one, other))
    return one == other


@pytest.mark.parametrize(
    "block, message",
    [
        (torch.zeros(10), r"a block must be \[1, samples\]"),
        (torch.zeros(2, 10), r"a block must be \[1, samples\]"),
        (torch.zeros(1, 1, 10), r"a block must be \[1, samples\]"),
        (torch.zeros(1, 10, dtype=torch.int16), "floating point"),
        (torch.zeros(1, 10, dtype=torch.cfloat), "floating point"),
        ([0.0], "a block must be a torch.Tensor, got list"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(block, message):
    with pytest.raises(ValueError, match=message):
        StreamingSeparator(*make()).feed(block)


def test_an_empty_block_changes_nothing():
    separator = StreamingSeparator(*make())
    separator.feed(torch.randn(1, 1000))
    before = copy.deepcopy(separator.state)
    assert separator.feed(torch.zeros(1, 0)).shape == (1, 0, 2)
    assert same(separator.state, before)


def test_what_comes_out_can_be_used_in_training():
    out = StreamingSeparator(*make()).feed(torch.randn(1, 1000))
    out += 1
    (out * torch.ones(2, requires_grad=True)).sum().backward()


def test_a_flushed_stream_is_over():
    separator = StreamingSeparator(*make())
    separator.flush()
    with pytest.raises(RuntimeError, match="flushed"):
        separator.feed(torch.zeros(1, 10))
    with pytest.raises(RuntimeError, match="flushed"):
        separator.flush()


@torch.no_grad()
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e35])
def test_a_broken_block_is_taken_as_silence(bad):
    modules = make()
    mixture = torch.randn(1, 4000)
    broken = mixture.clone()
    broken[:, 1000:1100] = bad
    mixture[:, 1000:1100] = 0
    torch.testing.assert_close(
        stream(modules, broken, [100] * 40), stream(modules, mixture, [4000])
    )


@pytest.mark.parametrize(
    "options",
    [{"nhead": 4}, {"dilations": (2, 1)}, {"kernel": 32}, {"d_ffn": 48}],
    ids=str,
)
def test_states_of_others_are_refused(options):
    """Weights of the same shapes are not enough."""
    separator = StreamingSeparator(*make())
    separator.state = StreamingSeparator(*make(**options)).state
    with pytest.raises(ValueError, match="was made by another"):
        separator.feed(torch.zeros(1, 1000))


def test_states_that_do_not_fit_are_refused():
    modules = make()
    separator = StreamingSeparator(*modules)
    wide = [module.double() for module in make()]
    for state, message in (
        ({}, "not the state of a StreamingSep"),
        (StreamingSeparator(*wide).state, "type torch.float64 in place of"),
        (StreamingSeparator(*modules, 3).state, "streams 3 in place of 1"),
    ):
        separator.state = state
        with pytest.raises(ValueError, match=message):
            separator.feed(torch.zeros(1, 1000))


def test_a_stream_at_least_is_asked_for():
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        StreamingSeparator(*make(), batch_size=0)


def test_other_masknets_are_refused():
    encoder, _, decoder = make()
    with pytest.raises(ValueError, match="causal FlashFormer as masknet, got"):
        StreamingSeparator(encoder, torch.nn.Identity(), decoder)


def test_a_decoder_with_a_bias_is_refused():
    encoder, masknet, _ = make()
    decoder = Decoder(16, 1, kernel_size=16, stride=8, bias=True)
    with pytest.raises(ValueError, match="a decoder without bias"):
        StreamingSeparator(encoder, masknet, decoder)


@pytest.mark.parametrize("options", [{"causal": False}, {"window": (-1, 0)}])
def test_networks_that_cannot_stream_say_so(options):
    _, masknet, _ = make(**options)
    with pytest.raises(ValueError, match="streaming needs causal: true"):
        masknet.make_streaming_context()


@pytest.mark.parametrize(
    "options", [{"future_tokens": -1}, {"causal": False, "future_tokens": 1}]
)
def test_a_future_needs_a_causal_network(options):
    with pytest.raises(ValueError, match="future_tokens"):
        make(**options)


def test_thirds_of_a_millisecond_may_be_written_in_decimals():
    # A token is 64 samples, 5.333 ms.
    for lookahead_ms, tokens in ((0, 0), (5.33, 1), (10.67, 2), (16, 3)):
        assert lookahead_tokens(lookahead_ms, 12000, 16, 4) == tokens
    with pytest.raises(ValueError, match=r"5.33333 ms: take 5.33333 or 10.6"):
        lookahead_tokens(8, 12000, 16, 4)


def test_a_causal_network_takes_no_statistics():
    _, masknet, _ = make()
    one = torch.ones(1)
    with pytest.raises(ValueError, match="takes no statistics"):
        masknet(torch.rand(1, 16, 8), statistics=(one, one))


@pytest.mark.parametrize("lookahead", [0, 2])
def test_traced_steps_give_the_same_stream_in_any_cutting(lookahead):
    torch.manual_seed(0)
    encoder = Encoder(kernel_size=16, out_channels=32)
    masknet = FlashFormer(
        *(32, 2, 24, 2, 2, 48, 16),
        causal=True,
        window=(9, 0),
        future_tokens=lookahead,
    ).eval()
    decoder = Decoder(32, 1, kernel_size=16, stride=8, bias=False)
    run = CompiledSteps(StreamingStep(encoder, masknet, decoder), 3)
    for size in 1, 37, 64, 301:
        streams = [
            StreamingSeparator(encoder, masknet, decoder, 2, run=how)
            for how in (None, run)
        ]
        heard = torch.randn(2, 2500)
        expected, sources = (
            torch.cat(
                [*map(stream.feed, heard.split(size, 1)), stream.flush()], 1
            )
            for stream in streams
        )
        assert torch.allclose(sources, expected, atol=1e-6 * expected.max())
    assert {key[1] // run.step.token for key in run.traces} <= {1, 2, 3}
    assert run.traces
    for network in encoder, masknet, decoder:
        network.bfloat16()
    heard = torch.randn(2, 640, dtype=torch.bfloat16).split(64, 1)
    whole, traced = (
        torch.cat([*map(stream.feed, heard)], 1)
        for stream in (
            StreamingSeparator(encoder, masknet, decoder, 2, run=how)
            for how in (None, run)
        )
    )
    torch.testing.assert_close(traced, whole)
