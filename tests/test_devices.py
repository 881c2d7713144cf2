"""Every device: all in one place, and no float64 where there is none.

A stand-in for a GPU computes shapes alone, refuses tensors of two devices in
one operation as a real one does, and float64 as Apple's does.
"""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.lobes.models.dual_path import Decoder, Encoder
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from speechbrain_flashformer import FlashFormer, cli
from speechbrain_flashformer.inference import FlashFormerSeparation, models
from speechbrain_flashformer.nnet import window
from speechbrain_flashformer.nnet.separator import encoder_statistics, separate
from speechbrain_flashformer.nnet.step import StreamingStep
from speechbrain_flashformer.nnet.streaming import StreamingSeparator
from speechbrain_flashformer.training.brain import Separation
from speechbrain_flashformer.training.checkpoints import RandomState
from speechbrain_flashformer.training.losses import pit_si_snr_loss

GPU = torch.device("cuda", 0)


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on the stand-in."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == GPU.type:
                assert x.dtype != torch.float64, f"float64 of {function}"
        return out


@pytest.fixture
def gpu(monkeypatch):
    # Which kernel CUDA would take cannot be asked without it.
    monkeypatch.setattr(
        window, "_no_dense_kernel", lambda q: contextlib.nullcontext()
    )
    # No mask of the stand-in is kept for what comes after.
    monkeypatch.setattr(window, "_cached_band", window._band)
    with NoFloat64(), FakeTensorMode(allow_non_fake_inputs=True):
        yield GPU


def build(**options):
    masknet = FlashFormer(
        16, d_model=32, num_layers=2, nhead=2, window=(5, 5), **options
    )
    encoder = Encoder(kernel_size=16, out_channels=16)
    decoder = Decoder(16, 1, kernel_size=16, stride=8, bias=False)
    return [part.eval() for part in (encoder, masknet, decoder)]


def move(modules):
    """As ``to``, which cannot make stand-ins of parameters."""
    for module in (m for part in modules for m in part.modules()):
        for store in (module._parameters, module._buffers):
            for name, x in store.items():
                if x is not None:
                    moved = x.detach().to(GPU)
                    if store is module._parameters:
                        moved = torch.nn.Parameter(moved, requires_grad=False)
                    store[name] = moved
    return modules


def test_the_stand_in_refuses_what_a_gpu_refuses(gpu):
    x = torch.zeros(3, device=gpu)
    with pytest.raises(RuntimeError, match="two different devices"):
        x + torch.zeros(3)
    with pytest.raises(AssertionError, match="float64"):
        x.double()


@torch.no_grad()
@pytest.mark.parametrize("future_tokens", [None, 0, 2])
def test_the_network_runs_where_its_weights_are(gpu, future_tokens):
    causal = future_tokens is not None
    modules = build(causal=causal, future_tokens=future_tokens or 0)
    mixture = torch.zeros(2, 4000, device=gpu)
    options = {"lengths": torch.tensor([1.0, 0.5])} if causal else {}
    sources = separate(mixture, *move(modules), **options)
    assert sources.device == gpu and sources.dtype == torch.float32


@torch.no_grad()
def test_statistics_of_a_recording_need_no_float64(gpu):
    modules = move(build())
    blocks = torch.zeros(2, 4000).split(999, 1)
    statistics = encoder_statistics(blocks, modules[0])
    for part in statistics:
        assert part.device == gpu and part.dtype == torch.float32
    mixture = torch.zeros(2, 4000, device=gpu)
    sources = separate(mixture, *modules, statistics=statistics)
    assert sources.device == gpu


def test_statistics_are_as_exact_as_before():
    encoder = Encoder(kernel_size=16, out_channels=16)
    mixture = torch.randn(1, 400_000) * torch.rand(1, 400_000).square()
    found = encoder_statistics(mixture.split(7777, 1), encoder)
    wide = copy.deepcopy(encoder).double()
    expected = encoder_statistics([mixture.double()], wide)
    for part, exact in zip(found, expected):
        torch.testing.assert_close(part, exact.float(), rtol=1e-6, atol=0)


@torch.no_grad()
def test_streams_live_with_the_weights(gpu):
    modules = build(causal=True, future_tokens=1)
    begun = StreamingSeparator(*modules)  # before the weights are moved
    move(modules)
    for stream in (begun, StreamingSeparator(*modules)):
        assert stream.feed(torch.zeros(1, 999)).device == gpu
        assert stream.flush().device == gpu
        assert {x.device for x in tensors(stream.state)} == {gpu}


