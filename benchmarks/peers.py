"""Whole models as one module each, [B, T] to [B, T, S]: ours and the peers.

SpeechBrain's are in ``models.py``; MossFormer2 and FLA-SepReformer come from
the package modelscope (extra ``bench``), without weights.
"""

import tempfile

import torch
import torch.nn as nn
import torch.nn.functional as F
from models import build

from speechbrain_flashformer.nnet.separator import encoder_frame, separate

SPEAKERS = 2
WHOLE = ("mossformer2", "fla-sepreformer")


class Separator(nn.Module):
    """Encoder, masknet and decoder as one module."""

    def __init__(self, encoder, masknet, decoder):
        super().__init__()
        self.parts = nn.ModuleList([encoder, masknet, decoder])

    def forward(self, mixture):
        """Separate mixtures [B, T] into [B, T, S]."""
        return separate(mixture, *self.parts)


class Mapping(Separator):
    """The sources are what the masknet gives, not masks of the mixture."""

    def forward(self, mixture):
        """Separate mixtures [B, T] into [B, T, S]."""
        encoder, masknet, decoder = self.parts
        (B, T), (kernel, stride) = mixture.shape, encoder_frame(encoder)
        more = max(0, kernel - T) or (kernel - T) % stride
        features = masknet(encoder(F.pad(mixture, (0, more))))
        sources = decoder(features.flatten(0, 1)).view(SPEAKERS, B, -1)
        return sources[..., :T].permute(1, 2, 0)


class Stacked(nn.Module):
    """A model that gives a list of speakers [B, T]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, mixture):
        """Separate mixtures [B, T] into [B, T, S]."""
        return torch.stack(self.model(mixture), -1)


OUTPUTS = {"mask": Separator, "map": Mapping}


def build_separator(name, output="mask", **numbers):
    """A model by name, with random weights; the rest is for ``models.build``.

    With output ``map`` the network gives the sources, not masks.

    Raises
    ------
    ImportError
        When the extra ``bench`` is missing.
    ValueError
        When there is no such model, or it has no such number.
    """
    if name in WHOLE and (numbers or output != "mask"):
        raise ValueError(f"{name} is built as it comes: it takes no keys")
    if name == "mossformer2":
        from modelscope.models.audio.separation.m2.mossformer import (
            MossFormer2,
        )

        # It wants a folder of weights, and reads none of it.
        return MossFormer2(tempfile.gettempdir(), num_spks=SPEAKERS)
    if name == "fla-sepreformer":
        return _fla_sepreformer()
    if output not in OUTPUTS:
        raise ValueError(f"output is one of {', '.join(OUTPUTS)}")
    return OUTPUTS[output](*build(name, **numbers))


def _fla_sepreformer():
    """At the size of SepReformer-B; its own numbers are with its weights."""
    from modelscope.models.audio.separation.tsepreformer import (
        sepreformer_layers,
    )

    encoder, width, kernel, stride = 256, 128, 16, 4
    dropout = {"dropout_rate": 0.05}
    heads = {"in_channels": width, "num_mha_heads": 8, **dropout}
    stage = {
        "global_blocks": heads,
        "local_blocks": {"in_channels": width, "kernel_size": 65, **dropout},
        "addition_conf": {
            "ega_addition_conf": {"linear_attn_type": "FocusedLinearAttention"}
        },
    }
    model = sepreformer_layers.TSepReformerSeparator(
        num_stages=4,
        num_spks=SPEAKERS,
        module_audio_enc={
            "in_channels": 1,
            "out_channels": encoder,
            "kernel_size": kernel,
            "stride": stride,
            "groups": 1,
            "bias": False,
        },
        module_feature_projector={
            "num_channels": encoder,
            "in_channels": encoder,
            "out_channels": width,
            "kernel_size": 1,
            "bias": False,
        },
        module_separator={
            "num_stages": 4,
            "relative_positional_encoding": {
                "in_channels": width,
                "num_heads": 8,
                "maxlen": 2000,
            },
            "enc_stage": {
                **stage,
                "down_conv_layer": {
                    "in_channels": width,
                    "samp_kernel_size": 5,
                },
            },
            "spk_split_stage": {"in_channels": width, "num_spks": SPEAKERS},
            "simple_fusion": {"out_channels": width},
            "dec_stage": {
                **stage,
                "num_spks": SPEAKERS,
                "spk_attention": heads,
            },
        },
        module_output_layer={
            "in_channels": encoder,
            "out_channels": width,
            "num_spks": SPEAKERS,
        },
        module_audio_dec={
            "in_channels": encoder,
            "out_channels": 1,
            "kernel_size": kernel,
            "stride": stride,
            "bias": False,
        },
        # The heads of its training losses, which are not run.
        aux_part=False,
    )
    return Stacked(model)
