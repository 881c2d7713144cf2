"""torch's tools on the network: they work on modules, which must be called."""

import copy

import pytest
import torch
import torch.nn as nn
from torch.ao.quantization import quantize_dynamic

from speechbrain_flashformer import FlashFormer
from speechbrain_flashformer.training.optim import matrix_groups


class LowRank(nn.Module):
    """A layer and a small one beside it, as adapters are."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


@pytest.fixture(params=[False, True], ids=["offline", "causal"])
def masknet(request):
    return FlashFormer(
        16,
        d_model=32,
        num_layers=1,
        nhead=2,
        d_ffn=32,
        window=(20, 20),
        causal=request.param,
    ).eval()


def linears(masknet):
    return [n for n, m in masknet.named_modules() if isinstance(m, nn.Linear)]


def run(masknet, mix_w):
    """Masks of the whole, and where it can, the same from a stream."""
    masks = masknet(mix_w)
    if masknet.can_stream:
        context = masknet.make_streaming_context(len(mix_w))
        streamed = masknet.step(mix_w, context=context)
        torch.testing.assert_close(streamed, masks, rtol=0, atol=1e-3)
    return masks


def wrap(masknet, wrapper):
    masknet = copy.deepcopy(masknet)
    for name in linears(masknet):
        parent, _, last = name.rpartition(".")
        layer = masknet.get_submodule(name)
        setattr(masknet.get_submodule(parent), last, wrapper(layer))
    return masknet


@torch.no_grad()
def test_every_layer_can_be_wrapped(masknet):
    mix_w = torch.rand(2, 16, 80)
    expected = run(masknet, mix_w)
    for wrapper in (nn.Sequential, LowRank):
        wrapped = wrap(masknet, wrapper)
        torch.testing.assert_close(run(wrapped, mix_w), expected)


def test_what_is_wrapped_around_learns(masknet):
    adapted = wrap(masknet, LowRank)
    # The optimizer of matrices takes them too.
    assert sum(len(x["params"]) for x in matrix_groups(adapted)) == 3 * len(
        linears(masknet)
    )
    adapted(torch.rand(2, 16, 80)).sum().backward()
    for module in adapted.modules():
        if isinstance(module, LowRank):
            assert module.up.weight.grad.any()


def test_hooks_see_what_each_layer_takes_and_gives(masknet):
    seen, gradients = {}, []
    for name in linears(masknet):
        layer = masknet.get_submodule(name)
        layer.register_forward_hook(
            lambda module, given, out, name=name: seen.update(
                {name: (given[0], out)}
            )
        )
        layer.register_full_backward_hook(
            lambda module, *_, name=name: gradients.append(name)
        )
    masknet(torch.rand(2, 16, 80)).sum().backward()
    assert set(seen) == set(gradients) == set(linears(masknet))
    for name, (given, out) in seen.items():
        layer = masknet.get_submodule(name)
        expected = nn.functional.linear(given, layer.weight, layer.bias)
        torch.testing.assert_close(out, expected)


@torch.no_grad()
def test_dynamic_quantization(masknet):
    mix_w = torch.rand(2, 16, 80)
    expected = run(masknet, mix_w)
    found = run(quantize_dynamic(masknet, {nn.Linear}), mix_w)
    noise = (found - expected).square().sum() / expected.square().sum()
    assert 0 < noise < 1e-2


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_is_saved_and_loaded(masknet, gradients, tmp_path):
    mix_w = torch.rand(2, 16, 80)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(masknet, mix_w)
    torch.jit.save(traced, tmp_path / "traced.pt")
    loaded = torch.jit.load(tmp_path / "traced.pt")
    torch.testing.assert_close(loaded(mix_w), masknet(mix_w))
