"""A packed model with more layers and wider feed-forwards."""

import pytest
import torch

from speechbrain_flashformer.inference import FlashFormerSeparation


@pytest.fixture(scope="module")
def bench(load_benchmark):
    return load_benchmark("grow_model")


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
def grown(bench, packed_once, tmp_path):
    """Three layers, all in use."""
    layers, d_ffn = size(packed_once)
    bench.main(packed_once, tmp_path / "grown", layers + 2, d_ffn + 8)
    use_all(tmp_path / "grown")
    return tmp_path / "grown"


def test_it_separates_as_before_and_can_learn(bench, grown, tmp_path):
    layers, d_ffn = size(grown)
    more, wider = 2 * layers + 1, d_ffn + 8
    bench.main(grown, tmp_path / "out", more, wider)
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
        for name in bench.OUTS:
            gradient = layer.get_submodule(name).weight.grad
            assert gradient.abs().amax(0).gt(0).all()
    use_all(tmp_path / "out")
    other = load(tmp_path / "out").separate_batch(mixture)
    assert not torch.allclose(other, before.separate_batch(mixture), atol=1e-2)


def test_what_is_not_asked_for_stays(bench, grown, tmp_path):
    layers, d_ffn = size(grown)
    bench.main(grown, tmp_path / "out", num_layers=layers + 1)
    assert size(tmp_path / "out") == (layers + 1, d_ffn)
    kinds = {
        value.dtype
        for folder in (grown, tmp_path / "out")
        for value in torch.load(folder / "masknet.ckpt").values()
    }
    assert len(kinds) == 1
    # A yaml may leave a number to the network's default.
    hparams = "masknet: !new:FlashFormer\n    d_model: 8\n"
    assert bench.enlarge(hparams, {"d_ffn": 9}) == hparams + "    d_ffn: 9\n"


def test_what_cannot_grow_leaves_nothing(bench, grown, tmp_path):
    layers, d_ffn = size(grown)
    with pytest.raises(FileExistsError, match="remove it"):
        bench.main(grown, tmp_path, layers, d_ffn)
    with pytest.raises(FileNotFoundError):
        bench.main(tmp_path, tmp_path / "out", layers, d_ffn)
    with pytest.raises(ValueError, match=f"d_ffn is {d_ffn} or more"):
        bench.main(grown, tmp_path / "out", layers, d_ffn - 1)
    with pytest.raises(ValueError, match=f"num_layers is {layers} or more"):
        bench.main(grown, tmp_path / "out", layers - 1, d_ffn)
    assert [path.name for path in tmp_path.iterdir()] == ["grown"]
