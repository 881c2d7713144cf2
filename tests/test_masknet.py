"""The lobe: its contract with SpeechBrain, and what must not change it."""

import copy

import pytest
import torch
import torch.nn.functional as F

from speechbrain_flashformer import FlashFormer
from speechbrain_flashformer.nnet.attention import attention_report
from speechbrain_flashformer.nnet.positions import Places


def small(**options):
    torch.manual_seed(0)
    defaults = {
        "in_channels": 12,
        "d_model": 32,
        "num_layers": 2,
        "nhead": 2,
        "d_ffn": 48,
        "d_frame": 16,
        "window": (4, 4),
    }
    return FlashFormer(**{**defaults, **options}).eval()


@pytest.mark.parametrize("num_spks", [1, 2, 3, 5])
@pytest.mark.parametrize("L", [1, 2, 7, 8, 9, 100])
@pytest.mark.parametrize("token_stride", [1, 2, 8])
def test_masks_for_any_length_and_number_of_speakers(num_spks, L, token_stride):
    masknet = small(num_spks=num_spks, token_stride=token_stride)
    masks = masknet(torch.rand(2, 12, L))
    assert masks.shape == (num_spks, 2, 12, L)
    assert masks.isfinite().all() and (masks >= 0).all()


def plain(weights, x, window, dilations, num_spks=2, nhead=2, order=20):
    """The masks [S, N, L] of frames x [L, N], by weights and formulas alone."""

    def linear(x, name):
        bias = weights.get(f"{name}.bias", 0)
        return x @ weights[f"{name}.weight"].T + bias

    def norm(x, name):
        scale = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        x = (x - x.mean(-1, keepdim=True)) / scale
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def remember(x, name, dilation):
        reach = order * dilation
        known, out = F.pad(x, (0, 0, reach, reach)), x
        taps = weights[f"{name}.weight"].flatten(1).T
        for i, tap in enumerate(taps):
            out = out + tap * known[i * dilation :][: len(x)]
        return out

    def gated_memory(x, name, dilations=(1,)):
        gate, v = linear(norm(x, f"{name}.norm"), f"{name}.expand").chunk(2, 1)
        for i, dilation in enumerate(dilations):
            v = remember(v, f"{name}.memory.{i}", dilation)
        return x + linear(gate * gate.sigmoid() * v, f"{name}.out")

    def attention(x, name):
        q, k, v = (
            linear(x, f"{name}.qkv").unflatten(1, (3, nhead, -1)).unbind(1)
        )
        half = q.shape[2] // 2
        place = torch.arange(len(x))[:, None, None]
        angle = place * 10000.0 ** (-torch.arange(half) / half)
        turn = torch.polar(torch.ones(angle.shape).double(), angle.double())
        # The real part of q times the conjugate of k is their dot product.
        q, k = (torch.complex(*y.chunk(2, 2)) * turn for y in (q, k))
        scores = torch.einsum("ihd,jhd->hij", q, k.conj()).real
        ahead = place.view(1, -1) - place.view(-1, 1)
        hidden = (ahead < -window[0]) | (ahead > window[1])
        scores = (scores / (2 * half) ** 0.5).masked_fill(hidden, -torch.inf)
        out = torch.einsum("hij,jhd->ihd", scores.softmax(2), v)
        return linear(out.flatten(1), f"{name}.out")

    def layer(x, name):
        update = attention(
            norm(x, f"{name}.norm_attention"), f"{name}.attention"
        )
        x = x + weights[f"{name}.scale_attention.weight"] * update
        x = gated_memory(x, f"{name}.fsmn", dilations)
        update = linear(norm(x, f"{name}.norm_ffn"), f"{name}.ffn.expand")
        gate, value = update.chunk(2, 1)
        update = linear(gate * gate.sigmoid() * value, f"{name}.ffn.out")
        return x + weights[f"{name}.scale_ffn.weight"] * update

    amplitude = x.square().mean(1, keepdim=True).sqrt()
    share = amplitude / amplitude.sum() / x.shape[1]
    x = x - (share * x).sum()
    x = x / (share * x.square()).sum().sqrt()
    x = x * weights["norm_in.weight"] + weights["norm_in.bias"]
    x = linear(x, "project")
    rates = len([name for name in weights if name.startswith("merge.")]) // 2
    skips = []
    for i in range(rates):
        x = gated_memory(x, f"down.{i}")
        skips.append(x)
        x = linear(torch.cat([x[::2], x[1::2]], 1), f"merge.{i}")
    for i in range(len([n for n in weights if n.endswith("norm_ffn.bias")])):
        x = layer(x, f"layers.{i}")
    for i in reversed(range(rates)):
        x = linear(x, f"split.{i}").reshape(2 * len(x), -1)
        x = gated_memory(x + skips[i], f"up.{i}")
    masks = linear(norm(x, "norm_out"), "masks").clamp(min=0)
    return masks.T.unflatten(0, (num_spks, -1))


