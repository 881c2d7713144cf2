"""The models that benchmarks compare: ours by yaml, the peers by their recipe.

The peers are SpeechBrain's, at the sizes of its recipes for WSJ0-mix, but that
Conv-TasNet hears the future too (its yaml says ``causal: True``, which would
be no fair match for networks that do).
"""

import inspect
from pathlib import Path

import torch
import torch.nn as nn
from hyperpyyaml import load_hyperpyyaml
from speechbrain.lobes.models import conv_tasnet, dual_path, resepformer
from variants import VARIANTS

from speechbrain_flashformer import FlashFormer
from speechbrain_flashformer.nnet.filterbank import fourier_filters
from speechbrain_flashformer.nnet.norm import CumulativeNorm, GlobalNorm

HPARAMS = Path(__file__).resolve().parent.parent / "hparams"
OURS = tuple(
    path.stem.removeprefix("flashformer-")
    for path in sorted(HPARAMS.glob("flashformer-*.yaml"))
)


def build(name, without=None, norm=None, start=None, variant=None, **numbers):
    """Encoder, masknet and decoder of a model.

    Arguments
    ---------
    name : str
        One of ``OURS``, with or without ``flashformer-`` before it, or of
        ``PEERS``.
    without : str, optional
        A part of one of ours to leave out, a key of ``WITHOUT``.
    norm : str, optional
        How one of ours normalises its input, a key of ``NORMS``.
    start : str, optional
        How encoder and decoder begin, a key of ``STARTS``; else ours as in
        its yaml and a peer at random.
    variant : str, optional
        Another shape of one of ours, a key of ``VARIANTS``.
    **numbers
        Take the place of those in the yaml of one of ours.

    Raises
    ------
    ValueError
        When there is no such model, or it has no such number.

    Example
    -------
    >>> encoder, masknet, decoder = build("tiny", num_layers=2)
    >>> len(masknet.layers)
    2
    """
    size = name.removeprefix("flashformer-")
    if size in OURS:
        try:
            with open(HPARAMS / f"flashformer-{size}.yaml") as file:
                hparams = load_hyperpyyaml(
                    file, numbers, overrides_must_match=True
                )
        except KeyError as error:
            raise ValueError(f"{name}: {error.args[0]}") from error
        model = [hparams[part] for part in ("Encoder", "MaskNet", "Decoder")]
        if variant is not None:
            if variant not in VARIANTS:
                raise ValueError(f"variant is one of {', '.join(VARIANTS)}")
            takes = inspect.signature(FlashFormer).parameters
            numbers = {key: hparams[key] for key in takes if key in hparams}
            numbers["in_channels"] = hparams["N_encoder_out"]
            model[1] = VARIANTS[variant](**numbers)
        _change(model[1], without, norm)
    elif name in PEERS:
        if numbers or without or norm or variant:
            raise ValueError(
                f"{name} is built as in its recipe: of keys of the network it "
                "takes start alone"
            )
        masknet, channels = PEERS[name]()
        encoder = dual_path.Encoder(kernel_size=16, out_channels=channels)
        decoder = dual_path.Decoder(
            channels, 1, kernel_size=16, stride=8, bias=False
        )
        model = [encoder, masknet, decoder]
    else:
        raise ValueError(
            f"no model named {name!r}: choose from {', '.join((*OURS, *PEERS))}"
        )
    if start is not None:
        if start not in STARTS:
            raise ValueError(f"start is one of {', '.join(STARTS)}")
        STARTS[start](model[0].conv1d, model[2])
    return model


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


PEERS = {
    "conv-tasnet": _conv_tasnet,
    "dprnn": _dprnn,
    "sepformer": _sepformer,
    "re-sepformer": _re_sepformer,
    "skim": _skim,
}


def _start_as_fourier(conv, deconv):
    filters = fourier_filters(conv.out_channels, *conv.kernel_size)
    with torch.no_grad():
        conv.weight.copy_(filters)
        deconv.weight.copy_(filters)


