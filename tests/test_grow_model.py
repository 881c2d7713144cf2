"""A packed model with more layers and wider feed-forwards."""

import pytest
import torch

from speechbrain_flashformer.inference import FlashFormerSeparation


@pytest.fixture(scope="module")
def bench(load_benchmark):
    return load_benchmark("grow_model")


@pytest.fixture(scope="module")
def size(packed_once):
    masknet = FlashFormerSeparation.from_hparams(packed_once).mods.masknet
    return len(masknet.layers), masknet.layers[0].ffn.out.in_features


def test_it_separates_as_before_and_can_learn(
    bench, packed_once, size, tmp_path
):
    layers, d_ffn = size
    bench.main(packed_once, tmp_path / "grown", 2 * layers + 1, d_ffn + 8)
    before, after = (
        FlashFormerSeparation.from_hparams(folder)
        for folder in (packed_once, tmp_path / "grown")
    )
    masknet = after.mods.masknet
    assert len(masknet.layers) == 2 * layers + 1
    assert masknet.layers[-1].ffn.out.in_features == d_ffn + 8
    mixture = torch.randn(2, 4000)
    expected = before.separate_batch(mixture)
    torch.testing.assert_close(
        after.separate_batch(mixture), expected, rtol=0, atol=1e-3
    )
    # What is new has a gradient, or it would add nothing for ever.
    masknet.requires_grad_(True)
    masknet(torch.rand(1, masknet.in_channels, 40)).square().sum().backward()
    for layer in masknet.layers:
        for name in bench.OUTS:
            gradient = layer.get_submodule(name).weight.grad
            assert gradient.abs().amax(0).gt(0).all()


def test_what_cannot_grow_leaves_nothing(bench, packed_once, size, tmp_path):
    layers, d_ffn = size
    with pytest.raises(FileExistsError, match="remove it"):
        bench.main(packed_once, tmp_path, layers, d_ffn)
    with pytest.raises(FileNotFoundError):
        bench.main(tmp_path, tmp_path / "out", layers, d_ffn)
    with pytest.raises(ValueError, match=f"D_FFN is {d_ffn} or more"):
        bench.main(packed_once, tmp_path / "out", layers, d_ffn - 1)
    assert not list(tmp_path.iterdir())
    more = layers + 1
    bench.main(packed_once, tmp_path / "grown", more, d_ffn)
    with pytest.raises(ValueError, match=f"LAYERS is {more} or more"):
        bench.main(tmp_path / "grown", tmp_path / "out", layers, d_ffn)
    assert [path.name for path in tmp_path.iterdir()] == ["grown"]
