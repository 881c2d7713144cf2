#!/usr/bin/env python3
"""What a trained model makes of mixtures that are heard otherwise.

> python benchmarks/robustness.py MODEL NAME=FOLDER [NAME=FOLDER ...]

MODEL and sets are as for evaluate_model.py, of each set the first 50 mixtures.
Each is separated as it is; after digital silence; after a click of ten times
its peak, 50 ms before it; through a telephone's band, 300 to 3400 Hz; with
white noise, 20 and 10 dB below the mixture; clipped at twice its deviation;
upside down; with one of the speakers upside down. The last rows leave the
mixture as it is and choose the order of the speakers anew for each second, or
quarter of one, by the sources: what is lost by confusing who is who, and not by
failing to separate them.
Writes results/robustness.csv, a row for each: mean SI-SNRi in dB, of the time
that the mixture takes.
"""

import itertools
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from evaluate_model import command, find_sets, load_mixtures
from records import write_csv
from scipy.signal import butter, sosfilt

from speechbrain_flashformer.inference import FlashFormerSeparation
from speechbrain_flashformer.training.metrics import best_order, reorder, si_snr

OUT = Path(__file__).parent / "results" / "robustness.csv"
MIXTURES = 50
BAND = (300, 3400)  # Hz


def after_silence(seconds, rate, signals):
    """Let all be silent at first."""
    silence = signals.new_zeros(round(seconds * rate), signals.shape[1])
    return torch.cat([silence, signals])


def after_click(rate, signals):
    """Let one loud sample be heard in the silence 50 ms before the rest."""
    signals = after_silence(0.1, rate, signals)
    signals[rate // 20, 0] = 10 * signals[:, 0].abs().max()
    return signals


def through_telephone(rate, signals):
    """Keep a band of all signals."""
    band = butter(4, BAND, "bandpass", fs=rate, output="sos")
    heard = sosfilt(band, signals.double().numpy(), axis=0)
    return torch.from_numpy(heard).to(signals)


def with_noise(ratio_db, rate, signals):
    """Add noise to the mixture alone."""
    signals = signals.clone()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(signals), generator=generator)
    noise *= signals[:, 0].square().mean().sqrt() * 10 ** (-ratio_db / 20)
    signals[:, 0] += noise
    return signals


def clipped(rate, signals):
    """Clip the mixture alone."""
    signals = signals.clone()
    most = 2 * signals[:, 0].std()
    signals[:, 0] = signals[:, 0].clamp(-most, most)
    return signals


def one_upside_down(rate, signals):
    """Turn the first source upside down, alone and in the mixture."""
    signals = signals.clone()
    signals[:, 0] -= 2 * signals[:, 1]
    signals[:, 1] *= -1
    return signals


def in_one_order(rate, targets, estimates):
    """Leave the estimates as they are."""
    return estimates


def in_order_of_each(seconds, rate, targets, estimates):
    """Give each stretch of [1, T, S] its best order of speakers."""
    length = round(seconds * rate)
    parts = []
    for target, estimate in zip(
        targets.split(length, 1), estimates.split(length, 1)
    ):
        parts.append(reorder(estimate, best_order(target, estimate)[1]))
    return torch.cat(parts, 1)


# Name, what is done to the signals [T, 1 + S] (the mixture first), and to the
# estimates.
CONDITIONS = (
    ("as is", lambda rate, signals: signals, in_one_order),
    ("after 3 s of silence", partial(after_silence, 3), in_one_order),
    ("after 10 s of silence", partial(after_silence, 10), in_one_order),
    ("after a click", after_click, in_one_order),
    ("through a telephone", through_telephone, in_one_order),
    ("noise at 20 dB", partial(with_noise, 20), in_one_order),
    ("noise at 10 dB", partial(with_noise, 10), in_one_order),
    ("clipped", clipped, in_one_order),
    ("upside down", lambda rate, signals: -signals, in_one_order),
    ("one speaker upside down", one_upside_down, in_one_order),
    (
        "as is, best order of each second",
        lambda rate, signals: signals,
        partial(in_order_of_each, 1),
    ),
    (
        "as is, best order of each quarter",
        lambda rate, signals: signals,
        partial(in_order_of_each, 0.25),
    ),
)


def gain(model, signals, change, arrange):
    """SI-SNRi of one mixture, in dB; signals [T, 1 + S]."""
    rate, length = model.hparams.sample_rate, len(signals)
    signals = change(rate, signals)
    estimates = model.separate_batch(signals[None, :, 0])[:, -length:]
    mixture, targets = signals[None, -length:].tensor_split((1,), 2)
    estimates = arrange(rate, targets, estimates)
    before = si_snr(targets, mixture.expand_as(targets))
    return (best_order(targets, estimates)[0] - before).mean().item()


def main(source, sets):
    """Score each condition on each set, write the rows."""
    model = FlashFormerSeparation.from_hparams(source)
    rows = [{"condition": name} for name, _, _ in CONDITIONS]
    with tempfile.TemporaryDirectory() as scratch:
        for title, folder in find_sets(sets, Path(scratch)):
            mixtures = [
                torch.stack(parts, 1)
                for parts in itertools.islice(
                    load_mixtures(model, folder), MIXTURES
                )
            ]
            for row, (_, change, arrange) in zip(rows, CONDITIONS):
                gains = [gain(model, x, change, arrange) for x in mixtures]
                row[title] = round(statistics.mean(gains), 2)
                print(title, row["condition"], row[title], flush=True)
    write_csv(OUT, rows)


if __name__ == "__main__":
    command(__doc__, main)