@torch.no_grad()
@pytest.mark.parametrize("token_stride", [1, 8])
def test_it_computes_what_the_formulas_say(token_stride):
    masknet = small(token_stride=token_stride).double()
    for parameter in masknet.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.rand(1, 12, 160, dtype=torch.float64)
    expected = plain(masknet.state_dict(), x[0].T, (4, 4), (1, 2))
    assert expected.std() > 0.1
    torch.testing.assert_close(masknet(x)[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_original_arrangement_attends_over_every_frame():
    masknet = small(token_stride=1, window=None)
    assert not masknet.down and not masknet.up
    with attention_report() as ran:
        masknet(torch.rand(1, 12, 50))
    assert len(ran) == 2
    # Frames far apart are joined in one layer; through the norm, whose
    # statistics are given here, they would be in any network.
    x, one = torch.rand(1, 12, 400, requires_grad=True), torch.ones(1)
    masknet(x, statistics=(one, 2 * one))[..., -1].sum().backward()
    assert x.grad[0, :, 0].any()


@pytest.mark.parametrize("token_stride", [1, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"window": (4, 4)},
        {"window": None},
        {"causal": True, "future_tokens": 1},
    ],
    ids=str,
)
def test_a_row_alone_equals_the_same_row_in_a_padded_batch(
    token_stride, options
):
    masknet = small(token_stride=token_stride, **options).double()
    lengths = torch.tensor([97, 64, 31, 1])
    x = torch.rand(4, 12, 97, dtype=torch.float64)
    for b, n in enumerate(lengths):
        x[b, :, n:] = 9.0  # padding that would be noticed
    masks = masknet(x, lengths)
    for b, n in enumerate(lengths):
        alone = masknet(x[b : b + 1, :, :n])
        torch.testing.assert_close(masks[:, b : b + 1, :, :n], alone)


def test_dropout_is_on_every_residual_branch():
    layer, x = small(dropout=1.0).layers[0], torch.randn(2, 10, 32)
    positions = Places(16)(x)
    assert torch.equal(layer.train()(x, positions), x)
    assert not torch.equal(layer.eval()(x, positions), x)


def test_the_backend_asked_for_is_the_one_that_runs():
    with attention_report() as ran:
        small(attention_backend="sdpa")(torch.rand(1, 12, 50))
    assert [entry["backend"] for entry in ran] == ["sdpa"] * 2
    with pytest.raises(RuntimeError, match="'torch_flash' cannot run here"):
        small(attention_backend="torch_flash")(torch.rand(1, 12, 50))


def test_rows_of_a_batch_do_not_mix():
    masknet = small()
    x = torch.rand(3, 12, 50)
    torch.testing.assert_close(masknet(x)[:, 1:2], masknet(x[1:2]))


def test_level_of_the_mixture_changes_nothing():
    masknet = small()
    x = torch.rand(1, 12, 50)
    torch.testing.assert_close(masknet(1e-3 * x), masknet(x))


def test_silence_is_finite():
    masknet = small().train()
    x = torch.zeros(1, 12, 50, requires_grad=True)
    masknet(x).sum().backward()
    assert x.grad.isfinite().all()
    for p in masknet.parameters():
        assert p.grad.isfinite().all()


def test_special_starts_survive_a_recursive_reset(reset):
    masknet = small()
    special = {
        name: p.clone()
        for name, p in masknet.named_parameters()
        if "scale" in name
    }
    assert special
    reset(masknet)
    after = dict(masknet.named_parameters())
    for name, before in special.items():
        torch.testing.assert_close(after[name], before)
    # Every other matrix did get a new draw, of the same size.
    fresh = small()
    for (name, p), q in zip(masknet.named_parameters(), fresh.parameters()):
        if p.ndim > 1:
            assert not torch.equal(p, q), name
            assert 0.5 < p.std() / q.std() < 2, name


# Kernels for float32 are others than those for float64, and depend on lengths.
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("B, L", [(1, 1999), (2, 1999), (3, 1000)])
def test_gradients_in_float32_are_those_in_float64(B, L, causal):
    options = {"window": (250, 250), "token_stride": 4, "causal": causal}
    masknet = small(**options)
    exact = small(**options).double()
    x, grad = torch.rand(B, 12, L), torch.randn(2, B, 12, L)
    masknet(x).backward(grad)
    exact(x.double()).backward(grad.double())
    pairs = zip(masknet.named_parameters(), exact.parameters())
    for (name, ours), theirs in pairs:
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
        assert error < 1e-2, name


def test_checkpointing_changes_memory_not_gradients():
    plain, saving = small().train(), small(checkpointing=True).train()
    x, runs = torch.rand(2, 12, 60), []
    for masknet in (plain, saving):
        ran = []
        for layer in masknet.layers:
            layer.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        masknet(x).square().sum().backward()
        runs.append(len(ran))
    # What is not kept runs once more in the backward pass.
    assert runs == [2, 4]
    for p, q in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_keys_do_not_depend_on_options_without_weights():
    keys = set(small().state_dict())
    for options in (
        {"window": None},
        {"attention_backend": "sdpa"},
        {"checkpointing": True},
        {"dropout": 0.1},
    ):
        assert set(small(**options).state_dict()) == keys
    size = sum(x.numel() for x in small().state_dict().values())
    assert size == sum(p.numel() for p in small().parameters())


def test_windowed_network_hears_a_finite_span():
    masknet = small(window=(2, 2), lookback=3, lookahead=3, dilations=(1, 2))
    x, one = torch.rand(1, 12, 1000, requires_grad=True), torch.ones(1)
    # The norm is global by design: its statistics are given.
    masknet(x, statistics=(one, 2 * one))[..., 504].sum().backward()
    heard = x.grad[0].any(0).nonzero().flatten()
    # Frame 504 is the first of its token. Memories of 3 on the way down and
    # up at 1, 2 and 4 frames; two layers of a window and two memories, 2 +
    # 3 + 6 tokens each; the frames of the last token.
    reach = 2 * 3 * (1 + 2 + 4) + 2 * (2 + 3 + 6) * 8
    assert reach - 8 < 504 - heard.min() <= reach + 7
    assert reach - 8 < heard.max() - 504 <= reach + 7


def test_a_causal_network_hears_its_token_and_the_future_asked_for():
    masknet = small(causal=True, future_tokens=2)
    x = torch.rand(1, 12, 200, requires_grad=True)
    masknet(x)[..., 80].sum().backward()  # the first frame of a token
    last = x.grad[0].any(0).nonzero().max().item()
    assert last - 80 == masknet.receptive_field[1] == 3 * 8 - 1


def test_autocast_keeps_the_shape_and_nearly_the_values():
    masknet = small()
    x = torch.rand(2, 12, 60)
    with torch.autocast("cpu", torch.bfloat16):
        masks = masknet(x)
    assert (masks.float() - masknet(x)).abs().max() < 0.05


def test_half_precision_weights_run_and_padding_stays_unheard():
    masknet = small().bfloat16()
    x = torch.rand(2, 12, 3000).bfloat16()
    masks = masknet(x, torch.tensor([3000, 2700]))
    assert masks.dtype == torch.bfloat16
    alone = masknet(x[1:, :, :2700])
    torch.testing.assert_close(masks[:, 1:, :, :2700], alone)


@pytest.mark.parametrize("d_frame", [5, 16, 40])
def test_width_of_frames_is_as_given(d_frame):
    masknet = small(d_frame=d_frame)
    assert masknet.project.out_features == d_frame
    assert masknet(torch.rand(1, 12, 20)).isfinite().all()


def test_compiles_without_a_break():
    masknet = small()
    compiled = torch.compile(masknet, fullgraph=True, backend="aot_eager")
    x = torch.rand(1, 12, 64)
    torch.testing.assert_close(compiled(x), masknet(x))


def test_a_compiled_network_is_for_all_lengths():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    masknet = small()
    compiled = torch.compile(masknet, backend=backend)
    for length in (64, 80, 96, 112, 128):
        compiled(torch.rand(1, 12, length))
    # One for the first length, and one for all others.
    assert len(graphs) <= 2


def test_deep_copies_are_equal():
    masknet = small()
    x = torch.rand(1, 12, 30)
    torch.testing.assert_close(copy.deepcopy(masknet)(x), masknet(x))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"d_model": 33}, "d_model 33 is not divisible by nhead 2"),
        ({"d_model": 30}, "even head width"),
        ({"token_stride": 6}, "power of two, got 6"),
        ({"token_stride": 0}, "power of two, got 0"),
        ({"num_spks": 0}, "num_spks must be 1 or more, got 0"),
        ({"nhead": 0}, "nhead must be 1 or more, got 0"),
        ({"window": 100}, "window must be .left, right."),
        ({"window": (-2, 0)}, "window must be .left, right."),
    ],
)
def test_impossible_sizes_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize("shape", [(12, 50), (1, 11, 50), (1, 12, 0)])
def test_wrong_input_is_refused(shape):
    with pytest.raises(ValueError, match=r"\[batch, 12, frames\]"):
        small()(torch.rand(shape))


def test_wrong_lengths_are_refused():
    for lengths in (torch.ones(3).long(), torch.ones(2)):
        with pytest.raises(ValueError, match=r"lengths must be \[2\], whole"):
            small()(torch.rand(2, 12, 50), lengths)


def test_unknown_backend_is_refused_before_training():
    with pytest.raises(ValueError, match="unknown attention backend 'flsh'"):
        small(attention_backend="flsh")


@pytest.mark.parametrize(
    "window, future_tokens, expected",
    [
        ((5, 0), 0, (True, 7)),
        ((-1, 0), 0, (False, 7)),
        ((-1, 0), 2, (False, 23)),
    ],
)
def test_each_side_has_its_own_reach(window, future_tokens, expected):
    """An unbounded past leaves the future as it is."""
    masknet = small(causal=True, window=window, future_tokens=future_tokens)
    past, future = masknet.receptive_field
    assert (past > 0, future) == expected
    offline = small(window=(-1, 3))
    assert offline.receptive_field[0] == -1
    assert offline.receptive_field[1] == small(window=(3, 3)).receptive_field[1]
