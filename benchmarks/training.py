"""The training loop of learning.py: options of a MODEL, steps, scores."""

import ast
import math
import statistics
import sys
import time

import torch
import torch.nn as nn
from speechbrain.dataio.batch import PaddedBatch

from speechbrain_flashformer.nnet.separator import SIZES
from speechbrain_flashformer.training.losses import (
    pit_mixed_loss,
    pit_si_snr_loss,
    pit_snr_loss,
)
from speechbrain_flashformer.training.metrics import best_order, si_snr
from speechbrain_flashformer.training.optim import Muon, matrix_groups

RATE = 8000
# Length of test mixtures, and of the audio for RTF and MACs.
TEST_SECONDS = 4
SPEEDS = (95, 105)
MAX_GRAD_NORM = 5
PRECISIONS = ("fp32", "bf16")
OPTIMIZERS = ("muon", "muon-inner", "adamw")
# First and last weight of the masknet: muon-inner uses AdamW for them.
ENDS = ("project.weight", "masks.weight")
LOSSES = {
    "si-snr": pit_si_snr_loss,
    "snr": pit_snr_loss,
    "mixed": pit_mixed_loss,
}
# Keys that may grow from one number to another, and the first part of the
# training in which they do.
GROW = ("batch", "crop", "levels")
GROWTH = 0.7
# Key -> type, least value, allowed number of values, and description.
LIMITS = {
    "lr": (int | float, sys.float_info.min, (1,), "a number above 0"),
    "batch": (int, 1, (1, 2), "a whole number above 0, or (FIRST,LAST)"),
    "crop": (int, 1, (1, 2), "a whole number above 0, or (FIRST,LAST)"),
    "levels": (int | float, 0, (1, 2), "a number from 0 on, or (FIRST,LAST)"),
    "speeds": (int, 1, (2,), "(LEAST,GREATEST), whole numbers above 0"),
}
# Warm-up steps of the learning rate, and the share of the training over which
# it falls to 0.
WARMUP, COOLDOWN = 50, 0.75
# Weight of the mean loss of all stages except the last.
STAGE_WEIGHT = 0.4


def parse(entry):
    """Split MODEL into its name, its training options and its numbers."""
    name, *pairs = entry.split(":")
    numbers = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{entry}: {pair!r} is not KEY=VALUE")
        try:
            numbers[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            numbers[key] = value
    ours = name.removeprefix("flashformer-") in SIZES
    training = {
        "optimizer": "muon" if ours else "adamw",
        "lr": 0.002 if ours else 0.001,
        "batch": 8,
        "crop": RATE,
        "levels": 1,
        "speeds": SPEEDS,
        "precision": "fp32",
        "flip": 0.0,
        "loss": "si-snr",
        "absent": 0.0,
    }
    training |= {k: numbers.pop(k) for k in list(numbers) if k in training}
    if training["optimizer"] not in OPTIMIZERS:
        raise ValueError(f"{entry}: optimizer is {' or '.join(OPTIMIZERS)}")
    if training["loss"] not in LOSSES:
        raise ValueError(f"{entry}: loss is {' or '.join(LOSSES)}")
    if not 0 <= training["absent"] <= 1:
        raise ValueError(f"{entry}: absent is a share, from 0 to 1")
    if training["absent"] and training["loss"] == "si-snr":
        raise ValueError(f"{entry}: absent needs loss=snr or mixed")
    if training["absent"] and training["levels"] != 1:
        raise ValueError(f"{entry}: absent leaves no levels to change")
    if training["precision"] not in PRECISIONS:
        raise ValueError(f"{entry}: precision is fp32 or bf16")
    for key, (kind, least, counts, says) in LIMITS.items():
        given = training[key]
        given = given if isinstance(given, tuple) else (given,)
        if len(given) not in counts or not all(
            isinstance(x, kind) and least <= x < math.inf for x in given
        ):
            raise ValueError(f"{entry}: {key} is {says}")
    if training["speeds"][0] > training["speeds"][1]:
        raise ValueError(f"{entry}: speeds is (LEAST,GREATEST)")
    if training["flip"] not in (0, 0.5, 1):
        raise ValueError(f"{entry}: flip is 0, 0.5 or 1")
    return name, training, numbers


def make_optimizers(model, kind, lr):
    """Return AdamW, or the recipe's pair: Muon for matrices of the masknet."""
    if kind == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr)]
    masknet = model.masknet
    matrices = matrix_groups(masknet)
    if kind == "muon-inner":
        ends = {id(masknet.get_parameter(name)) for name in ENDS}
        for group in matrices:
            group["params"] = [p for p in group["params"] if id(p) not in ends]
    taken = {id(p) for group in matrices for p in group["params"]}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [
        Muon(
            matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr, weight_decay=0),
    ]


