"""What several tests share: a small model, packed as training leaves it."""

import builtins
import importlib
import os
import shutil
import sys
from pathlib import Path

# Two processes of tests with threads of their own would wait for each other.
# Torch reads it when it is imported; the recipes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_flashformer.inference.pack import pack

RUN = """\
num_spks: 2
sample_rate: 8000
causal: False
Encoder: !new:speechbrain.lobes.models.dual_path.Encoder
    kernel_size: 16
    out_channels: 16
MaskNet: !new:speechbrain_flashformer.FlashFormer
    in_channels: 16
    d_model: 32
    num_layers: 1
    nhead: 2
    d_ffn: 32
    d_frame: 16
    window: !tuple (20, 20)
    lookback: 4
    lookahead: 4
    causal: !ref <causal>
Decoder: !new:speechbrain.lobes.models.dual_path.Decoder
    in_channels: 16
    out_channels: 1
    kernel_size: 16
    stride: 8
    bias: False
modules:
    encoder: !ref <Encoder>
    masknet: !ref <MaskNet>
    decoder: !ref <Decoder>
"""


@pytest.fixture(scope="module")
def load_benchmark():
    """Import a command of benchmarks/ as a module, and what is beside it."""
    folder = str(Path(__file__).parent.parent / "benchmarks")
    before = set(sys.modules)
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(folder):
            del sys.modules[name]


@pytest.fixture(scope="session")
def reset():
    """What SpeechBrain's recipes do to every model before training."""
    return _reset


def _reset(layer):
    if hasattr(layer, "reset_parameters"):
        layer.reset_parameters()
    for child in layer.modules():
        if layer is not child:
            _reset(child)


@pytest.fixture(scope="session")
def make_run():
    return _make_run


def _make_run(folder, seed, level_db=0.0, causal=False, polarity=1):
    """The output folder of a training that took no steps."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    hparams = load_hyperpyyaml(RUN, {"causal": causal})
    # As SpeechBrain writes it: with references resolved.
    resolved = resolve_references(RUN, {"causal": causal})
    (folder / "hyperparams.yaml").write_text(resolved.getvalue())
    checkpointer = Checkpointer(folder / "save", hparams["modules"])
    checkpointer.save_checkpoint(
        meta={
            "si-snr": -9.5,
            "epoch": 7,
            "level_db": level_db,
            "polarity": polarity,
        }
    )
    return folder


@pytest.fixture(scope="session")
def packed_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return pack(_make_run(folder / "run", seed=0), folder / "small")


@pytest.fixture(scope="session")
def packed_causal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causal")
    return pack(_make_run(folder / "run", 0, causal=True), folder / "small")


@pytest.fixture
def packed(packed_once, tmp_path):
    """A packed model's folder, to do with as one likes."""
    return shutil.copytree(packed_once, tmp_path / "model")


@pytest.fixture(scope="session")
def noise_mixtures(tmp_path_factory):
    """Mixtures of noise, two to learn from and one to test each."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("tr", 2), ("cv", 1), ("tt", 1)):
        for index in range(count):
            s1, s2 = 0.1 * torch.randn(2, 12_000, generator=generator)
            for name, signal in (("mix", s1 + s2), ("s1", s1), ("s2", s2)):
                path = folder / "wav8k/min" / part / name / f"{index}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(path, signal.numpy(), 8000)
    return folder


@pytest.fixture(autouse=True)
def _same_every_time():
    torch.manual_seed(0)


@pytest.fixture
def without_onnxruntime(monkeypatch):
    """As where the extra onnx is not installed."""
    real = builtins.__import__

    def without(name, *arguments):
        if name == "onnxruntime":
            raise ImportError(name=name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
