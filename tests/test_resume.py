"""A training that was stopped ends with the weights of one that was not."""

import os
import signal

import pytest
import speechbrain as sb
import torch
from prepare_data import prepare_wsjmix
from speechbrain.augment.time_domain import DropChunk, DropFreq, SpeedPerturb
from speechbrain.lobes.models.dual_path import Decoder, Encoder
from speechbrain.nnet.schedulers import ReduceLROnPlateau
from speechbrain.utils.epoch_loop import EpochCounter
from torch.utils.data import get_worker_info

from speechbrain_flashformer import FlashFormer
from speechbrain_flashformer.training.brain import Separation
from speechbrain_flashformer.training.checkpoints import WholeCheckpointer
from speechbrain_flashformer.training.data import (
    EpochDataset,
    load_dataset,
    training_loader_options,
)
from speechbrain_flashformer.training.losses import pit_si_snr_loss
from speechbrain_flashformer.training.voices import make_voices

ITEMS = 14


class Stop(BaseException):
    """As a signal would."""


class Stopping(Separation):
    """Is stopped after so many batches."""

    def fit_batch(self, batch):
        if self.left == 0:
            raise Stop
        self.left -= 1
        self.heard.append(batch.id)
        return super().fit_batch(batch)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    voices = make_voices(
        folder / "voices", sizes=(ITEMS, 2, 2), utterances=1, progressbar=False
    )
    prepare_wsjmix(voices, folder)
    hparams = {
        "data_folder": str(voices),
        "num_spks": 2,
        "sample_rate": 8000,
        "seed": 5,
    }
    return (
        load_dataset(folder / "wsj_tr.csv", hparams, crop=4000),
        load_dataset(folder / "wsj_cv.csv", hparams),
    )


@pytest.fixture
def train(data, tmp_path):
    def run(name, left=-1, workers=0, by_length=False, best=1, **options):
        torch.manual_seed(0)
        modules = {
            "encoder": Encoder(kernel_size=16, out_channels=12),
            "masknet": FlashFormer(
                12, d_model=32, num_layers=1, nhead=2, dropout=0.1
            ),
            "decoder": Decoder(12, 1, kernel_size=16, stride=8, bias=False),
        }
        counter = EpochCounter(2)
        schedule = ReduceLROnPlateau(patience=0, dont_halve_until_epoch=0)
        save = tmp_path / name
        recoverables = {**modules, "counter": counter, "schedule": schedule}
        brain = Stopping(
            modules=modules,
            opt_class=lambda p: torch.optim.AdamW(p, lr=1e-3),
            hparams={
                "num_spks": 2,
                "sample_rate": 8000,
                "loss": pit_si_snr_loss,
                "threshold_byloss": True,
                "threshold": -30,
                "lr_scheduler": schedule,
                "warmup_steps": 5,
                "lr": 1e-3,
                "matrix_optimizer": lambda p: torch.optim.Muon(p, lr=1e-3),
                "avg_checkpoints": best,
                "use_rand_shift": True,
                "min_shift": -99,
                "max_shift": 99,
                "use_wavedrop": True,
                "drop_freq": DropFreq(),
                "drop_chunk": DropChunk(),
                "use_speedperturb": True,
                "speed_perturb": SpeedPerturb(8000, [90, 100, 110]),
                "train_logger": Silent(),
            },
            run_opts={"device": "cpu", "noprogressbar": True, **options},
            checkpointer=WholeCheckpointer(save, recoverables),
        )
        brain.left, brain.heard = left, []
        training, validation = data
        settings = {
            "dataloader_opts": {
                "batch_size": 2,
                "num_workers": workers,
                "drop_last": True,
                "shuffle": True,
            },
            "dynamic_mixing": False,
            "dynamic_batching": by_length,
            "max_batch_length": 1.0,
            "num_buckets": 2,
            "limit_training_signal_len": True,
            "training_signal_len": 4000,
            "sample_rate": 8000,
            "seed": 1,
        }
        loader = training_loader_options(settings, training, ITEMS)
        try:
            brain.fit(
                counter,
                training,
                validation,
                train_loader_kwargs=loader,
                valid_loader_kwargs={"batch_size": 1},
            )
        except Stop:
            return None
        run.heard, run.steps = brain.heard, len(brain.heard)
        return [p.detach().clone() for p in brain.modules.parameters()]

    return run


class Silent:
    def log_stats(self, **stats):
        pass


def test_stopped_at_any_step_it_ends_with_the_same_weights(train):
    whole = train("whole")
    assert sorted(train.heard[:7]) != sorted(train.heard[7:]), "one order"
    # In the first epoch, at its end, in the second: seven steps in each, of
    # which every second one and the last are saved.
    for stop, left in ((1, 14), (7, 7), (10, 5)):
        name = f"stopped after {stop}"
        assert train(name, stop, ckpt_interval_steps=2) is None
        resumed = train(name, ckpt_interval_steps=2)
        # Begun anew it would end with the same weights too.
        assert train.steps == left
        assert all(map(torch.equal, whole, resumed)), name


def test_gradients_half_gathered_are_not_lost(train):
    options = {"grad_accumulation_factor": 3, "ckpt_interval_steps": 1}
    whole = train("whole", grad_accumulation_factor=3)
    # Saved after three steps, after six, and at the end of an epoch.
    for stop, left in ((4, 11), (6, 8), (9, 7)):
        assert train(f"stopped after {stop}", stop, **options) is None
        resumed = train(f"stopped after {stop}", **options)
        assert train.steps == left
        assert all(map(torch.equal, whole, resumed)), stop


@pytest.mark.parametrize(
    "options", [{"by_length": True}, {"best": 2}], ids=["by length", "best"]
)
def test_whatever_the_batches_and_the_checkpoints_kept(train, options):
    whole = train("whole", **options)
    steps = train.steps
    for stop in (4, 9):
        name = f"stopped after {stop}"
        assert train(name, stop, ckpt_interval_steps=3, **options) is None
        resumed = train(name, ckpt_interval_steps=3, **options)
        assert train.steps <= steps - 3
        assert all(map(torch.equal, whole, resumed)), name


def test_workers_change_nothing(train):
    whole = train("whole")
    assert train("half", 4, workers=1, ckpt_interval_steps=3) is None
    assert all(map(torch.equal, whole, train("half", workers=2)))
    assert train.steps == 14 - 3


def test_a_killed_worker_is_told_and_the_training_can_go_on(train, monkeypatch):
    whole = train("whole")
    get = EpochDataset.__getitem__

    def killed(self, index):
        if index % ITEMS == 3 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return get(self, index)

    monkeypatch.setattr(EpochDataset, "__getitem__", killed)
    with pytest.raises(RuntimeError, match="worker .* killed by signal"):
        train("killed", workers=1, ckpt_interval_steps=1)
    monkeypatch.undo()
    assert all(map(torch.equal, whole, train("killed", workers=1)))
    assert train.steps < 14


def test_stages_are_those_of_speechbrain():
    assert issubclass(Separation, sb.Brain)
    # What a subclass must not have replaced, or Brain's options do nothing.
    for name in ("fit_batch", "evaluate_batch", "fit"):
        assert getattr(Separation, name) is getattr(sb.Brain, name)
