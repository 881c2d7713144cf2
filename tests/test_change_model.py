"""Packed models made from others: averaged, or of another size."""

import change_model
import pytest
import torch

from speechbrain_flashformer.inference import FlashFormerSeparation
from speechbrain_flashformer.inference.pack import pack


def load(folder):
    return FlashFormerSeparation.from_hparams(folder)


def size(folder):
    layers = load(folder).mods.masknet.layers
    return len(layers), layers[0].ffn.out.in_features


def use_all(folder):
    """Let what is new add something."""
    path = folder / "masknet.ckpt"
    state = torch.load(path, weights_only=True)
    for key, value in state.items():
        if ".out." in key:
            value += 0.1 * torch.randn(value.shape)
    torch.save(state, path)


@pytest.fixture
def grown(packed_once, tmp_path):
    """Three layers, all in use."""
    layers, d_ffn = size(packed_once)
    change_model.resize(packed_once, tmp_path / "grown", layers + 2, d_ffn + 8)
    use_all(tmp_path / "grown")
    return tmp_path / "grown"


def test_it_separates_as_before_and_can_learn(grown, tmp_path):
    layers, d_ffn = size(grown)
    more, wider = 2 * layers + 1, d_ffn + 8
    change_model.resize(grown, tmp_path / "out", more, wider)
    assert size(tmp_path / "out") == (more, wider)
    before, after = load(grown), load(tmp_path / "out")
    mixture = torch.randn(2, 4000)
    torch.testing.assert_close(
        after.separate_batch(mixture),
        before.separate_batch(mixture),
        rtol=0,
        atol=1e-5,
    )
    # What is new has a gradient, or it would add nothing for ever.
    masknet = after.mods.masknet.requires_grad_(True)
    masknet(torch.rand(1, masknet.in_channels, 40)).square().sum().backward()
    for layer in masknet.layers:
        for name in change_model.OUTS:
            gradient = layer.get_submodule(name).weight.grad
            assert gradient.abs().amax(0).gt(0).all()
    use_all(tmp_path / "out")
    other = load(tmp_path / "out").separate_batch(mixture)
    assert not torch.allclose(other, before.separate_batch(mixture), atol=1e-2)


def test_what_is_not_asked_for_stays(grown, tmp_path):
    layers, d_ffn = size(grown)
    change_model.resize(grown, tmp_path / "out", num_layers=layers + 1)
    assert size(tmp_path / "out") == (layers + 1, d_ffn)
    kinds = {
        value.dtype
        for folder in (grown, tmp_path / "out")
        for value in torch.load(folder / "masknet.ckpt").values()
    }
    assert len(kinds) == 1
    # A yaml may leave a number to the network's default.
    hparams = "masknet: !new:FlashFormer\n    d_model: 8\n"
    wider = change_model.with_numbers(hparams, {"d_ffn": 9})
    assert wider == hparams + "    d_ffn: 9\n"


def test_a_larger_model_cut_again_is_the_same(grown, tmp_path):
    layers, d_ffn = size(grown)
    before = torch.load(grown / "masknet.ckpt", weights_only=True)
    change_model.resize(grown, tmp_path / "more", 2 * layers + 1, d_ffn + 8)
    change_model.resize(tmp_path / "more", tmp_path / "cut", layers, d_ffn)
    assert size(tmp_path / "cut") == (layers, d_ffn)
    after = torch.load(tmp_path / "cut/masknet.ckpt", weights_only=True)
    assert before.keys() == after.keys()
    for key, value in after.items():
        assert torch.equal(value, before[key]), key


def set_constants(folder, factor):
    """Let each layer add only a constant, in proportion to factor."""
    path = folder / "masknet.ckpt"
    state = torch.load(path, weights_only=True)
    for key, value in state.items():
        if key.startswith("layers.") and ".out.weight" in key:
            value.zero_()
        if key.startswith("layers.") and ".out.bias" in key:
            value.copy_(factor * torch.linspace(-1, 2, len(value)))
    torch.save(state, path)


@pytest.mark.parametrize("times", (1, 2, 3))
def test_smaller_steps_add_up_to_the_same(grown, tmp_path, times):
    layers, d_ffn = size(grown)
    set_constants(grown, 1)
    words = ("deepen", grown, tmp_path / "out", "--times", times)
    change_model.main(map(str, words))
    assert size(tmp_path / "out") == (times * layers, d_ffn)
    mixture = torch.randn(2, 4000)
    expected = load(grown).separate_batch(mixture)
    found = load(tmp_path / "out").separate_batch(mixture)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    set_constants(grown, 2)
    other = load(grown).separate_batch(mixture)
    assert not torch.allclose(other, expected, atol=1e-2)


