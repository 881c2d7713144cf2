"""Schedules of the learning rate: any of SpeechBrain's, for all optimizers."""

import inspect

from speechbrain.nnet.schedulers import (
    ReduceLROnPlateau,
    WarmCoolDecayLRSchedule,
)

# What a schedule is called with -> when that is known.
KINDS = {
    ("opt", "num_updates"): "step",
    ("opt",): "own steps",
    ("current_epoch",): "epoch",
    ("metric_value",): "loss",
}


class LearningRate:
    """Gives all optimizers one learning rate, which a schedule chooses.

    Arguments
    ---------
    schedule : object
        One of ``speechbrain.nnet.schedulers`` that is called with an
        optimizer, an epoch or a loss.
    warmup_steps : int
        Steps of a linear warm-up before a schedule by epochs.
    peak : float
        Where the warm-up ends.

    Raises
    ------
    TypeError
        When the schedule is called with anything else.

    Example
    -------
    >>> import torch
    >>> from speechbrain.nnet.schedulers import StepScheduler
    >>> weights = [torch.nn.Parameter(torch.zeros(1))]
    >>> optimizer = torch.optim.SGD(weights, lr=1.0)
    >>> rate = LearningRate(StepScheduler(1.0), warmup_steps=4, peak=1.0)
    >>> rate.begin_step([optimizer], 1)
    >>> optimizer.param_groups[0]["lr"]
    0.25
    """

    def __init__(self, schedule, warmup_steps=0, peak=None):
        self.schedule, self.warmup_steps = schedule, warmup_steps
        self.peak = peak
        takes = tuple(inspect.signature(schedule).parameters)
        self.kind = KINDS.get(takes)
        if isinstance(schedule, ReduceLROnPlateau):
            self.kind = "plateau"
        elif self.kind is None:
            raise TypeError(
                f"lr_scheduler {type(schedule).__name__} is called with "
                f"{takes}: take one of speechbrain.nnet.schedulers that is "
                "called with an optimizer, an epoch or a loss"
            )

    def begin_step(self, optimizers, step):
        """Set the learning rate of a step, counted from 1."""
        first = optimizers[0]
        if self.kind == "step":
            self.schedule(first, step)
        elif self.kind == "own steps":
            self.schedule(first)
        elif step <= self.warmup_steps:
            _set_lr(optimizers, self.peak * step / self.warmup_steps)
        # A schedule may end before a training that was made longer.
        _set_lr(optimizers, max(0.0, first.param_groups[0]["lr"]))

    def end_epoch(self, optimizers, epoch, loss):
        """Step a schedule by epochs; the learning rate of this epoch."""
        lr = optimizers[0].param_groups[0]["lr"]
        if self.kind == "plateau":
            # It counts a bad epoch once for each optimizer that it is given.
            _, next_lr = self.schedule(optimizers[:1], epoch, loss)
        elif self.kind == "epoch":
            _, next_lr = self.schedule(epoch)
        elif self.kind == "loss":
            _, next_lr = self.schedule(loss)
        else:
            return lr
        _set_lr(optimizers, next_lr)
        return lr


def _set_lr(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def steps_per_epoch(loader, grad_accumulation_factor):
    """Optimizer steps that each process takes in an epoch."""
    if len(loader) < grad_accumulation_factor:
        raise ValueError(
            f"an epoch has {len(loader)} batches in each process, too few to "
            f"gather {grad_accumulation_factor} for a step: lower batch_size "
            "or grad_accumulation_factor"
        )
    return len(loader) // grad_accumulation_factor


def stretch_schedule(schedule, steps):
    """Let a warm-up and cool-down end where the training does."""
    if isinstance(schedule, WarmCoolDecayLRSchedule):
        share = schedule.cooldown / schedule.total_steps
        schedule.total_steps = steps
        schedule.cooldown = max(1, round(share * steps))
        schedule.warmup = min(schedule.warmup, steps - schedule.cooldown)