def _start_at_random(conv, deconv):
    nn.Conv1d.reset_parameters(conv)
    nn.ConvTranspose1d.reset_parameters(deconv)


STARTS = {"fourier": _start_as_fourier, "random": _start_at_random}


class RowByRow(nn.Module):
    """Runs a masknet on each row of a batch alone.

    RE-SepFormer's memory takes the segments of all rows for one sequence, so
    that mixtures of a batch hear each other; its recipe has batches of one.
    """

    def __init__(self, masknet):
        super().__init__()
        self.masknet = masknet

    def forward(self, mix_w):
        """[B, N, L] -> [S, B, N, L]."""
        return torch.cat([self.masknet(row) for row in mix_w.split(1)], 1)


class Left(nn.Module):
    """In the place of a block: what came in goes out."""

    def forward(self, x, *_):
        """Return x."""
        return x


class NoUpdate(nn.Module):
    """In the place of attention: nothing is added to x."""

    def forward(self, x, *_):
        """Return zeros."""
        return torch.zeros_like(x)


class FrameNorm(nn.LayerNorm):
    """In the place of the global norm: each frame to one level."""

    def forward(self, x, *_):
        """Normalise x [B, L, N]."""
        return super().forward(x)


class UniformNorm(GlobalNorm):
    """In the place of the global norm: gLN, in which all frames count alike."""

    def forward(self, x, *_):
        """Normalise x [B, L, N]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        given = wide.mean((1, 2)), wide.square().mean((1, 2))
        return super().forward(x, statistics=given)


class EnergyNorm(GlobalNorm):
    """In the place of the global norm: frames count by their energy."""

    def forward(self, x, *_):
        """Normalise x [B, L, N]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        energy = wide.square().mean(2)
        share = energy / energy.sum(1, keepdim=True).clamp(min=self.eps**2)
        mean = (share * wide.mean(2)).sum(1)
        return super().forward(x, statistics=(mean, (share * energy).sum(1)))


class PastNorm(CumulativeNorm):
    """In the place of the global norm: that over all frames so far."""

    def __init__(self, channels):
        # 20 s of tiny's frames, more than the bench ever hears at once.
        super().__init__(channels, span=10000)

    def forward(self, x, *_):
        """Normalise x [B, L, N]."""
        return super().forward(x)


NORMS = {
    "frame": FrameNorm,
    "uniform": UniformNorm,
    "energy": EnergyNorm,
    "cumulative": PastNorm,
}


def _no_attention(masknet):
    for layer in masknet.layers:
        layer.attention = NoUpdate()
        layer.norm_attention = layer.scale_attention = nn.Identity()


def _no_token_fsmn(masknet):
    for layer in masknet.layers:
        layer.fsmn = Left()


def _no_token_memory(masknet):
    for layer in masknet.layers:
        layer.fsmn.memory = nn.ModuleList()


def _no_frame_fsmn(masknet):
    for blocks in (masknet.down, masknet.up):
        for i in range(len(blocks)):
            blocks[i] = Left()


def _no_frame_memory(masknet):
    for block in (*masknet.down, *masknet.up):
        block.memory = nn.ModuleList()


# What can be left out: a gated FSMN block as a whole, or only its memory
# (gate and projections stay); at the token rate or at all rates above it.
WITHOUT = {
    "attention": _no_attention,
    "token-fsmn": _no_token_fsmn,
    "token-memory": _no_token_memory,
    "frame-fsmn": _no_frame_fsmn,
    "frame-memory": _no_frame_memory,
}


def _change(masknet, without, norm):
    if without is not None:
        if without not in WITHOUT:
            raise ValueError(f"without is one of {', '.join(WITHOUT)}")
        WITHOUT[without](masknet)
    if norm is not None:
        if norm not in NORMS:
            raise ValueError(f"norm is one of {', '.join(NORMS)}")
        masknet.norm_in = NORMS[norm](masknet.in_channels)
