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


@pytest.mark.parametrize("streaming", [False, True])
def test_they_are_small(streaming):
    files = built_in_model(streaming).iterdir()
    sizes = {f.name: f.stat().st_size for f in files}
    assert sizes["masknet.ckpt"] > 1e6 and sum(sizes.values()) < 6e6
    assert {"README.md", "hyperparams.yaml"} < set(sizes)


# Their cards say what they reach on far more; half of that is a defect.
@pytest.mark.parametrize("streaming, least", [(False, 4.2), (True, 1.5)])
def test_they_separate_voices_they_have_not_heard(mixtures, streaming, least):
    model = FlashFormerSeparation.from_hparams(built_in_model(streaming))
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
    assert np.mean(gains) > least
    assert abs(10 * np.log10(np.mean(levels))) < 3
    assert all(upright)


def test_the_command_takes_it_unasked(mixtures, tmp_path, capsys):
    (path, *_) = sorted((mixtures / "mix").iterdir())
    assert cli.main(["separate", str(path), "-o", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.split()) == 2


@pytest.mark.parametrize("command", ["stream", "separate"])
def test_streams_take_the_causal_one_unasked(
    mixtures, tmp_path, monkeypatch, command
):
    (path, *_) = sorted((mixtures / "mix").iterdir())
    words, name = ["stream", "--format", "f32le"], "stdin"
    if command == "separate":
        words, name = ["separate", "--streaming", str(path)], path.stem
    (tmp_path / "heard").write_bytes(read(path).numpy().tobytes())
    with open(tmp_path / "heard") as heard:
        monkeypatch.setattr("sys.stdin", heard)
        assert cli.main([*words, "-o", str(tmp_path)]) == 0
    model = FlashFormerSeparation.from_hparams(built_in_model(streaming=True))
    expected = model.separate_file(path, streaming=True)[0, :, 0]
    found = read(tmp_path / f"{name}_s1.wav")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
