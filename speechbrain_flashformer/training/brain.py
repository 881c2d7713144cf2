"""The training loop of separation, as a SpeechBrain ``Brain``."""

import math
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.utils.distributed import ddp_barrier, run_on_main
from speechbrain.utils.logger import get_logger
from torch.distributed import get_rank, get_world_size, is_initialized

from speechbrain_flashformer.nnet.separator import MODULES, separate
from speechbrain_flashformer.training.augment import augment
from speechbrain_flashformer.training.checkpoints import (
    RandomState,
    all_gather,
    averaged_weights,
    save_validated,
)
from speechbrain_flashformer.training.losses import fixes_level
from speechbrain_flashformer.training.optim import matrix_groups
from speechbrain_flashformer.training.schedules import LearningRate
from speechbrain_flashformer.training.scores import (
    AUDIO_FOLDERS,
    RUNNING,
    WORST,
    ResultsWriter,
    quick_scores,
    remove_running,
    replace_audio,
    sort_key,
    write_example,
    write_results,
)

logger = get_logger(__name__)


class Separation(sb.Brain):
    """Train, validate and test a separation model; keep the best and the last.

    It runs under ``torchrun`` too: every process trains on and tests its part
    of the data. It uses these hyperparameters; those in brackets are optional:
    ``num_spks``, ``sample_rate``, ``loss`` (``loss(targets, predictions,
    lengths) -> [B]``), ``threshold_byloss`` and ``threshold``,
    [``loss_upper_lim``], ``lr_scheduler`` (any of SpeechBrain's),
    [``warmup_steps`` and ``lr``: warmup before a schedule by epochs],
    [``matrix_optimizer``: for the weight matrices of the masknet, with
    ``optimizer`` for all other parameters; both get the same learning rate],
    [``avg_checkpoints``: number of best checkpoints to average for the test; as
    many last ones are kept], ``epoch_counter``, ``train_logger``,
    [``tensorboard_train_logger``], ``output_folder``, ``save_audio`` and
    ``n_audio_to_save``, [``more_metrics``: ``pesq``, ``stoi``], and those of
    ``augment``.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.learning_rate = LearningRate(
            self.hparams.lr_scheduler,
            getattr(self.hparams, "warmup_steps", 0),
            getattr(self.hparams, "lr", None),
        )
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable(
                "random", RandomState(), optional_load=True
            )

    def compute_forward(self, batch, stage):
        """Separate a batch; returns the estimated sources, [B, T, S]."""
        # Brain does not move the batch. All stages call this method.
        mixture, _ = self.to_device(batch).mix_sig
        return separate(
            mixture,
            self.modules["encoder"],
            self.modules["masknet"],
            self.modules["decoder"],
            batch.padded_lengths,
        )

    def to_device(self, batch):
        """Move a batch to the device; ``padded_lengths`` stay on the CPU.

        These are the relative lengths of a padded batch, else None. On a GPU,
        the masks made from them would have to wait for it.
        """
        if not hasattr(batch, "padded_lengths"):
            lengths = batch.mix_sig.lengths
            batch.padded_lengths = lengths if (lengths < 1).any() else None
        return batch.to(self.device)

    def compute_objectives(self, predictions, batch, stage):
        """Compute the loss in training, else the mean negative SI-SNR in dB."""
        targets, lengths = self.targets(batch), batch.mix_sig.lengths
        # In half precision, the energy of a few seconds would overflow.
        with torch.autocast(self.device_type, enabled=False):
            predictions = predictions.float()
            if stage == sb.Stage.TRAIN:
                loss = self.hparams.loss(targets, predictions, lengths)
                return self.threshold_by_loss(loss)
            rows = self.score(batch, predictions, targets, lengths, stage)
        return -torch.tensor([row["si-snr"] for row in rows]).mean()

    def targets(self, batch):
        """Stack the clean sources of a batch, [B, T, S]."""
        names = [f"s{i + 1}_sig" for i in range(self.hparams.num_spks)]
        return torch.stack([getattr(batch, n).data for n in names], dim=-1)

    def threshold_by_loss(self, loss):
        """Average losses [B] in dB between ``threshold`` and the upper limit.

        If none is left, the loss is 0 and still connected to every weight, so
        that no process waits for gradients of another.
        """
        keep = loss < getattr(self.hparams, "loss_upper_lim", math.inf)
        if self.hparams.threshold_byloss:
            keep &= loss > self.hparams.threshold
        # A loss that is not finite stays so when multiplied by 0: Brain counts
        # it.
        return (loss * keep).sum() / keep.sum().clamp(min=1)

    def score(self, batch, predictions, targets, lengths, stage):
        """Score a batch and store its rows; in the test, also save audio."""
        rows, signals = quick_scores(
            batch.id, batch.mix_sig.data, targets, predictions, lengths
        )
        if stage == sb.Stage.VALID:
            self.rows += rows
            return rows
        for row, parts in zip(rows, signals):
            self.results.add(row, *parts)
            if self.audio_to_save > 0:
                self.audio_to_save -= 1
                self.save_audio(AUDIO_FOLDERS[0], row["snt_id"], parts)
        return rows

    # --- data ---------------------------------------------------------------

    def make_dataloader(self, dataset, stage, **options):
        """Make a loader for this process's part of the data."""
        # Each iterator of a loader draws a seed for workers, even without
        # workers. From the global generator, a resumed training would draw one
        # more.
        options["generator"] = torch.Generator()
        if stage != sb.Stage.TRAIN and is_initialized():
            options["sampler"] = range(
                get_rank(), len(dataset), get_world_size()
            )
        loader = super().make_dataloader(dataset, stage, **options)
        if stage == sb.Stage.TRAIN and self.train_sampler is None:
            # Brain sets the epoch of a custom sampler only under DDP.
            self.train_sampler = options.get("batch_sampler", loader.sampler)
        return loader

    # --- training -----------------------------------------------------------

    def init_optimizers(self):
        """Create one optimizer, or two if ``matrix_optimizer`` is given."""
        if not hasattr(self.hparams, "matrix_optimizer"):
            super().init_optimizers()
            return
        matrices = matrix_groups(self.modules["masknet"])
        if not matrices:  # for example, Conv-TasNet
            super().init_optimizers()
            return
        taken = {id(p) for group in matrices for p in group["params"]}
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
        """Augment the batch and set the learning rate of this step."""
        self.to_device(batch)
        self.batch_ids = batch.id
        augment(batch, self.hparams)
        if should_step:
            self.learning_rate.begin_step(
                list(self.optimizers_dict.values()), self.optimizer_step + 1
            )

    def optimizers_step(self):
        """Clip all gradients together: Brain clips one group per optimizer."""
        limit = self.max_grad_norm * self.scaler.get_scale()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), limit)
        super().optimizers_step()

    def check_loss_isfinite(self, loss):
        """Log the batch of a loss that is not finite; Brain counts these."""
        if loss.isfinite():
            return
        logger.warning(
            "Loss of %s is not finite: its step is left out (%d in this epoch)",
            ", ".join(self.batch_ids),
            self.nonfinite_count + 1,
        )
        super().check_loss_isfinite(loss)

    def check_gradients(self):
        """Check that all gradients are finite, with one device sync.

        Brain's check synchronizes once per weight; it runs only on a failure.
        """
        gradients = [p.grad for p in self.modules.parameters()]
        gradients = [x for x in gradients if x is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            super().check_gradients()

    def _should_save_intra_epoch_ckpt(self, *args):
        """Follow Brain's decision, except during gradient accumulation."""
        due = super()._should_save_intra_epoch_ckpt(*args)
        return due and not self.step % self.grad_accumulation_factor

    # --- stages -------------------------------------------------------------

    def on_stage_start(self, stage, epoch=None):
        """Reset the scores; for a test, open the table of results."""
        self.rows = []
        if stage == sb.Stage.TEST:
            folder = Path(self.hparams.output_folder)
            run_on_main(remove_running, [folder])
            rank = get_rank() if is_initialized() else 0
            ranks = get_world_size() if is_initialized() else 1
            # The first mixtures of the test are the first of each process.
            audio = self.hparams.n_audio_to_save - rank
            self.audio_to_save = math.ceil(audio / ranks)
            if not self.hparams.save_audio:
                self.audio_to_save = 0
            self.results = ResultsWriter(
                folder / f"test_results.{rank}{RUNNING}",
                self.hparams.sample_rate,
                self.more_metrics,
            )

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Validation: log, step the schedule, save. Test: write results."""
        if stage == sb.Stage.TRAIN:
            self.train_stats = {
                "loss": stage_loss,
                "nonfinite": self.nonfinite_count,
            }
        elif stage == sb.Stage.VALID:
            self._end_validation(sum(all_gather(self.rows), []), epoch)
        else:
            self.save_results()

    def _end_validation(self, rows, epoch):
        # Brain's average skips values that are not finite, so that a broken
        # model would look good. Average all rows instead.
        loss, gain = (
            sum(row[name] for row in rows) / len(rows)
            for name in ("si-snr", "si-snr_i")
        )
        stats = {"si-snr": -loss, "si-snr_i": gain}
        loss = -loss if math.isfinite(loss) else math.inf
        lr = self.learning_rate.end_epoch(
            list(self.optimizers_dict.values()), epoch, loss
        )
        self.log(
            stats_meta={"epoch": epoch, "lr": lr},
            train_stats=self.train_stats,
            valid_stats=stats,
        )
        meta = {"si-snr": loss, "epoch": epoch}
        # The level of the estimates relative to the sources, finite rows only.
        levels = [row["level_db"] for row in rows]
        levels = [level for level in levels if math.isfinite(level)]
        if levels and not fixes_level(self.hparams.loss):
            meta["level_db"] = sum(levels) / len(levels)
            # SI-SNR ignores polarity; all outputs of a network share one.
            inverted = sum(row["polarity"] < 0 for row in rows)
            meta["polarity"] = -1 if 2 * inverted > len(rows) else 1
        save_validated(self.checkpointer, meta, self.avg_checkpoints)

    def log(self, **stats):
        """Pass statistics to the loggers; only the main process writes."""
        self.hparams.train_logger.log_stats(**stats)
        board = getattr(self.hparams, "tensorboard_train_logger", None)
        if board is not None:
            board.log_stats(**stats)

    def on_evaluate_start(self, max_key=None, min_key=None):
        """Load the best checkpoint, or the averaged weights of the best."""
        best = self.checkpointer.find_checkpoints(
            max_key=max_key,
            min_key=min_key,
            max_num_checkpoints=self.avg_checkpoints,
        )
        if not best:
            raise FileNotFoundError(
                f"no checkpoint in {self.checkpointer.checkpoints_dir}: train "
                "first, or give the output_folder of a training"
            )
        super().on_evaluate_start(max_key, min_key)
        if len(best) > 1:
            logger.info("Testing the mean of %d checkpoints", len(best))
            for name in MODULES:
                module = self.checkpointer.recoverables[name]
                module.load_state_dict(averaged_weights(best, name))

    @property
    def avg_checkpoints(self):
        """Number of checkpoints whose weights are averaged for a test."""
        return getattr(self.hparams, "avg_checkpoints", 1)

    @property
    def more_metrics(self):
        """Metrics of the test besides SI-SNR and SDR."""
        return getattr(self.hparams, "more_metrics", [])

    # --- outputs ------------------------------------------------------------

    def save_results(self):
        """Write ``test_results.csv`` and the audio of the worst mixtures."""
        rows = sum(all_gather(self.results.close()), [])
        worst = [row["snt_id"] for row in sorted(rows, key=sort_key)[:WORST]]
        for row, parts in self.results.worst:
            if row["snt_id"] in worst and self.hparams.save_audio:
                self.save_audio(AUDIO_FOLDERS[1], row["snt_id"], parts)
        ddp_barrier()
        path = Path(self.hparams.output_folder, "test_results.csv")
        summary = run_on_main(write_results, [path, rows, self.more_metrics])
        run_on_main(replace_audio, [path.parent])
        mean = {k: v for k, v in summary["avg"].items() if k != "snt_id"}
        self.log(
            stats_meta={"epoch loaded": self.hparams.epoch_counter.current},
            test_stats=mean,
        )
        logger.info(
            f"{len(rows)} test mixtures: SI-SNRi {mean['si-snr_i']:.2f} dB "
            f"(median {summary['median']['si-snr_i']:.2f}, 5th percentile "
            f"{summary['5th percentile']['si-snr_i']:.2f}), "
            f"SDRi {mean['sdr_i']:.2f} dB ({path})"
        )

    def save_audio(self, folder, name, signals):
        """Write the mixture, sources and estimates of one mixture."""
        write_example(
            Path(self.hparams.output_folder, folder + RUNNING),
            name,
            *signals,
            self.hparams.sample_rate,
        )
