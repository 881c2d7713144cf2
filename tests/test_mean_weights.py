"""The mean of two packed models."""

import pytest
import torch

from speechbrain_flashformer.inference import FlashFormerSeparation
from speechbrain_flashformer.inference.pack import pack


@pytest.fixture(scope="module")
def bench(load_benchmark):
    return load_benchmark("mean_weights")


def masks(folder):
    state = torch.load(folder / "masknet.ckpt", weights_only=True)
    return state["masks.weight"]


def test_a_share_of_each(bench, make_run, packed_once, tmp_path):
    other = pack(make_run(tmp_path / "run", 1), tmp_path / "other", half=True)
    bench.main(packed_once, other, tmp_path / "mean", 0.25)
    mean = masks(tmp_path / "mean")
    assert mean.dtype == torch.float16
    expected = 0.75 * masks(packed_once) + 0.25 * masks(other)
    torch.testing.assert_close(mean.float(), expected, atol=1e-3, rtol=1e-3)
    model = FlashFormerSeparation.from_hparams(tmp_path / "mean")
    assert model.separate_batch(torch.randn(1, 800)).shape == (1, 800, 2)
    for share, same in ((0.0, packed_once), (1.0, other)):
        out = tmp_path / str(share)
        bench.main(packed_once, other, out, share)
        assert torch.equal(masks(out), masks(same).to(torch.float16))


def test_what_cannot_be_meaned_leaves_nothing(bench, packed_once, tmp_path):
    with pytest.raises(FileExistsError, match="remove it"):
        bench.main(packed_once, packed_once, tmp_path, 0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        bench.main(packed_once, packed_once, tmp_path / "out", 2)
    with pytest.raises(FileNotFoundError):
        bench.main(tmp_path, packed_once, tmp_path / "out", 0.5)
    with pytest.raises(ValueError, match="not the same network"):
        bench.mean({"a": torch.ones(1)}, {"b": torch.ones(1)}, 0.5)
    with pytest.raises(ValueError, match="not the same network"):
        bench.mean({"a": torch.ones(1, 4)}, {"a": torch.ones(3, 4)}, 0.5)
    assert not list(tmp_path.iterdir())