def test_a_deepened_model_has_each_layer_in_order(grown, tmp_path):
    change_model.deepen(grown, tmp_path / "out", 2)
    before, after = (
        load(grown).mods.masknet,
        load(tmp_path / "out").mods.masknet,
    )
    for i, layer in enumerate(after.layers):
        source = before.layers[i // 2].state_dict()
        for key, value in layer.state_dict().items():
            share = 0.5 if key.startswith(change_model.LAST) else 1
            torch.testing.assert_close(value, share * source[key])


def test_a_model_deepened_zero_times_leaves_nothing(grown, tmp_path):
    with pytest.raises(ValueError, match="1 or more"):
        change_model.deepen(grown, tmp_path / "out", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["grown"]


def test_what_cannot_be_resized_leaves_nothing(grown, tmp_path):
    with pytest.raises(FileExistsError, match="remove it"):
        change_model.resize(grown, tmp_path, 3)
    with pytest.raises(FileNotFoundError):
        change_model.resize(tmp_path, tmp_path / "out", 3)
    with pytest.raises(ValueError, match="must be 1 or more"):
        change_model.resize(grown, tmp_path / "out", d_ffn=0)
    assert [path.name for path in tmp_path.iterdir()] == ["grown"]


# --- averages ----------------------------------------------------------------


def masks(folder):
    state = torch.load(folder / "masknet.ckpt", weights_only=True)
    return state["masks.weight"]


def test_a_share_of_each(make_run, packed_once, tmp_path):
    other = pack(make_run(tmp_path / "run", 1), tmp_path / "other", half=True)
    words = ["average", packed_once, other, tmp_path / "mean"]
    change_model.main([*map(str, words), "--share", "0.25"])
    mean = masks(tmp_path / "mean")
    assert mean.dtype == torch.float16
    expected = 0.75 * masks(packed_once) + 0.25 * masks(other)
    torch.testing.assert_close(mean.float(), expected, atol=1e-3, rtol=1e-3)
    model = load(tmp_path / "mean")
    assert model.separate_batch(torch.randn(1, 800)).shape == (1, 800, 2)
    for share, same in ((0.0, packed_once), (1.0, other)):
        out = tmp_path / str(share)
        change_model.average(packed_once, other, out, share)
        assert torch.equal(masks(out), masks(same).to(torch.float16))


def test_what_cannot_be_averaged_leaves_nothing(packed_once, tmp_path):
    with pytest.raises(FileExistsError, match="remove it"):
        change_model.average(packed_once, packed_once, tmp_path, 0.5)
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        change_model.average(packed_once, packed_once, tmp_path / "out", 2)
    with pytest.raises(FileNotFoundError):
        change_model.average(tmp_path, packed_once, tmp_path / "out", 0.5)
    for other in (torch.ones(3, 4), torch.ones(4)):
        with pytest.raises(ValueError, match="not the same network"):
            change_model.average_states({"a": torch.ones(1)}, {"a": other}, 1)
    with pytest.raises(ValueError, match="not the same network"):
        change_model.average_states(
            {"a": torch.ones(1)}, {"b": torch.ones(1)}, 1
        )
    assert not list(tmp_path.iterdir())


def test_an_error_is_one_line(packed_once, tmp_path):
    words = ["resize", str(packed_once), str(tmp_path)]
    with pytest.raises(SystemExit, match="change_model.py: .*remove it"):
        change_model.main(words)


def test_a_causal_model_hears_what_is_past(packed_once, tmp_path):
    out = tmp_path / "causal"
    change_model.causal(packed_once, out)
    old, new = load(packed_once).mods.masknet, load(out).mods.masknet
    assert new.can_stream
    x = torch.randn(1, 30, len(old.down[0].memory[0].weight))
    # Of a sound that ends, each memory has what comes after as before.
    x[:, 10:] = 0
    mine, theirs = new.down[0].memory[0](x), old.down[0].memory[0](x)
    torch.testing.assert_close(mine[:, 10:], theirs[:, 10:])
    with pytest.raises(ValueError, match="causal is causal already"):
        change_model.causal(out, tmp_path / "again")
    assert not (tmp_path / "again").exists()
