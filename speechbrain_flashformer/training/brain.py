"""The training loop of separation, on SpeechBrain's own hooks."""

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
    """Separate, score against the best order of speakers, keep the best.

    Runs under ``torchrun`` as well: every process trains on, and tests, its
    own part of the data.

    Hyperparameters read, those in brackets when they are there:
    ``num_spks``, ``sample_rate``, ``loss`` (``loss(targets, predictions,
    lengths) -> [B]``), ``threshold_byloss`` and ``threshold``,
    [``loss_upper_lim``], ``lr_scheduler`` (any of SpeechBrain's),
    [``warmup_steps`` and ``lr``, before a schedule by epochs],
    [``matrix_optimizer``: takes the weight matrices of the masknet,
    ``optimizer`` the rest; all their parameters have one learning rate],
    [``avg_checkpoints``: tests the mean of so many best checkpoints],
    ``train_logger``, [``tensorboard_train_logger``],
    ``output_folder``, ``save_audio`` and ``n_audio_to_save``,
    [``more_metrics``: ``pesq``, ``stoi``], and those of ``augment``.
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
        """Estimated sources, [B, T, S]."""
        # Brain itself moves no batch; each stage comes by here.
        mixture, _ = self.to_device(batch).mix_sig
        return separate(
            mixture,
            self.modules["encoder"],
            self.modules["masknet"],
            self.modules["decoder"],
            batch.padded_lengths,
        )

    def to_device(self, batch):
        """Move a batch to the device, but for its lengths if it is padded.

        From lengths on the device, masks would have to wait for it.
        """
        if not hasattr(batch, "padded_lengths"):
            lengths = batch.mix_sig.lengths
            batch.padded_lengths = lengths if (lengths < 1).any() else None
        return batch.to(self.device)

    def compute_objectives(self, predictions, batch, stage):
        """In training the loss, else the negative SI-SNR of the scores."""
        targets, lengths = self.targets(batch), batch.mix_sig.lengths
        # In half precision the energies of a few seconds overflow.
        with torch.autocast(self.device_type, enabled=False):
            predictions = predictions.float()
            if stage == sb.Stage.TRAIN:
                loss = self.hparams.loss(targets, predictions, lengths)
                return self.threshold_by_loss(loss)
            rows = self.score(batch, predictions, targets, lengths, stage)
        return -torch.tensor([row["si-snr"] for row in rows]).mean()

    def targets(self, batch):
        """The clean sources, [B, T, S]."""
        names = [f"s{i + 1}_sig" for i in range(self.hparams.num_spks)]
        return torch.stack([getattr(batch, n).data for n in names], dim=-1)

    def threshold_by_loss(self, loss):
        """Mean over the items that still have something to teach.

        With none left the loss is a zero that reaches every weight, so that
        no process waits for gradients of another.
        """
        keep = loss < getattr(self.hparams, "loss_upper_lim", math.inf)
        if self.hparams.threshold_byloss:
            keep &= loss > self.hparams.threshold
        # A loss that is not finite stays so, times 0: Brain is to count it.
        return (loss * keep).sum() / keep.sum().clamp(min=1)

    def score(self, batch, predictions, targets, lengths, stage):
        """Rows of a batch, which are kept; in the test, its first audio too."""
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
        """A loader, of this process's part of the data."""
        # Torch draws a seed for workers from the common generator, even
        # without workers: a resumed training would draw once more.
        options["generator"] = torch.Generator()
        if stage != sb.Stage.TRAIN and is_initialized():
            options["sampler"] = range(
                get_rank(), len(dataset), get_world_size()
            )
        loader = super().make_dataloader(dataset, stage, **options)
        if stage == sb.Stage.TRAIN and self.train_sampler is None:
            # Brain tells a sampler of ours the epoch only under DDP.
            self.train_sampler = options.get("batch_sampler", loader.sampler)
        return loader

    # --- training -----------------------------------------------------------

    def init_optimizers(self):
        """One optimizer, or two if ``matrix_optimizer`` is given."""
        if not hasattr(self.hparams, "matrix_optimizer"):
            super().init_optimizers()
            return
        matrices = matrix_groups(self.modules["masknet"])
        if not matrices:  # such as Conv-TasNet's
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
        """Change the batch; set the learning rate of this step."""
        self.to_device(batch)
        self.batch_ids = batch.id
        augment(batch, self.hparams)
        if should_step:
            self.learning_rate.begin_step(
                list(self.optimizers_dict.values()), self.optimizer_step + 1
            )

    def check_loss_isfinite(self, loss):
        """Tell which batch is not finite; Brain counts, and loses patience."""
        if loss.isfinite():
            return
        logger.warning(
            "Loss of %s is not finite: its step is left out (%d in this epoch)",
            ", ".join(self.batch_ids),
            self.nonfinite_count + 1,
        )
        super().check_loss_isfinite(loss)

    def check_gradients(self):
        """Brain's check, which waits for the device once per weight.

        Here once, where all are finite.
        """
        gradients = [p.grad for p in self.modules.parameters()]
        gradients = [x for x in gradients if x is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            super().check_gradients()

    def _should_save_intra_epoch_ckpt(self, *args):
        """Brain's decision, but never with gradients half gathered."""
        gathering = self.step % self.grad_accumulation_factor
        return super()._should_save_intra_epoch_ckpt(*args) and not gathering

    # --- stages -------------------------------------------------------------

    def on_stage_start(self, stage, epoch=None):
        """Forget the scores of the stage before."""
        self.rows = []
        if stage == sb.Stage.TEST:
            folder = Path(self.hparams.output_folder)
            run_on_main(remove_running, [folder])
            rank = get_rank() if is_initialized() else 0
            ranks = get_world_size() if is_initialized() else 1
            # The first mixtures of all are the first of every process.
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
        """Log, step the schedule, save."""
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
        # Brain's average passes over what is not finite, and a broken model
        # would look good: take it from all rows.
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
        # How much louder the estimates are than the sources; finite rows.
        levels = [row["level_db"] for row in rows]
        levels = [level for level in levels if math.isfinite(level)]
        if levels and not fixes_level(self.hparams.loss):
            meta["level_db"] = sum(levels) / len(levels)
            # SI-SNR does not see the sign; a network has one for all outputs.
            inverted = sum(row["polarity"] < 0 for row in rows)
            meta["polarity"] = -1 if 2 * inverted > len(rows) else 1
        self.checkpointer.save_and_keep_only(
            meta=meta,
            num_to_keep=self.avg_checkpoints,
            min_keys=["si-snr"],
        )

    def log(self, **stats):
        """Hand statistics to the loggers, whose main process writes."""
        self.hparams.train_logger.log_stats(**stats)
        board = getattr(self.hparams, "tensorboard_train_logger", None)
        if board is not None:
            board.log_stats(**stats)

    def on_evaluate_start(self, max_key=None, min_key=None):
        """Load the best checkpoint, or the mean of the best ones."""
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
        """How many checkpoints a test takes the mean of."""
        return getattr(self.hparams, "avg_checkpoints", 1)

    @property
    def more_metrics(self):
        """Measures of the test beside SI-SNR and SDR."""
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
            test_stats=mean | {"si-snr": -mean["si-snr"]},
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
