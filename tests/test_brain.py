"""The Brain: what it learns from, how it steps, what it keeps and writes."""

import csv
import math
import traceback
from types import SimpleNamespace

import pytest
import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.lobes.models.dual_path import Decoder, Encoder
from speechbrain.nnet.schedulers import (
    CyclicLRScheduler,
    LinearWarmupScheduler,
    NewBobScheduler,
    ReduceLROnPlateau,
    StepScheduler,
    WarmCoolDecayLRSchedule,
)
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.epoch_loop import EpochCounter
from torch.utils._python_dispatch import TorchDispatchMode

from speechbrain_flashformer import FlashFormer
from speechbrain_flashformer.training import metrics
from speechbrain_flashformer.training.brain import Separation
from speechbrain_flashformer.training.losses import (
    pit_si_snr_loss,
    pit_snr_loss,
)


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


def alone(x, index, length):
    """The batch of one item of a padded batch, without its padding."""
    item = {
        name: getattr(x, name).data[index, :length].clone()
        for name in ("mix_sig", "s1_sig", "s2_sig")
    }
    return PaddedBatch([{"id": x.id[index], **item}])


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

    def loss(x):
        predictions = brain.compute_forward(x, sb.Stage.TRAIN)
        return brain.compute_objectives(predictions, x, sb.Stage.TRAIN)

    x = batch(4000, 1000)
    expected = (loss(alone(x, 0, 4000)) + loss(alone(x, 1, 1000))) / 2
    for name in ("mix_sig", "s1_sig", "s2_sig"):
        # It would be heard, as a part of the mixture and as a target.
        getattr(x, name).data[1, 1000:] = torch.randn(3000)
    torch.testing.assert_close(loss(x), expected, atol=1e-3, rtol=0)


def test_items_better_than_the_threshold_are_left_out(make):
    brain = make()
    loss = torch.tensor([-40.0, -10.0, -20.0], requires_grad=True)
    kept = brain.threshold_by_loss(loss)
    kept.backward()
    assert kept == -15 and loss.grad.tolist() == [0, 0.5, 0.5]
    # And those that are hopeless.
    brain.hparams.loss_upper_lim = -15
    assert brain.threshold_by_loss(loss) == -20
    # Neither, where nothing is left out.
    del brain.hparams.loss_upper_lim
    brain.hparams.threshold_byloss = False
    assert brain.threshold_by_loss(loss).item() == pytest.approx(-70 / 3)
    brain.hparams.threshold_byloss = True
    # None left: zero, but with a gradient, or other processes would wait.
    loss = torch.tensor([-40.0, -50.0], requires_grad=True)
    brain.threshold_by_loss(loss).backward()
    assert loss.grad.tolist() == [0, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_never_left_out(make, value):
    """Brain must get to see it, whatever the thresholds."""
    brain = make()
    loss = torch.tensor([value, -10.0])
    for threshold in (True, False):
        brain.hparams.threshold_byloss = threshold
        assert not brain.threshold_by_loss(loss).isfinite()


def test_a_batch_is_scored_by_pairs_once(make, monkeypatch):
    """The loss chooses the order in training, the scores beyond it."""
    brain, calls = make(), []
    real = metrics.assignment

    def count(pairs):
        calls.append(tuple(pairs.shape))
        return real(pairs)

    monkeypatch.setattr(metrics, "assignment", count)
    brain.on_fit_start()
    brain.modules.train()
    brain.fit_batch(batch(4000, 1000))
    assert calls == [(2, 2, 2)]
    brain.modules.eval()
    brain.on_stage_start(sb.Stage.VALID)
    loss = brain.evaluate_batch(batch(4000, 1000), sb.Stage.VALID)
    assert calls == [(2, 2, 2)] * 2
    mean = sum(row["si-snr"] for row in brain.rows) / 2
    assert loss.item() == pytest.approx(-mean)


def test_nothing_waits_for_the_device_from_the_batch_to_its_loss(make):
    brain = make(use_rand_shift=True, min_shift=-9, max_shift=9)
    brain.on_fit_start()
    brain.modules.train()
    x = batch(4000, 1000)
    brain.to_device(x)
    waits = []

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                waits.append("".join(traceback.format_stack()))
            return function(*args, **(kwargs or {}))

    with Waits():
        brain.on_fit_batch_start(x, should_step=True)
        predictions = brain.compute_forward(x, sb.Stage.TRAIN)
        loss = brain.compute_objectives(predictions, x, sb.Stage.TRAIN)
        assert not waits, waits[0]
        assert loss.isfinite()
    assert len(waits) == 1


def test_a_plateau_is_counted_once_whatever_the_optimizers(make):
    brain = make()  # patience 3
    brain.on_fit_start()
    optimizers = list(brain.optimizers_dict.values())
    rates = []
    for epoch, loss in enumerate((5.0, 6.0, 6.0, 6.0, 6.0, 6.0), 1):
        brain.learning_rate.end_epoch(optimizers, epoch, loss)
        rates.append([x.param_groups[0]["lr"] for x in optimizers])
    assert rates == [[1e-3] * 2] * 4 + [[5e-4] * 2] * 2


def test_a_schedule_by_step_reaches_both_optimizers(make):
    schedule = WarmCoolDecayLRSchedule(
        lr=1.0, warmup=4, cooldown=4, total_steps=10, decay_factor=1.0
    )
    brain = make(lr_scheduler=schedule)
    brain.on_fit_start()
    # The last one is past the end of the schedule.
    for step, lr in ((0, 0.25), (3, 1.0), (5, 1.0), (8, 0.25), (12, 0.0)):
        brain.optimizer_step = step
        brain.on_fit_batch_start(batch(100), should_step=True)
        for optimizer in brain.optimizers_dict.values():
            assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)


