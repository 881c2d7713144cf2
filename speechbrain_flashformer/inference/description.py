"""Description of a model: size, cost, context and attention backend."""

import torch

from speechbrain_flashformer.nnet.attention import attention_report
from speechbrain_flashformer.nnet.macs import count_macs
from speechbrain_flashformer.nnet.separator import (
    MODULES,
    encoder_frame,
    separate,
    unwrapped,
)


def describe(model):
    """Describe a model and how it runs on this machine.

    Arguments
    ---------
    model : FlashFormerSeparation or RecordingSeparator
        A loaded model. It separates ten seconds of noise.

    Returns
    -------
    dict
        Values with their units by label: ``masknet``, ``speakers``,
        ``sampling rate``, ``parameters``, ``compute`` and, where they apply,
        ``context`` (receptive field), ``streaming``, ``attention`` (the
        backend) and ``not NAME`` (why backend NAME is not used).

    Example
    -------
    >>> from speechbrain_flashformer.inference.folders import built_in_model
    >>> from speechbrain_flashformer.inference.models import RecordingSeparator
    >>> describe(RecordingSeparator(built_in_model()))["sampling rate"]
    '8000 Hz'
    """
    rate, spks = model.hparams.sample_rate, model.hparams.num_spks
    encoder, masknet, decoder = (
        unwrapped(model.mods[name]) for name in MODULES
    )
    seconds = 10
    mixture = torch.randn(
        1, seconds * rate, device=next(encoder.parameters()).device
    )
    with attention_report() as ran:
        macs = count_macs(separate, mixture, encoder, masknet, decoder)
    parameters = sum(p.numel() for p in model.mods.parameters())
    described = {
        "masknet": type(masknet).__name__,
        "speakers": spks,
        "sampling rate": f"{rate} Hz",
        "parameters": f"{parameters / 1e6:.2f} million",
        "compute": f"{macs / seconds / 1e9:.2f} GMAC per second of audio",
    }
    if hasattr(masknet, "receptive_field"):
        stride = encoder_frame(encoder)[1]
        field = [
            "all" if side < 0 else f"{side * stride / rate:.1f} s"
            for side in masknet.receptive_field
        ]
        described["context"] = f"{field[0]} before, {field[1]} after"
        why = "its window is unbounded"
        if not masknet.causal:
            why = "the network is not causal"
        described["streaming"] = f"no, {why}"
        if masknet.can_stream:
            latency = 1000 * model.make_stream().latency / rate
            described["streaming"] = f"with {latency:g} ms of latency"
    if ran:
        described["attention"] = ran[0]["backend"]
        for name, why in ran[0]["not_used"].items():
            described[f"  not {name}"] = why
    return described
