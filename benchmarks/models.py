"""Build our models and others as modules from [B, T] to [B, T, S]."""

import inspect
from importlib.resources import files

import torch
import torch.nn as nn
import torch.nn.functional as F
from hyperpyyaml import load_hyperpyyaml
from peers import PEERS, WHOLE
from speechbrain.lobes.models import dual_path
from variants import NORMS, VARIANTS, WITHOUT

from speechbrain_flashformer import FlashFormer
from speechbrain_flashformer.nnet.filterbank import fourier_filters
from speechbrain_flashformer.nnet.separator import (
    SIZES,
    Separator,
    build,
    encoder_frame,
)


class Mapping(Separator):
    """A separator whose masknet estimates the encoded sources, not masks."""

    def forward(self, mixture):
        """Separate mixtures [B, T] into [B, T, S]."""
        encoder, masknet, decoder = self.children()
        (B, T), (kernel, stride) = mixture.shape, encoder_frame(encoder)
        more = max(0, kernel - T) or (kernel - T) % stride
        features = masknet(encoder(F.pad(mixture, (0, more))))
        sources = decoder(features.flatten(0, 1))
        sources = sources.view(len(features), B, -1)
        return sources[..., :T].permute(1, 2, 0)


OUTPUTS = {"mask": Separator, "map": Mapping}


def _start_as_fourier(conv, deconv):
    filters = fourier_filters(conv.out_channels, *conv.kernel_size)
    with torch.no_grad():
        conv.weight.copy_(filters)
        deconv.weight.copy_(filters)


def _start_at_random(conv, deconv):
    nn.Conv1d.reset_parameters(conv)
    nn.ConvTranspose1d.reset_parameters(deconv)


STARTS = {"fourier": _start_as_fourier, "random": _start_at_random}


def build_separator(
    name,
    output="mask",
    without=None,
    norm=None,
    start=None,
    variant=None,
    **numbers,
):
    """A model by name, with random weights.

    Arguments
    ---------
    name : str
        One of ``SIZES``, with or without the prefix ``flashformer-``, of
        ``PEERS`` or of ``WHOLE``.
    output : str
        A key of ``OUTPUTS``: with ``map``, the network estimates the encoded
        sources instead of masks.
    without : str, optional
        A part to remove from one of our models, a key of ``WITHOUT``.
    norm : str, optional
        Another input norm for one of our models, a key of ``NORMS``.
    start : str, optional
        Initialization of encoder and decoder, a key of ``STARTS``. The default
        is that of the yaml for our models, and random for others.
    variant : str, optional
        Another architecture of one of our models, a key of ``VARIANTS``.
    **numbers
        Replace numbers in the yaml of one of our models.

    Returns
    -------
    torch.nn.Module
        Mixtures [B, T] -> sources [B, T, S].

    Raises
    ------
    ImportError
        If the extra ``bench`` is missing.
    ValueError
        If there is no such model, or it has no such number.

    Example
    -------
    >>> len(build_separator("tiny", num_layers=2).masknet.layers)
    2
    """
    changes = {"without": without, "norm": norm, "variant": variant}
    asked = {**numbers, **{k: v for k, v in changes.items() if v is not None}}
    for key, choice, known in (
        ("output", output, OUTPUTS),
        ("start", start, {None: None, **STARTS}),
        ("without", without, {None: None, **WITHOUT}),
        ("norm", norm, {None: None, **NORMS}),
        ("variant", variant, {None: None, **VARIANTS}),
    ):
        if choice not in known:
            names = ", ".join(name for name in known if name is not None)
            raise ValueError(f"{key} is one of {names}")
    if name in WHOLE:
        if asked or start or output != "mask":
            raise ValueError(f"{name} is built as it comes: it takes no keys")
        return WHOLE[name]()
    if name.removeprefix("flashformer-") in SIZES:
        model = _ours(name, numbers, **changes)
    elif name not in PEERS:
        names = ", ".join((*SIZES, *PEERS, *WHOLE))
        raise ValueError(f"no model named {name!r}: choose from {names}")
    elif asked:
        raise ValueError(
            f"{name} is built as in its recipe: of keys of the network it "
            "takes start alone"
        )
    else:
        masknet, channels = PEERS[name]()
        encoder = dual_path.Encoder(kernel_size=16, out_channels=channels)
        decoder = dual_path.Decoder(
            channels, 1, kernel_size=16, stride=8, bias=False
        )
        model = Separator(encoder, masknet, decoder)
    if start is not None:
        STARTS[start](model.encoder.conv1d, model.decoder)
    return OUTPUTS[output](*model.children())


def _ours(name, numbers, without, norm, variant):
    size = name.removeprefix("flashformer-")
    model = build(size, **numbers)
    if variant is not None:
        model.masknet = _variant(VARIANTS[variant], size, numbers)
    if without is not None:
        WITHOUT[without](model.masknet)
    if norm is not None:
        model.masknet.norm_in = NORMS[norm](model.masknet.in_channels)
    return model


def _variant(variant, size, numbers):
    """Build a masknet of another class with the numbers of a size."""
    yamls = files("speechbrain_flashformer.hparams")
    with (yamls / f"flashformer-{size}.yaml").open() as file:
        hparams = load_hyperpyyaml(file, numbers)
    takes = inspect.signature(FlashFormer).parameters
    numbers = {key: hparams[key] for key in takes if key in hparams}
    return variant(in_channels=hparams["N_encoder_out"], **numbers)
