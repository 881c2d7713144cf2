"""The model that comes with the package: small, safe, and of use."""

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_flashformer import cli
from speechbrain_flashformer.inference import (
    FlashFormerSeparation,
    built_in_model,
)
from speechbrain_flashformer.training.metrics import best_order, reorder, si_snr
from speechbrain_flashformer.training.voices import make_voices


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """Generated voices that the model has not heard."""
    folder = tmp_path_factory.mktemp("data") / "voices"
    root = make_voices(folder, sizes=(1, 1, 12), progressbar=False)
    return root / "wav8k/min/tt"


def read(path):
    return torch.from_numpy(soundfile.read(path, dtype="float32")[0])


def test_it_is_small():
    sizes = {f.name: f.stat().st_size for f in built_in_model().iterdir()}
    assert sizes["masknet.ckpt"] > 1e6 and sum(sizes.values()) < 8e6


def test_it_separates_voices_it_has_not_heard(mixtures):
    model = FlashFormerSeparation.from_hparams(built_in_model())
    gains, levels, upright = [], [], []
    for path in sorted((mixtures / "mix").iterdir()):
        targets = torch.stack(
            [read(mixtures / s / path.name) for s in ("s1", "s2")], 1
        )[None]
        mixture = read(path)
        estimates = model.separate_batch(mixture[None])
        after, order = best_order(targets, estimates)
        before = si_snr(targets, mixture[None, :, None].expand_as(targets))
        gains.append((after - before).mean().item())
        levels.append(estimates.square().sum() / targets.square().sum())
        # SI-SNR does not see an inverted polarity.
        same = (targets * reorder(estimates, order)).sum()
        upright.append((same > 0).item())
    # Its card says what it reaches on far more; half of that is a defect.
    assert np.mean(gains) > 4.2
    assert abs(10 * np.log10(np.mean(levels))) < 3
    assert all(upright)


def test_the_command_takes_it_unasked(mixtures, tmp_path, capsys):
    (path, *_) = sorted((mixtures / "mix").iterdir())
    assert cli.main(["separate", str(path), "-o", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.split()) == 2
