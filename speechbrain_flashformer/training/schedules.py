"""Use any learning rate schedule of SpeechBrain for all optimizers."""

import inspect

from speechbrain.nnet.schedulers import (
    ReduceLROnPlateau,
    WarmCoolDecayLRSchedule,
)

# Arguments that a schedule is called with -> when it is called.
KINDS = {
    ("opt", "num_updates"): "step",
    ("opt",): "own steps",
    ("current_epoch",): "epoch",
    ("metric_value",): "loss",
}


class LearningRate:
    """Sets one learning rate for all optimizers, as a schedule defines it.

    Arguments
    ---------
    schedule : object
        A schedule of ``speechbrain.nnet.schedulers`` that is called with an
        optimizer, an epoch or a loss.
    warmup_steps : int
        Steps of the linear warmup, for schedules that change the learning rate
        once per epoch; other schedules ignore it.
    peak : float
        Learning rate at the end of the warmup.

    Raises
    ------
    TypeError
        If the schedule is called with other arguments.

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
        """Set the learning rate of a step.

        Arguments
        ---------
        optimizers : list of torch.optim.Optimizer
            All optimizers. A schedule of steps is called with the first.
        step : int
            Number of the step, from 1.
        """
        first = optimizers[0]
        if self.kind == "step":
            self.schedule(first, step)
        elif self.kind == "own steps":
            self.schedule(first)
        elif step <= self.warmup_steps:
            _set_lr(optimizers, self.peak * step / self.warmup_steps)
        # A schedule may end before the training, if N_epochs was raised.
        _set_lr(optimizers, max(0.0, first.param_groups[0]["lr"]))

    def end_epoch(self, optimizers, epoch, loss):
        """Step a schedule that changes the learning rate once per epoch.

        Arguments
        ---------
        optimizers : list of torch.optim.Optimizer
            All optimizers.
        epoch : int
            The epoch that ends.
        loss : float
            Validation loss.

        Returns
        -------
        float
            The learning rate of the epoch that ends.
        """
        lr = optimizers[0].param_groups[0]["lr"]
        if self.kind == "plateau":
            # The schedule counts a bad epoch once per optimizer: pass one.
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
    """Optimizer steps of each process in an epoch.

    Arguments
    ---------
    loader : torch.utils.data.DataLoader
        Training batches of this process.
    grad_accumulation_factor : int
        Batches per step.

    Returns
    -------
    int
        Steps per epoch.

    Raises
    ------
    ValueError
        If the epoch has too few batches for one step.

    Example
    -------
    >>> steps_per_epoch(range(9), grad_accumulation_factor=2)
    4
    """
    if len(loader) < grad_accumulation_factor:
        raise ValueError(
            f"an epoch has {len(loader)} batches in each process, too few to "
            f"gather {grad_accumulation_factor} for a step: lower batch_size "
            "or grad_accumulation_factor"
        )
    return len(loader) // grad_accumulation_factor


def stretch_schedule(schedule, steps):
    """Adjust a warmup-cooldown schedule to the length of the training.

    Arguments
    ---------
    schedule : object
        Changed in place if it is a ``WarmCoolDecayLRSchedule``: it keeps its
        share of cooldown steps. Other schedules stay unchanged.
    steps : int
        Optimizer steps of the training.

    Example
    -------
    >>> schedule = WarmCoolDecayLRSchedule(1.0, 10, 20, 100)
    >>> stretch_schedule(schedule, steps=200)
    >>> schedule.warmup, schedule.cooldown, schedule.total_steps
    (10, 40, 200)
    """
    if isinstance(schedule, WarmCoolDecayLRSchedule):
        share = schedule.cooldown / schedule.total_steps
        schedule.total_steps = steps
        schedule.cooldown = max(1, round(share * steps))
        schedule.warmup = min(schedule.warmup, steps - schedule.cooldown)
