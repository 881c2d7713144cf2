"""The Brain: what it learns from, how it steps, what it keeps and writes."""

import csv
import math
from types import SimpleNamespace

import pytest
import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.lobes.models.dual_path import Decoder, Encoder
from speechbrain.nnet.schedulers import (
    ReduceLROnPlateau,
    WarmCoolDecayLRSchedule,
)
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.epoch_loop import EpochCounter

from speechbrain_flashformer import FlashFormer
from speechbrain_flashformer.brain import Separation
from speechbrain_flashformer.metrics import pit_si_snr_loss


class Log:
    def __init__(self):
        self.lines = []

    def log_stats(self, **stats):
        self.lines.append(stats)


@pytest.fixture
def make(tmp_path):
    def build(run_opts=None, **hparams):
        torch.manual_seed(0)
        modules = {
            "encoder": Encoder(kernel_size=16, out_channels=12),
            "masknet": FlashFormer(12, d_model=32, num_layers=1, nhead=2),
            "decoder": Decoder(12, 1, kernel_size=16, stride=8, bias=False),
        }
        hparams = {
            "num_spks": 2,
            "sample_rate": 8000,
            "loss": pit_si_snr_loss,
            "threshold_byloss": True,
            "threshold": -30,
            "lr_scheduler": ReduceLROnPlateau(
                patience=3, dont_halve_until_epoch=0
            ),
            "matrix_optimizer": lambda p: torch.optim.Muon(p, lr=1e-3),
            "output_folder": str(tmp_path),
            "save_audio": True,
            "n_audio_to_save": 1,
            "train_logger": Log(),
            "epoch_counter": EpochCounter(3),
            **hparams,
        }
        return Separation(
            modules=modules,
            opt_class=lambda p: torch.optim.AdamW(p, lr=1e-3),
            hparams=hparams,
            run_opts={"device": "cpu", "noprogressbar": True}
            | (run_opts or {}),
            checkpointer=Checkpointer(tmp_path / "save", modules),
        )

    return build


def batch(*lengths):
    torch.manual_seed(1)
    items = []
    for index, length in enumerate(lengths):
        s1, s2 = torch.randn(2, length) * 0.1
        items.append(
            {"id": f"x{index}", "mix_sig": s1 + s2, "s1_sig": s1, "s2_sig": s2}
        )
    return PaddedBatch(items)


def test_every_weight_learns_and_each_has_one_optimizer(make):
    brain = make()
    brain.on_fit_start()
    parameters = list(brain.modules.parameters())
    owned = [
        p
        for optimizer in brain.optimizers_dict.values()
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert len(owned) == len({id(p) for p in owned}) == len(parameters)
    before = [p.clone() for p in parameters]
    brain.modules.train()
    brain.fit_batch(batch(4000, 4000))
    for old, new in zip(before, parameters):
        assert not torch.equal(old, new)


def test_padding_teaches_nothing(make):
    brain = make()
    brain.on_fit_start()
    losses = []
    for lengths in ((4000,), (4000, 1000)):
        x = batch(*lengths)
        predictions = brain.compute_forward(x, sb.Stage.TRAIN)
        losses.append(
            brain.hparams.loss(
                brain.targets(x), predictions, x.mix_sig.lengths
            )[0]
        )
    torch.testing.assert_close(losses[0], losses[1], atol=1e-3, rtol=0)


def test_items_better_than_the_threshold_are_left_out(make):
    brain = make()
    loss = torch.tensor([-40.0, -10.0, -20.0], requires_grad=True)
    kept = brain.drop_easy(loss)
    kept.backward()
    assert kept == -15 and loss.grad.tolist() == [0, 0.5, 0.5]
    # None left: zero, but with a gradient, or other processes would wait.
    loss = torch.tensor([-40.0, -50.0], requires_grad=True)
    brain.drop_easy(loss).backward()
    assert loss.grad.tolist() == [0, 0]
    # A broken item is no easy one: Brain must get to see it.
    assert brain.drop_easy(torch.tensor([math.nan, -10.0])).isnan()


def test_a_plateau_is_counted_once_whatever_the_optimizers(make):
    brain = make()  # patience 3
    brain.on_fit_start()
    rates = []
    for epoch, loss in enumerate((5.0, 6.0, 6.0, 6.0, 6.0, 6.0), 1):
        brain._end_epoch_lr(epoch, loss)
        rates.append(
            [o.param_groups[0]["lr"] for o in brain.optimizers_dict.values()]
        )
    assert rates == [[1e-3] * 2] * 4 + [[5e-4] * 2] * 2


def test_a_schedule_by_step_reaches_both_optimizers(make):
    schedule = WarmCoolDecayLRSchedule(
        lr=1.0, warmup=4, cooldown=4, total_steps=10, decay_factor=1.0
    )
    brain = make(lr_scheduler=schedule)
    brain.on_fit_start()
    for step, lr in ((0, 0.25), (3, 1.0), (5, 1.0), (8, 0.25)):
        brain.optimizer_step = step
        brain.on_fit_batch_start(None, should_step=True)
        for optimizer in brain.optimizers_dict.values():
            assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)