def both_ends(value):
    """Return a key of ``GROW`` at the start and at the end of a training."""
    return value if isinstance(value, tuple) else (value, value)


def keep_levels(item, share):
    """Keep a share of the difference in dB between the levels of two speakers.

    Changes the second speaker and the mixture. Levels are measured where the
    speaker is not silent, as in ``DynamicMixtures``.
    """
    if share != 1:
        first, second = item["s1_sig"], item["s2_sig"]
        power = [x[x != 0].square().mean() for x in (first, second)]
        item["s2_sig"] = second * (power[0] / power[1]) ** ((1 - share) / 2)
        item["mix_sig"] = first + item["s2_sig"]
    return item


def clock():
    """Return CPU time with one thread, wall-clock time with more."""
    one = torch.get_num_threads() == 1
    return time.process_time() if one else time.perf_counter()


def train(model, mixtures, training, arguments, measure):
    """Train; ``measure`` is called with (steps, examples, minutes, dB)."""
    peak, loss_of = training["lr"], LOSSES[training["loss"]]
    half = training["precision"] == "bf16"
    optimizers = make_optimizers(model, training["optimizer"], peak)
    steps, heard, seconds, done, points, scores = 0, 0, 0.0, 0.0, 0, []
    ends = {key: both_ends(training[key]) for key in GROW}
    while done < 1:
        begin = clock()
        grown = min(1, done / GROWTH)
        now = {key: a + grown * (b - a) for key, (a, b) in ends.items()}
        mixtures.samples = round(now["crop"])
        numbers = range(heard, heard + round(now["batch"]))
        items = [keep_levels(mixtures[n], now["levels"]) for n in numbers]
        batch = PaddedBatch(items)
        mixture, lengths = batch.mix_sig
        targets = torch.stack([batch.s1_sig.data, batch.s2_sig.data], 2)
        rate = peak * min(1, (steps + 1) / WARMUP, (1 - done) / COOLDOWN)
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            estimates = model(mixture).float()
        # Stages are in reverse order: the first is that of the last layer.
        losses = [
            loss_of(targets, stage, lengths).mean()
            for stage in estimates.split(targets.shape[2], 2)
        ]
        loss = losses[0]
        if earlier := losses[1:]:
            loss = loss + STAGE_WEIGHT * sum(earlier) / len(earlier)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        if norm.isfinite():
            for optimizer in optimizers:
                optimizer.step()
        scores.append(-losses[0].item())
        seconds += clock() - begin
        steps, heard = steps + 1, numbers.stop
        if arguments.examples:
            done = heard / arguments.examples
        else:
            done = seconds / 60 / arguments.minutes
        # Rounding: 30 / 44 * 22 is slightly below 15.
        reached = int(done * arguments.points + 1e-9)
        if reached > points:
            points = reached
            mean = statistics.mean(scores)
            measure(steps, heard, round(seconds / 60, 2), mean)
            scores.clear()


def score(model, mixtures):
    """Return the mean SI-SNRi over mixtures [T] with their sources [T, S]."""
    gains = []
    for mixture, sources in mixtures:
        targets = sources[None]
        with torch.no_grad():
            estimates = model(mixture[None])
        baseline = si_snr(targets, mixture[None, :, None].expand_as(targets))
        after, _ = best_order(targets, estimates)
        gains.append((after - baseline).mean().item())
    return round(statistics.mean(gains), 2)


def real_time_factor(model):
    """Return the median time to separate TEST_SECONDS, over TEST_SECONDS."""
    mixture, times = torch.randn(1, TEST_SECONDS * RATE), []
    with torch.no_grad():
        for _ in range(6):
            begin = clock()
            model(mixture)
            times.append(clock() - begin)
    return round(statistics.median(times[1:]) / TEST_SECONDS, 4)
