"""Changes to mixtures, and ablations of networks, for evaluate_model.py.

Axes: T samples, S speakers.
"""

from functools import partial

import torch
from scipy.signal import butter, sosfilt
from variants import WITHOUT

from speechbrain_flashformer.nnet.separator import encoder_frame
from speechbrain_flashformer.training.metrics import best_order, reorder

BAND = (300, 3400)  # Hz
WINDOWS = (0.1, 0.25, 0.5, 1)  # seconds to each side


# --- changes to mixtures -----------------------------------------------------


def after_silence(seconds, rate, signals):
    """Add silence before all signals."""
    silence = signals.new_zeros(round(seconds * rate), signals.shape[1])
    return torch.cat([silence, signals])


def after_click(rate, signals):
    """Add silence with one loud sample, 50 ms before all signals."""
    signals = after_silence(0.1, rate, signals)
    signals[rate // 20, 0] = 10 * signals[:, 0].abs().max()
    return signals


def through_telephone(rate, signals):
    """Limit all signals to the band of a telephone."""
    band = butter(4, BAND, "bandpass", fs=rate, output="sos")
    heard = sosfilt(band, signals.double().numpy(), axis=0)
    return torch.from_numpy(heard).to(signals)


def with_noise(ratio_db, rate, signals):
    """Add white noise to the mixture only."""
    signals = signals.clone()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(signals), generator=generator)
    noise *= signals[:, 0].square().mean().sqrt() * 10 ** (-ratio_db / 20)
    signals[:, 0] += noise
    return signals


def clipped(rate, signals):
    """Clip the mixture only, at twice its standard deviation."""
    signals = signals.clone()
    most = 2 * signals[:, 0].std()
    signals[:, 0] = signals[:, 0].clamp(-most, most)
    return signals


def invert_one(rate, signals):
    """Invert the first source, also in the mixture."""
    signals = signals.clone()
    signals[:, 0] -= 2 * signals[:, 1]
    signals[:, 1] *= -1
    return signals


def in_one_order(rate, targets, estimates):
    """Return the estimates unchanged."""
    return estimates


def in_order_of_each(seconds, rate, targets, estimates):
    """Reorder each segment of [1, T, S] to its best order of speakers."""
    length = round(seconds * rate)
    parts = []
    for target, estimate in zip(
        targets.split(length, 1), estimates.split(length, 1)
    ):
        parts.append(reorder(estimate, best_order(target, estimate)[1]))
    return torch.cat(parts, 1)


# Name, change to the signals [T, 1 + S] (the mixture first), and change to the
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
    ("inverted", lambda rate, signals: -signals, in_one_order),
    ("one speaker inverted", invert_one, in_one_order),
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


# --- ablation at inference ---------------------------------------------------


def narrow(masknet, tokens):
    """Limit the attention window to this many tokens on each side."""
    for layer in masknet.layers:
        layer.attention.window = tuple(
            tokens if side < 0 else min(side, tokens)
            for side in layer.attention.window
        )


def ablations(model):
    """Return functions that change the masknet, by name; none changes nothing.

    Raises
    ------
    ValueError
        If the model is causal: its windows have only one side.
    """
    masknet = model.mods.masknet
    if masknet.causal:
        raise ValueError("the model is causal: its windows have no two sides")
    _, stride = encoder_frame(model.mods.encoder)
    token_rate = model.hparams.sample_rate / (stride * masknet.token_stride)
    found = {"none": lambda masknet: None}
    for seconds in WINDOWS:
        tokens = round(seconds * token_rate)
        found[f"window of {seconds} s"] = partial(narrow, tokens=tokens)
    return found | {f"without {name}": take for name, take in WITHOUT.items()}
