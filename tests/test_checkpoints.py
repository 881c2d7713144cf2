"""Checkpoints: whole or not there, averaged, and nothing random is lost."""

import resource

import pytest
import torch
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_flashformer.training.checkpoints import (
    RandomState,
    WholeCheckpointer,
    averaged_weights,
)


class Stop(BaseException):
    """As a signal would."""


@pytest.fixture
def layers():
    # The second is too large for the full disk below.
    return {"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(200, 200)}


def values(layers):
    return [p.clone() for layer in layers.values() for p in layer.parameters()]


def stopped(obj, path):
    path.write_bytes(b"half")
    raise Stop


@pytest.mark.parametrize("name", [None, "last"])
def test_a_checkpoint_torn_by_a_stop_is_never_taken(tmp_path, layers, name):
    checkpointer = WholeCheckpointer(tmp_path, layers)
    checkpointer.save_checkpoint(meta={"si-snr": -1.0})
    before = values(layers)
    torch.nn.init.zeros_(layers["a"].weight)
    checkpointer.custom_save_hooks["b"] = stopped
    with pytest.raises(Stop):
        checkpointer.save_checkpoint(meta={"si-snr": -2.0}, name=name)

    # With SpeechBrain's own the torn one would be the newest and the best.
    for kind in (WholeCheckpointer, Checkpointer):
        again = kind(tmp_path, layers)
        assert again.recover_if_possible(min_key="si-snr") is not None
        assert all(map(torch.equal, values(layers), before))
    again.save_checkpoint()
    again = WholeCheckpointer(tmp_path, layers)
    again.save_checkpoint(name="mine")
    # What was torn is swept away by the next.
    assert not list(tmp_path.glob("PARTIAL*"))
    assert (tmp_path / "CKPT+mine" / "b.ckpt").is_file()


def test_a_full_disk_leaves_the_checkpoints_as_they_were(tmp_path, layers):
    checkpointer = WholeCheckpointer(tmp_path, layers)
    first = checkpointer.save_checkpoint()
    assert first.paramfiles["b"].is_file()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(
            OSError, match=f"into {tmp_path}.*make room or repair the disk"
        ):
            checkpointer.save_checkpoint()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == [first.path.name]


def test_the_mean_of_checkpoints(tmp_path, layers):
    checkpointer = WholeCheckpointer(tmp_path, layers)
    for value in (1.0, 2.0, 6.0):
        torch.nn.init.constant_(layers["a"].weight, value)
        checkpointer.save_checkpoint(meta={"si-snr": value})
    best = checkpointer.find_checkpoints(
        min_key="si-snr", max_num_checkpoints=2
    )
    weights = averaged_weights(best, "a")
    assert torch.equal(weights["weight"], torch.full((2, 2), 1.5))
    assert torch.equal(weights["bias"], layers["a"].bias)


def test_random_numbers_go_on_where_they_were(tmp_path):
    checkpointer = WholeCheckpointer(tmp_path, {"random": RandomState()})
    checkpointer.save_checkpoint()
    drawn = torch.rand(3)
    torch.manual_seed(99)
    checkpointer.recover_if_possible()
    assert torch.equal(torch.rand(3), drawn)