@pytest.mark.parametrize(
    "schedule, rates",
    [
        # Called with an optimizer; counts by itself.
        (LinearWarmupScheduler(1.0, 4, 8), [0.25, 0.5, 0.75, 1.0, 0.75, 0.5]),
        # By epochs of three steps.
        (StepScheduler(1.0, 0.5, 2), [1.0] * 3 + [0.5] * 3),
        # By the loss of an epoch, which does not get better.
        (NewBobScheduler(1.0, 0.5, patient=0), [1.0] * 3 + [1.0] * 3),
        (
            ReduceLROnPlateau(patience=0, dont_halve_until_epoch=0),
            [1.0] * 3 + [1.0] * 3,
        ),
    ],
)
def test_every_kind_of_schedule_reaches_both_optimizers(make, schedule, rates):
    brain = make(lr_scheduler=schedule)
    brain.on_fit_start()
    optimizers = list(brain.optimizers_dict.values())
    for group in (g for x in optimizers for g in x.param_groups):
        group["lr"] = 1.0
    seen = []
    for step in range(6):
        brain.optimizer_step = step
        brain.on_fit_batch_start(batch(100), should_step=True)
        one, other = (x.param_groups[0]["lr"] for x in optimizers)
        assert one == other
        seen.append(one)
        if step % 3 == 2:
            brain.learning_rate.end_epoch(optimizers, step // 3 + 1, 5.0)
    assert seen == pytest.approx(rates)


def test_a_plateau_may_be_reached_by_a_warm_up(make):
    brain = make(warmup_steps=4, lr=1.0)
    brain.on_fit_start()
    seen = []
    for step in range(6):
        brain.optimizer_step = step
        brain.on_fit_batch_start(batch(100), should_step=True)
        seen.append(brain.optimizer.param_groups[0]["lr"])
    assert seen == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_batches_that_gather_gradients_do_not_count(make):
    brain = make(lr_scheduler=LinearWarmupScheduler(1.0, 4, 8))
    brain.on_fit_start()
    seen = []
    for should_step in (False, False, True) * 2:
        brain.on_fit_batch_start(batch(100), should_step)
        if should_step:
            seen.append(brain.optimizer.param_groups[0]["lr"])
    assert seen == [0.25, 0.5]


def test_a_schedule_that_nobody_would_step_is_refused(make):
    with pytest.raises(TypeError, match="CyclicLRScheduler is called with"):
        make(lr_scheduler=CyclicLRScheduler())


def row(score, level_db=0.0, polarity=1.0):
    names = ("si-snr", "si-snr_i", "level_db", "polarity")
    return dict(zip(names, (score, score, level_db, polarity)))


@pytest.mark.parametrize(
    "signs, polarity",
    [((1, 1, -1), 1), ((-1, -1, 1), -1), ((math.nan, 1, 0), 1)],
)
def test_most_outputs_say_the_polarity(make, signs, polarity):
    brain = make()
    brain.on_fit_start()
    brain.train_stats = {"loss": 0.0}
    brain.rows = [row(1.0, polarity=sign) for sign in signs]
    brain.on_stage_end(sb.Stage.VALID, torch.tensor(0.0), 1)
    best = brain.checkpointer.find_checkpoint(min_key="si-snr")
    assert best.meta["polarity"] == polarity


def test_a_loss_that_fixes_the_level_leaves_nothing_to_mend(make):
    brain = make(loss=pit_snr_loss)
    brain.on_fit_start()
    brain.train_stats = {"loss": 0.0}
    brain.rows = [row(1.0, level_db=-2.0, polarity=-1.0)]
    brain.on_stage_end(sb.Stage.VALID, torch.tensor(0.0), 1)
    meta = brain.checkpointer.find_checkpoint(min_key="si-snr").meta
    assert meta["si-snr"] == -1.0 and not {"level_db", "polarity"} & set(meta)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_gradients_of_all_weights_are_clipped_together(make, scale):
    brain = make({"max_grad_norm": 5.0})
    brain.on_fit_start()
    if scale > 1:  # as in float16
        brain.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        brain.scaler.scale(torch.ones(()))
    weights = list(brain.modules.parameters())
    for i, weight in enumerate(weights):
        weight.grad = torch.full_like(weight, scale * (1.0 + i))
    norms = torch.stack([weight.grad.norm() for weight in weights])
    seen = []
    for optimizer in brain.optimizers_dict.values():
        optimizer.register_step_pre_hook(
            lambda *_: seen.append([p.grad.norm() for p in weights])
        )
    brain.optimizers_step()
    # Every optimizer: the direction stays, the norm of all is the limit.
    for found in seen:
        clipped = norms * 5 / norms.norm()
        assert torch.allclose(torch.stack(found), clipped, rtol=1e-3)
    assert len(seen) == 2


def test_all_else_of_a_step_is_left_to_speechbrain(make, monkeypatch):
    brain, steps = make(), []
    brain.on_fit_start()
    monkeypatch.setattr(
        sb.Brain, "optimizers_step", lambda brain: steps.append(brain)
    )
    brain.optimizers_step()
    assert steps == [brain]


def test_conv_tasnets_weights_need_no_matrix_optimizer(make):
    brain = make(matrix_optimizer=lambda groups: pytest.fail("no matrices"))
    brain.modules["masknet"] = torch.nn.Conv1d(16, 16, 1)
    brain.init_optimizers()
    (optimizer,) = brain.optimizers_dict.values()
    taken = sum(len(group["params"]) for group in optimizer.param_groups)
    assert taken == len(list(brain.modules.parameters()))


def test_broken_validation_is_never_the_best(make):
    brain = make()
    brain.on_fit_start()
    brain.train_stats = {"loss": 0.0}
    for epoch, score in enumerate((3.0, math.nan, 2.0), 1):
        brain.rows = [row(20.0, 5.0), row(score, score)]
        brain.on_stage_end(sb.Stage.VALID, torch.tensor(-20.0), epoch)
    best = brain.checkpointer.find_checkpoint(min_key="si-snr")
    assert best.meta["epoch"] == 1
    assert best.meta["level_db"] == 4.0


def test_batches_of_unlike_length_are_tested_item_by_item(make, tmp_path):
    brain = make(n_audio_to_save=2)
    brain.modules.eval()

    def test(*batches):
        brain.on_stage_start(sb.Stage.TEST)
        for x in batches:
            brain.evaluate_batch(x, sb.Stage.TEST)
        brain.save_results()
        with open(tmp_path / "test_results.csv", newline="") as file:
            return {row["snt_id"]: row for row in csv.DictReader(file)}

    together = test(batch(4000, 2500))
    x = batch(4000, 2500)
    apart = test(alone(x, 0, 4000), alone(x, 1, 2500))
    ends = ["avg", "median", "5th percentile"]
    assert list(together) == list(apart) == ["x0", "x1", *ends]
    for name, row in together.items():
        for key in ("si-snr", "si-snr_i", "sdr", "sdr_i"):
            assert float(row[key]) == pytest.approx(
                float(apart[name][key]), abs=1e-2
            )
    assert len(list((tmp_path / "audio_results").glob("*_mix.wav"))) == 2
    assert len(list((tmp_path / "audio_worst").glob("*_mix.wav"))) == 2
    assert not list(tmp_path.glob("*.running"))


def test_a_test_without_audio_leaves_that_of_the_test_before(make, tmp_path):
    for save in (True, False):
        brain = make(save_audio=save)
        brain.modules.eval()
        brain.on_stage_start(sb.Stage.TEST)
        brain.evaluate_batch(batch(4000), sb.Stage.TEST)
        brain.save_results()
        for name in ("audio_results", "audio_worst"):
            files = list((tmp_path / name).iterdir())
            assert len(files) == 5
    # A test with audio replaces all of it.
    (tmp_path / "audio_results" / "old_mix.wav").touch()
    brain = make()
    brain.modules.eval()
    brain.on_stage_start(sb.Stage.TEST)
    brain.evaluate_batch(batch(4000), sb.Stage.TEST)
    brain.save_results()
    assert len(list((tmp_path / "audio_results").iterdir())) == 5
    assert not list(tmp_path.glob("*.running"))


@pytest.mark.parametrize(
    "save_audio, asked, first, worst",
    [(True, 1, 1, 3), (True, 0, 0, 3), (False, 2, 0, 0)],
)
def test_as_much_audio_is_saved_as_asked_for(
    make, tmp_path, save_audio, asked, first, worst
):
    brain = make(save_audio=save_audio, n_audio_to_save=asked)
    brain.modules.eval()
    brain.on_stage_start(sb.Stage.TEST)
    brain.evaluate_batch(batch(1000, 1000, 1000), sb.Stage.TEST)
    brain.save_results()
    for folder, count in (("audio_results", first), ("audio_worst", worst)):
        assert len(list((tmp_path / folder).glob("*_mix.wav"))) == count


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


def test_training_batches_are_augmented(make):
    brain = make(use_rand_shift=True, min_shift=5, max_shift=5)
    brain.on_fit_start()
    x, plain = batch(1000), batch(1000)
    brain.on_fit_batch_start(x, should_step=True)
    for name in ("mix_sig", "s1_sig", "s2_sig"):
        shifted = getattr(plain, name).data.roll(5, 1)
        torch.testing.assert_close(getattr(x, name).data, shifted)


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


def test_a_batch_that_is_not_finite_changes_nothing_and_is_told(make, caplog):
    brain = make({"nonfinite_patience": 2, "skip_nonfinite_grads": True})
    brain.on_fit_start()
    brain.modules.train()
    brain.nonfinite_count = 0
    brain.fit_batch(batch(4000))
    before = [p.clone() for p in brain.modules.parameters()]
    broken = batch(4000)
    broken.mix_sig.data[0, 7] = math.nan
    for count in (1, 2):
        brain.fit_batch(broken)
        assert brain.nonfinite_count == count
        assert "x0 is not finite" in caplog.text
        assert all(map(torch.equal, before, brain.modules.parameters()))
    brain.on_stage_end(sb.Stage.TRAIN, 1.0)
    assert brain.train_stats["nonfinite"] == 2
    with pytest.raises(ValueError, match="patience is exhausted"):
        brain.fit_batch(broken)
    brain.fit_batch(batch(4000))
    assert not torch.equal(before[0], next(brain.modules.parameters()))


def test_the_mean_of_the_best_checkpoints_is_tested(make):
    brain = make(avg_checkpoints=2)
    brain.on_fit_start()
    brain.train_stats = {"loss": 0.0}
    weight = brain.checkpointer.recoverables["masknet"].masks.weight
    for epoch, score in enumerate((3.0, 1.0, 5.0, 2.0), 1):
        torch.nn.init.constant_(weight, score)
        brain.rows = [row(score)]
        brain.on_stage_end(sb.Stage.VALID, torch.tensor(0.0), epoch)
    brain.on_evaluate_start(min_key="si-snr")
    assert weight.unique().tolist() == [4.0]


def test_the_last_validated_checkpoints_are_kept_too(make):
    brain = make(avg_checkpoints=2)
    brain.on_fit_start()
    brain.train_stats = {"loss": 0.0}
    checkpointer = brain.checkpointer
    for epoch, score in enumerate((9.0, 8.0, 1.0, 5.0, 2.0), 1):
        brain._save_intra_epoch_ckpt()
        brain.rows = [row(score)]
        brain.on_stage_end(sb.Stage.VALID, torch.tensor(0.0), epoch)
    found = checkpointer.find_checkpoints()
    assert [x.meta["epoch"] for x in found] == [5, 4, 2, 1]


def test_statistics_go_to_the_board_too(make):
    board = Log()
    brain = make(tensorboard_train_logger=board)
    brain.on_fit_start()
    brain.train_stats = {"loss": 0.0}
    brain.rows = [row(1.0)]
    brain.on_stage_end(sb.Stage.VALID, torch.tensor(0.0), 1)
    assert board.lines == brain.hparams.train_logger.lines != []