@torch.no_grad()
def test_a_step_lives_with_the_weights(gpu):
    step = StreamingStep(*move(build(causal=True, future_tokens=1)))
    state = step.make_state(1)
    out = step(torch.zeros(1, 2 * step.token, device=gpu), *state.values())
    assert {x.device for x in (*state.values(), *out)} == {gpu}


@torch.no_grad()
def test_modules_of_one_stream_are_on_one_device(gpu):
    encoder, masknet, decoder = build(causal=True)
    stream = StreamingSeparator(encoder, masknet, decoder)
    move([masknet])
    with pytest.raises(ValueError, match="several devices: cpu, cuda:0"):
        stream.feed(torch.zeros(1, 99))


def tensors(state):
    return [x for x in tree_leaves(state) if isinstance(x, torch.Tensor)]


# --- training ----------------------------------------------------------------


class Batch(PaddedBatch):
    """Remembers where it was sent."""

    def to(self, *arguments, **options):
        self.sent = arguments
        return super().to(*arguments, **options)


@pytest.fixture
def brain(tmp_path):
    modules = dict(zip(("encoder", "masknet", "decoder"), build()))
    hparams = {
        "num_spks": 2,
        "sample_rate": 8000,
        "loss": pit_si_snr_loss,
        "threshold_byloss": False,
        "lr_scheduler": sb.nnet.schedulers.ReduceLROnPlateau(),
        "output_folder": str(tmp_path),
        "save_audio": False,
        "n_audio_to_save": 0,
    }
    return Separation(modules, torch.optim.SGD, hparams, {"device": "cpu"})


def batch():
    names = ("mix_sig", "s1_sig", "s2_sig")
    return Batch([{"id": "x", **{name: torch.randn(800) for name in names}}])


@pytest.mark.parametrize("stage", list(sb.Stage))
def test_every_batch_is_moved(brain, stage):
    given = batch()
    if stage == sb.Stage.TRAIN:
        brain.opt_class = lambda weights: torch.optim.SGD(weights, lr=0.1)
        brain.on_fit_start()
        brain.fit_batch(given)
    else:
        brain.on_stage_start(stage, 1)
        brain.evaluate_batch(given, stage)
    assert given.sent == ("cpu",)


def test_validation_runs_on_the_gpu(gpu, brain, monkeypatch):
    """Up to the scores, whose numbers a stand-in does not have."""
    move(brain.modules.values())
    brain.device, seen = str(gpu), {}

    def score(*parts):
        seen.update(enumerate(parts))
        return [{"si-snr": 0.0}]

    monkeypatch.setattr(brain, "score", score)
    brain.evaluate_batch(batch(), sb.Stage.VALID)
    _, predictions, targets, lengths, _ = seen.values()
    assert predictions.device == targets.device == lengths.device == gpu


class Accelerator:
    """In the place of torch.cuda or torch.mps."""

    def __init__(self):
        self.state = torch.ByteTensor([1, 2])

    def get_rng_state(self):
        return self.state.clone()

    def set_rng_state(self, state):
        self.state = state


def test_random_numbers_of_any_accelerator_are_resumed(monkeypatch, tmp_path):
    module = Accelerator()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda: torch.device("mps")
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    RandomState().save(tmp_path / "random.ckpt")
    module.state += 1
    RandomState().load(tmp_path / "random.ckpt", end_of_epoch=True)
    assert module.state.tolist() == [1, 2]


# --- which device ------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["info"],
        ["export", "MODEL", "OUT"],
        ["separate", "IN", "-o", "OUT"],
        ["app"],
        ["stream"],
    ],
    ids=lambda words: words[0],
)
def test_all_commands_take_the_device_that_training_takes(
    words, monkeypatch, capsys
):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda: torch.device("mps")
    )
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    taken = []

    def load(model, device, trust):
        taken.append(device)
        raise ValueError("enough")

    monkeypatch.setattr(models, "RecordingSeparator", load)
    for name in ("stdin", "stdout"):
        pipe = SimpleNamespace(isatty=lambda: False, flush=lambda: None)
        monkeypatch.setattr(cli.sys, name, pipe)
    assert cli.main(words) == 1
    assert taken == ["mps"] == [sb.utils.distributed.infer_device()]


def test_a_loaded_model_can_be_moved(packed_once, gpu):
    """Its device is where its weights are, not where they were loaded."""
    model = FlashFormerSeparation(
        dict(zip(("encoder", "masknet", "decoder"), build())),
        {"num_spks": 2, "sample_rate": 8000},
        run_opts={"device": "cpu"},
    )
    move([model.mods])
    assert model.separate_batch(torch.zeros(1, 800)).device == gpu