def test_broken_validation_is_never_the_best(make):
    brain = make()
    brain.on_fit_start()
    brain.train_stats = {"si-snr": 0.0}
    for epoch, score in enumerate((3.0, math.nan, 2.0), 1):
        row = {"si-snr": score, "si-snr_i": score, "level_db": score}
        brain.rows = [
            {"si-snr": 20.0, "si-snr_i": 20.0, "level_db": 5.0},
            row,
        ]
        brain.on_stage_end(sb.Stage.VALID, torch.tensor(-20.0), epoch)
    best = brain.checkpointer.find_checkpoint(min_key="si-snr")
    assert best.meta["epoch"] == 1
    assert best.meta["level_db"] == 4.0


def test_batches_of_unlike_length_are_tested_item_by_item(make, tmp_path):
    brain = make()
    brain.on_stage_start(sb.Stage.TEST)
    brain.modules.eval()
    with torch.no_grad():
        brain.evaluate_batch(batch(4000, 2500), sb.Stage.TEST)
    together = brain.rows
    alone = []
    for index in range(2):
        x = batch(4000, 2500)
        n = (4000, 2500)[index]
        item = {
            key: getattr(x, key).data[index, :n]
            for key in ("mix_sig", "s1_sig", "s2_sig")
        }
        brain.on_stage_start(sb.Stage.TEST)
        with torch.no_grad():
            single = PaddedBatch([{"id": f"x{index}", **item}])
            brain.evaluate_batch(single, sb.Stage.TEST)
        alone += brain.rows
    for a, b in zip(together, alone, strict=True):
        assert a["snt_id"] == b["snt_id"]
        for key in ("si-snr", "si-snr_i", "sdr", "sdr_i"):
            assert a[key] == pytest.approx(b[key], abs=1e-2)
    brain.rows = together
    brain.save_results()
    with open(tmp_path / "test_results.csv", newline="") as file:
        assert [r["snt_id"] for r in csv.DictReader(file)] == [
            "x0",
            "x1",
            "avg",
        ]
    assert len(list((tmp_path / "audio_results").glob("*_mix.wav"))) == 2


def test_half_precision_trains_with_a_loss_in_float32(make):
    brain = make({"precision": "bf16"})
    brain.on_fit_start()
    seen = []

    def loss(targets, predictions, lengths):
        seen.append((targets.dtype, predictions.dtype))
        return pit_si_snr_loss(targets, predictions, lengths)

    brain.hparams.loss = loss
    brain.modules.train()
    assert brain.fit_batch(batch(4000, 4000)).isfinite()
    assert seen == [(torch.float32, torch.float32)]


def test_testing_without_a_checkpoint_is_an_error(make):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        make().on_evaluate_start(min_key="si-snr")


def test_wrapped_modules_are_the_ones_that_run(make):
    """DDP wraps what is in ``modules``; hparams would bypass it."""
    brain = make()
    ran = []
    for name in ("encoder", "masknet", "decoder"):
        module = brain.modules[name]
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    brain.hparams.Encoder = brain.hparams.MaskNet = SimpleNamespace()
    brain.compute_forward(batch(4000), sb.Stage.TRAIN)
    assert ran == ["encoder", "masknet", "decoder"]
