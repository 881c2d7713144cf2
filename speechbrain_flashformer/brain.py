"""The training loop of separation, on SpeechBrain's own hooks."""

import csv
import math
import os
from pathlib import Path

import soundfile
import speechbrain as sb
import torch
from speechbrain.nnet.schedulers import ReduceLROnPlateau
from speechbrain.nnet.schedulers import update_learning_rate as set_lr
from speechbrain.utils.distributed import main_process_only
from speechbrain.utils.logger import get_logger

from speechbrain_flashformer.metrics import best_order, reorder, sdr, si_snr
from speechbrain_flashformer.separate import separate

logger = get_logger(__name__)

RESULT_COLUMNS = ["snt_id", "sdr", "sdr_i", "si-snr", "si-snr_i"]


class Separation(sb.Brain):
    """Separate, score against the best order of speakers, keep the best.

    Hyperparameters read: ``num_spks``, ``sample_rate``, ``loss``
    (``loss(targets, predictions, lengths) -> [B]``), ``threshold_byloss`` and
    ``threshold``, ``lr_scheduler`` (a ``ReduceLROnPlateau``, or a schedule
    over steps called with optimizer and step, as ``WarmCoolDecayLRSchedule``),
    ``matrix_optimizer`` (optional: takes the weight matrices of the masknet,
    ``optimizer`` the rest), ``train_logger``, ``output_folder``,
    ``save_audio`` and ``n_audio_to_save``.
    """

    def compute_forward(self, batch, stage):
        """Estimated sources, [B, T, S]."""
        mixture, lengths = batch.to(self.device).mix_sig
        return separate(
            mixture,
            self.modules["encoder"],
            self.modules["masknet"],
            self.modules["decoder"],
            lengths if (lengths < 1).any() else None,
        )

    def compute_objectives(self, predictions, batch, stage):
        """The loss; beyond training, also the scores of each item."""
        targets, lengths = self.targets(batch), batch.mix_sig.lengths
        # In half precision the energies of a few seconds overflow.
        with torch.autocast(self.device_type, enabled=False):
            predictions = predictions.float()
            loss = self.hparams.loss(targets, predictions, lengths)
            if stage == sb.Stage.TRAIN:
                return self.drop_easy(loss)
            self.score(batch, predictions, targets, lengths, stage)
        return loss.mean()

    def targets(self, batch):
        """The clean sources, [B, T, S]."""
        names = [f"s{i + 1}_sig" for i in range(self.hparams.num_spks)]
        return torch.stack([getattr(batch, n).data for n in names], dim=-1)

    def drop_easy(self, loss):
        """Mean over the items that still have something to teach.

        With none left the loss is a zero that reaches every weight, so that
        no process waits for gradients of another.
        """
        if self.hparams.threshold_byloss:
            hard = (loss > self.hparams.threshold) | ~loss.isfinite()
            return (loss * hard).sum() / hard.sum().clamp(min=1)
        return loss.mean()

    def score(self, batch, predictions, targets, lengths, stage):
        """Keep the scores of a batch, and in the test its first audio."""
        scores, order = best_order(targets, predictions, lengths)
        predictions = reorder(predictions, order)
        mixture = batch.mix_sig.data.unsqueeze(2).expand_as(targets)
        baseline = si_snr(targets, mixture, lengths)
        samples = (lengths * targets.shape[1]).round().long().tolist()
        for b, n in enumerate(samples):
            power = [x[b, :n].square().mean(0) for x in (predictions, targets)]
            row = {
                "snt_id": batch.id[b],
                "level_db": 10 * torch.log10(power[0] / power[1]).mean().item(),
                "si-snr": scores[b].mean().item(),
                "si-snr_i": (scores[b] - baseline[b]).mean().item(),
            }
            if stage == sb.Stage.TEST:
                clean, noisy, separated = (
                    x[b, :n].T.cpu() for x in (targets, mixture, predictions)
                )
                row["sdr"] = sdr(clean, separated).mean().item()
                row["sdr_i"] = row["sdr"] - sdr(clean, noisy).mean().item()
                if self.hparams.save_audio and len(self.rows) < (
                    self.hparams.n_audio_to_save
                ):
                    self.save_audio(row["snt_id"], noisy, clean, separated)
            self.rows.append(row)

    def make_dataloader(self, dataset, stage, **kwargs):
        """A loader; Brain tells a given sampler the epoch only under DDP."""
        loader = super().make_dataloader(dataset, stage, **kwargs)
        if stage == sb.Stage.TRAIN and self.train_sampler is None:
            self.train_sampler = loader.sampler
        return loader

    # --- optimizers and schedules -------------------------------------------

    def init_optimizers(self):
        """One optimizer, or two if ``matrix_optimizer`` is given."""
        if not hasattr(self.hparams, "matrix_optimizer"):
            super().init_optimizers()
            return
        matrices = [
            p for p in self.modules["masknet"].parameters() if p.ndim == 2
        ]
        taken = {id(p) for p in matrices}
        rest = [p for p in self.modules.parameters() if id(p) not in taken]
        self.optimizer = self.opt_class(rest)
        self.optimizers_dict = {
            "optimizer": self.optimizer,
            "matrix_optimizer": self.hparams.matrix_optimizer(matrices),
        }
        if self.checkpointer is not None:
            for name, optimizer in self.optimizers_dict.items():
                self.checkpointer.add_recoverable(name, optimizer)

    def on_fit_batch_start(self, batch, should_step):
        """Set the learning rate of this step, when the schedule is by step."""
        schedule = self.hparams.lr_scheduler
        if should_step and not isinstance(schedule, ReduceLROnPlateau):
            for optimizer in self.optimizers_dict.values():
                schedule(optimizer, self.optimizer_step + 1)

    def _end_epoch_lr(self, epoch, loss):
        """Lower the learning rate on a plateau; the rate of this epoch."""
        lr = self.optimizer.param_groups[0]["lr"]
        if isinstance(self.hparams.lr_scheduler, ReduceLROnPlateau):
            # It counts a bad epoch once for each optimizer that it is given.
            _, next_lr = self.hparams.lr_scheduler(
                [self.optimizer], epoch, loss
            )
            for optimizer in self.optimizers_dict.values():
                set_lr(optimizer, next_lr)
        return lr

    # --- stages -------------------------------------------------------------

    def on_stage_start(self, stage, epoch=None):
        """Forget the scores of the stage before."""
        self.rows = []

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log, step the schedule, save."""
        if stage == sb.Stage.TRAIN:
            self.train_stats = {"si-snr": stage_loss}
            return
        stats = {
            name: sum(row[name] for row in self.rows) / max(1, len(self.rows))
            for name in ("si-snr_i", "sdr_i")
            if name in self.rows[0]
        }
        # Brain's average passes over what is not finite, and a broken model
        # would look good: take it from all rows.
        loss = -sum(row["si-snr"] for row in self.rows) / len(self.rows)
        stats = {"si-snr": loss, **stats}
        if stage == sb.Stage.VALID:
            loss = loss if math.isfinite(loss) else math.inf
            lr = self._end_epoch_lr(epoch, loss)
            self.hparams.train_logger.log_stats(
                stats_meta={"epoch": epoch, "lr": lr},
                train_stats=self.train_stats,
                valid_stats=stats,
            )
            # How much louder the estimates are than the sources; finite rows.
            levels = [row["level_db"] for row in self.rows]
            levels = [level for level in levels if math.isfinite(level)]
            level = sum(levels) / max(1, len(levels))
            self.checkpointer.save_and_keep_only(
                meta={"si-snr": loss, "epoch": epoch, "level_db": level},
                min_keys=["si-snr"],
            )
        else:
            self.hparams.train_logger.log_stats(
                stats_meta={"epoch loaded": self.hparams.epoch_counter.current},
                test_stats=stats,
            )
            self.save_results()

    def on_evaluate_start(self, max_key=None, min_key=None):
        """Load the best checkpoint; without one there is nothing to test."""
        if self.checkpointer.find_checkpoint(max_key, min_key) is None:
            raise FileNotFoundError(
                f"no checkpoint in {self.checkpointer.checkpoints_dir}: train "
                "first, or give the output_folder of a training"
            )
        super().on_evaluate_start(max_key, min_key)

    # --- outputs ------------------------------------------------------------

    @main_process_only
    def save_results(self):
        """Write ``test_results.csv``: a row per mixture, then their mean."""
        mean = {"snt_id": "avg"}
        for name in RESULT_COLUMNS[1:]:
            mean[name] = sum(r[name] for r in self.rows) / len(self.rows)
        path = Path(self.hparams.output_folder) / "test_results.csv"
        partial = path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, RESULT_COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows([*self.rows, mean])
        os.replace(partial, path)
        logger.info(
            f"{len(self.rows)} test mixtures: SI-SNRi "
            f"{mean['si-snr_i']:.2f} dB, SDRi {mean['sdr_i']:.2f} dB ({path})"
        )

    @main_process_only
    def save_audio(self, name, mixture, targets, predictions):
        """Write NAME_mix.wav, NAME_s1.wav, NAME_s1hat.wav, ...

        Estimates are brought to the level of their source: SI-SNR training
        leaves the scale free, and a quiet or clipped file tells nothing.
        """
        folder = Path(self.hparams.output_folder) / "audio_results"
        folder.mkdir(parents=True, exist_ok=True)
        signals = {"mix": mixture[0]}
        for i, (target, estimate) in enumerate(zip(targets, predictions)):
            gain = target.norm() / estimate.norm().clamp(min=1e-8)
            signals[f"s{i + 1}"] = target
            signals[f"s{i + 1}hat"] = estimate * gain
        # One gain for all, so that they stay comparable.
        peak = max(signal.abs().max().item() for signal in signals.values())
        scale = min(1.0, 0.99 / max(peak, 1e-8))
        for suffix, signal in signals.items():
            soundfile.write(
                folder / f"{name}_{suffix}.wav",
                (signal * scale).numpy(),
                self.hparams.sample_rate,
            )
