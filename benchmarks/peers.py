"""The networks that ours is compared with, with random weights.

SpeechBrain's networks have the sizes of its recipes for WSJ0-mix. The exception
is Conv-TasNet: its yaml says ``causal: True``, but here it is not causal,
because the others are not. MossFormer2 and FLA-SepReformer are complete models
of the package modelscope (extra ``bench``).
"""

import tempfile

import torch
import torch.nn as nn
from speechbrain.lobes.models import conv_tasnet, dual_path, resepformer

# --- masknets of SpeechBrain -------------------------------------------------


class RowByRow(nn.Module):
    """Runs a masknet on each row of a batch separately.

    RE-SepFormer's memory treats the segments of all rows as one sequence, so
    the mixtures of a batch would influence each other. Its recipe uses a batch
    size of one.
    """

    def __init__(self, masknet):
        super().__init__()
        self.masknet = masknet

    def forward(self, mix_w):
        """[B, N, L] -> [S, B, N, L]."""
        return torch.cat([self.masknet(row) for row in mix_w.split(1)], 1)


def _conv_tasnet():
    masknet = conv_tasnet.MaskNet(
        N=256,
        B=256,
        H=512,
        P=3,
        X=6,
        R=4,
        C=2,
        norm_type="gLN",
        causal=False,
        mask_nonlinear="relu",
    )
    return masknet, 256


def _sepformer():
    intra, inter = (
        dual_path.SBTransformerBlock(
            num_layers=8,
            d_model=256,
            nhead=8,
            d_ffn=1024,
            dropout=0,
            use_positional_encoding=True,
            norm_before=True,
        )
        for _ in range(2)
    )
    masknet = dual_path.Dual_Path_Model(
        in_channels=256,
        out_channels=256,
        intra_model=intra,
        inter_model=inter,
        num_layers=2,
        norm="ln",
        K=250,
        num_spks=2,
        skip_around_intra=True,
        linear_layer_after_inter_intra=False,
    )
    return masknet, 256


def _dprnn():
    intra, inter = (
        dual_path.SBRNNBlock(
            num_layers=1,
            input_size=256,
            hidden_channels=256,
            dropout=0,
            bidirectional=True,
        )
        for _ in range(2)
    )
    masknet = dual_path.Dual_Path_Model(
        in_channels=256,
        out_channels=256,
        intra_model=intra,
        inter_model=inter,
        num_layers=6,
        norm="ln",
        K=250,
        num_spks=2,
        skip_around_intra=True,
        linear_layer_after_inter_intra=True,
    )
    return masknet, 256


def _re_sepformer():
    intra, memory = (
        resepformer.SBTransformerBlock_wnormandskip(
            num_layers=8,
            d_model=128,
            nhead=8,
            d_ffn=1024,
            dropout=0,
            use_positional_encoding=True,
            norm_before=True,
            use_norm=True,
            use_skip=True,
        )
        for _ in range(2)
    )
    masknet = resepformer.ResourceEfficientSeparator(
        input_dim=128,
        num_spk=2,
        causal=False,
        unit=256,
        segment_size=150,
        layer=2,
        mem_type="av",
        seg_model=intra,
        mem_model=memory,
    )
    return RowByRow(masknet), 128


def _skim():
    segment = resepformer.SegLSTM(
        input_size=128, hidden_size=256, bidirectional=True, norm_type="gln"
    )
    memory = resepformer.MemLSTM(
        hidden_size=256, bidirectional=True, norm_type="gln", mem_type="hc"
    )
    masknet = resepformer.ResourceEfficientSeparator(
        input_dim=128,
        num_spk=2,
        causal=False,
        unit=256,
        segment_size=150,
        layer=4,
        mem_type="hc",
        seg_model=segment,
        mem_model=memory,
    )
    return masknet, 128


# Each function returns a masknet and its number of channels.
PEERS = {
    "conv-tasnet": _conv_tasnet,
    "dprnn": _dprnn,
    "sepformer": _sepformer,
    "re-sepformer": _re_sepformer,
    "skim": _skim,
}


# --- whole models ------------------------------------------------------------


class Stacked(nn.Module):
    """Wraps a model that returns a list of speakers [B, T]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, mixture):
        """Separate mixtures [B, T] into [B, T, S]."""
        return torch.stack(self.model(mixture), -1)


def _mossformer2():
    from modelscope.models.audio.separation.m2.mossformer import MossFormer2

    # It requires a folder of weights, but does not read it.
    return MossFormer2(tempfile.gettempdir(), num_spks=2)


def _fla_sepreformer():
    """FLA-SepReformer at the size of SepReformer-B.

    Its own numbers are published only with its weights.
    """
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
        num_spks=2,
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
            "spk_split_stage": {"in_channels": width, "num_spks": 2},
            "simple_fusion": {"out_channels": width},
            "dec_stage": {
                **stage,
                "num_spks": 2,
                "spk_attention": heads,
            },
        },
        module_output_layer={
            "in_channels": encoder,
            "out_channels": width,
            "num_spks": 2,
        },
        module_audio_dec={
            "in_channels": encoder,
            "out_channels": 1,
            "kernel_size": kernel,
            "stride": stride,
            "bias": False,
        },
        # No heads for auxiliary training losses; they are not used here.
        aux_part=False,
    )
    return Stacked(model)


WHOLE = {"mossformer2": _mossformer2, "fla-sepreformer": _fla_sepreformer}
