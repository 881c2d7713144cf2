"""Muon: torch's own steps, on the matrices that a weight holds."""

import copy

import pytest
import torch

from speechbrain_flashformer import FlashFormer
from speechbrain_flashformer.training.optim import (
    Muon,
    matrix_groups,
    orthogonalized,
)

OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}


def train(optimizer, weights, steps=3):
    torch.manual_seed(1)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()


def parameters(*shapes):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_steps_are_those_of_torch(adjust, nesterov):
    shapes = (12, 8), (8, 12), (8, 8), (12, 8), (6, 6)
    ours, theirs = parameters(*shapes), parameters(*shapes)
    options = OPTIONS | {"adjust_lr_fn": adjust, "nesterov": nesterov}
    train(Muon(ours, **options), ours)
    train(torch.optim.Muon(theirs, **options), theirs)
    begin = parameters(*shapes)
    for a, b, c in zip(ours, theirs, begin):
        # Torch's are in bfloat16: 8 bits of precision in each iteration.
        assert (a - b).norm() < 0.03 * (b - c).norm()


def set_capabilities(monkeypatch, **present):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: present)


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "avx2"])
def test_bfloat16_only_where_the_cpu_has_instructions(monkeypatch, name):
    set_capabilities(monkeypatch, **{name: True})
    matrices = torch.randn(3, 12, 8)
    found = orthogonalized(matrices, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    is_rounded = torch.equal(found, found.bfloat16().float())
    assert is_rounded == (name != "avx2")


def test_half_precision_is_not_slow_without_instructions(monkeypatch):
    set_capabilities(monkeypatch)
    x = torch.randn(3, 12, 8).bfloat16()
    options = (3.4445, -4.7750, 2.0315), 5, 1e-7
    expected = orthogonalized(x.float(), *options).bfloat16()
    assert torch.equal(orthogonalized(x, *options), expected)


def test_orthogonalized_in_float32_is_exact(monkeypatch):
    set_capabilities(monkeypatch)
    matrices = torch.randn(3, 12, 8)
    ours = orthogonalized(matrices, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    for matrix, result in zip(matrices, ours):
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        expected = (u * s) @ v
        torch.testing.assert_close(
            result.double(), expected, atol=1e-4, rtol=1e-4
        )


def test_stacked_matrices_step_as_if_alone():
    whole = parameters((12, 4))
    parts = [torch.nn.Parameter(x.detach().clone()) for x in whole[0].split(4)]
    options = OPTIONS | {"adjust_lr_fn": "match_rms_adamw"}
    optimizers = (
        Muon([{"params": whole, "parts": 3}], **options),
        Muon(parts, **options),
    )
    for _ in range(3):
        gradient = torch.randn(12, 4)
        whole[0].grad = gradient
        for part, slope in zip(parts, gradient.split(4)):
            part.grad = slope.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(whole[0], torch.cat([*parts]))


def test_a_training_goes_on_where_it_stopped():
    one, two = parameters((12, 4)), parameters((12, 4))
    groups = [{"params": one, "parts": 3}]
    first = Muon(groups, **OPTIONS)
    train(first, one)
    two[0].data = one[0].data.clone()
    second = Muon([{"params": two, "parts": 3}], **OPTIONS)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(first, one), train(second, two)
    torch.testing.assert_close(one[0], two[0], atol=0, rtol=0)


def test_a_weight_that_is_not_so_many_matrices_is_refused():
    with pytest.raises(ValueError, match="10 rows is not 3 matrices"):
        Muon([{"params": parameters((10, 4)), "parts": 3}])


def test_all_matrices_of_the_masknet_are_taken_apart():
    masknet = FlashFormer(16, d_model=32, num_layers=2, nhead=2, d_ffn=48)
    groups = {x["parts"]: x["params"] for x in matrix_groups(masknet)}
    names = {id(p): name for name, p in masknet.named_parameters()}
    stacked = {count: {names[id(p)] for p in groups[count]} for count in (2, 3)}
    assert stacked[3] == {f"layers.{i}.attention.qkv.weight" for i in (0, 1)}
    assert all(name.endswith(".expand.weight") for name in stacked[2])
    count = sum(len(group) for group in groups.values())
    assert count == sum(p.ndim == 2 for p in masknet.parameters())
    # Each layer has two gates; three blocks on each way through the frames.
    assert len(stacked[2]) == 2 * 2 + 6


def test_a_group_that_is_added_has_its_parts():
    one, other = parameters((12, 4), (12, 4))
    optimizer = Muon([one], **OPTIONS)
    optimizer.add_param_group({"params": [other], "parts": 3})
    train(optimizer, [one, other])
    with pytest.raises(ValueError, match="12 rows is not 5 matrices"):
        optimizer.add_param_group({"params": parameters((12, 4)), "parts": 5})
