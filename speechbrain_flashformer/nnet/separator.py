"""Encode, mask, decode: the forward pass of training and inference.

Axes: B batch, T samples, N encoder channels, L frames, S speakers.
"""

import inspect
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from speechbrain_flashformer.nnet.flashformer import FlashFormer
from speechbrain_flashformer.nnet.norm import moments, weighted_sums
from speechbrain_flashformer.nnet.pieces import pieces
from speechbrain_flashformer.nnet.positions import length_mask

# The modules of a model, as SpeechBrain's recipes and interfaces name them.
MODULES = ("encoder", "masknet", "decoder")

# The sizes of ``build``; each has a yaml in hparams/.
SIZES = ("tiny", "base", "large", "streaming")


class Separator(nn.Module):
    """Encoder, masknet and decoder as one module, [B, T] -> [B, T, S].

    Arguments
    ---------
    encoder, masknet, decoder : torch.nn.Module
        As in ``separate``.

    Example
    -------
    >>> Separator(*build("tiny").children())(torch.randn(1, 800)).shape
    torch.Size([1, 800, 2])
    """

    def __init__(self, encoder, masknet, decoder):
        super().__init__()
        self.encoder, self.masknet = encoder, masknet
        self.decoder = decoder

    def forward(self, mixture, lengths=None):
        """Separate mixtures.

        Arguments
        ---------
        mixture : torch.Tensor
            [B, T], T >= 1.
        lengths : torch.Tensor, optional
            Valid part of each row relative to T, [B]; by default 1.

        Returns
        -------
        torch.Tensor
            Estimated sources, [B, T, S].
        """
        return separate(mixture, *self.children(), lengths)


def build(size, **numbers):
    """Build a model with random weights.

    Arguments
    ---------
    size : str or Path
        One of ``SIZES``, or the path of a yaml file like those in ``hparams/``.
    **numbers
        Replace values of the yaml, for example ``num_spks=3``.

    Returns
    -------
    Separator
        Mixtures [B, T] -> sources [B, T, S].

    Raises
    ------
    ValueError
        If the size does not exist, or its yaml has no such key.

    Example
    -------
    >>> build("tiny", num_spks=3, num_layers=1)(torch.randn(1, 800)).shape
    torch.Size([1, 800, 3])
    """
    from hyperpyyaml import load_hyperpyyaml

    path = Path(size)
    if size in SIZES:
        path = files("speechbrain_flashformer.hparams")
        path = path / f"flashformer-{size}.yaml"
    elif not path.is_file():
        raise ValueError(
            f"there is no size {size!r}: give one of {', '.join(SIZES)}, or a "
            "yaml"
        )
    with path.open(encoding="utf-8") as file:
        try:
            hparams = load_hyperpyyaml(file, numbers)
            parts = (hparams[p] for p in ("Encoder", "MaskNet", "Decoder"))
            return Separator(*parts)
        except KeyError as error:
            raise ValueError(f"{path}: {error.args[0]}") from error


def separate(mixture, encoder, masknet, decoder, lengths=None, statistics=None):
    """Separate mixtures of equal or padded length.

    The output has every sample of the input: the mixture is padded to a whole
    number of frames, because the encoder would drop an incomplete one.

    Arguments
    ---------
    mixture : torch.Tensor
        [B, T], T >= 1.
    encoder : torch.nn.Module
        [B, T] -> [B, N, L], a SpeechBrain ``Encoder``.
    masknet : torch.nn.Module
        [B, N, L] -> [S, B, N, L], a ``FlashFormer`` or any other masknet. It
        gets ``lengths`` (valid frames, [B]) and ``statistics`` if its forward
        has arguments of these names.
    decoder : torch.nn.Module
        [B, N, L] -> [B, T], a SpeechBrain ``Decoder``.
    lengths : torch.Tensor, optional
        Valid part of each row relative to T, [B]. Outputs beyond it are 0. The
        valid part equals that without padding if the masknet takes lengths.
    statistics : tuple of torch.Tensor, optional
        Mean and mean square [B] of the encoder output over the recordings that
        the rows are excerpts of, as from ``encoder_statistics``.

    Returns
    -------
    torch.Tensor
        Estimated sources, [B, T, S].

    Raises
    ------
    ValueError
        If a causal ``FlashFormer`` gets statistics.

    Example
    -------
    >>> from speechbrain.lobes.models.dual_path import Decoder, Encoder
    >>> from speechbrain_flashformer import FlashFormer
    >>> encoder = Encoder(kernel_size=16, out_channels=32)
    >>> decoder = Decoder(32, 1, kernel_size=16, stride=8, bias=False)
    >>> masknet = FlashFormer(in_channels=32, d_model=48, num_layers=1)
    >>> separate(torch.randn(3, 999), encoder, masknet, decoder).shape
    torch.Size([3, 999, 2])
    """
    B, T = mixture.shape
    kernel, stride = encoder_frame(encoder)
    # The number of frames that cover all samples, at least one.
    frames = 1 + (max(T - kernel, 0) + stride - 1) // stride
    padded, options = kernel + (frames - 1) * stride, {}
    if lengths is not None:
        samples = (lengths * T).round()
        mask = length_mask(samples, T, mixture.device)
        mixture = mixture * mask.squeeze(2)
        # From here on, lengths are in frames.
        lengths = (samples - kernel).clamp(min=0) / stride
        lengths = 1 + lengths.ceil().long()
        if takes(masknet, "lengths"):
            options["lengths"] = lengths
    if statistics is not None and takes(masknet, "statistics"):
        options["statistics"] = statistics
    mix_w = encoder(F.pad(mixture, (0, padded - T)))
    if lengths is not None:
        # A frame after the last valid one may still overlap the row's end.
        mix_w = mix_w * length_mask(lengths, frames, mix_w.device).mT

    def _decode(masks, span):
        # One call for all speakers; [S, B, N, L] -> [S B, N, L].
        sources = decoder((mix_w[..., span] * masks).flatten(0, 1))
        return sources.view(len(masks), B, -1)

    def _add(masks, span):
        nonlocal sources
        # A compiled network returns all masks in one piece.
        part, begin = _decode(masks, span), (span.start or 0) * stride
        if sources is None:
            sources = part.new_zeros(len(masks), B, padded)
        sources[..., begin : begin + part.shape[2]] += part

    if len(pieces(frames)) > 1 and _can_decode_pieces(masknet, decoder):
        sources = None
        masknet(mix_w, decode=_add, **options)
    else:
        sources = _decode(masknet(mix_w, **options), slice(None))
    sources = sources[..., :T].permute(1, 2, 0)
    return sources if lengths is None else sources * mask


def _can_decode_pieces(masknet, decoder):
    """Whether masks can be decoded piece by piece.

    A wrapper of the masknet may split the rows over devices, and a forward hook
    needs the masks as output. The bias of a decoder would be added twice where
    two pieces overlap.
    """
    plain = isinstance(masknet, FlashFormer) and not masknet._forward_hooks
    return plain and getattr(unwrapped(decoder), "bias", None) is None


def encoder_statistics(blocks, encoder):
    """Compute statistics of whole recordings for the input norm.

    Arguments
    ---------
    blocks : iterable of torch.Tensor
        Successive blocks of C recordings, each [C, n].
    encoder : torch.nn.Module
        As in ``separate``.

    Returns
    -------
    tuple of torch.Tensor
        Mean and mean square of the encoder output, [C] each, weighted by
        amplitude as in ``norm.weighted_sums``.

    Example
    -------
    >>> from speechbrain.lobes.models.dual_path import Encoder
    >>> encoder = Encoder(kernel_size=16, out_channels=32)
    >>> mixture = torch.randn(1, 1600)
    >>> mean, _ = encoder_statistics(mixture.split(100, 1), encoder)
    >>> silence = torch.zeros(1, 8000)
    >>> among, _ = encoder_statistics([mixture, silence], encoder)
    >>> torch.allclose(mean, among, rtol=0.01)
    True
    """
    kernel, stride = encoder_frame(encoder)
    weight = next(encoder.parameters())
    dtype = torch.promote_types(weight.dtype, torch.float32)
    sums, frames, rest = 0, 0, None

    def _add(samples):
        nonlocal sums, frames
        mix_w = encoder(samples.to(weight.device)).to(dtype)
        block = weighted_sums(mix_w.transpose(1, 2)).sum(2)
        # Hours of audio need float64, which only the CPU is sure to support.
        sums = sums + block.cpu().double()
        frames += mix_w.shape[2]

    for block in blocks:
        samples = block if rest is None else torch.cat([rest, block], 1)
        if samples.shape[1] >= kernel:
            _add(samples)
            whole = 1 + (samples.shape[1] - kernel) // stride
            samples = samples[:, whole * stride :]
        rest = samples
    # The samples at the start of the rest that earlier frames already cover.
    covered = kernel - stride if frames else 0
    if rest.shape[1] > covered:
        _add(F.pad(rest, (0, kernel - rest.shape[1])))
    return tuple(part.to(dtype).to(weight.device) for part in moments(sums))


def encoder_frame(encoder):
    """Kernel size and stride of an encoder.

    Arguments
    ---------
    encoder : torch.nn.Module
        An encoder; it may be wrapped or scripted.

    Returns
    -------
    tuple of int
        Kernel size and stride, in samples.

    Example
    -------
    >>> encoder_frame(build("tiny").encoder)
    (32, 16)
    """
    conv = next(m for m in encoder.modules() if hasattr(m, "kernel_size"))
    return conv.kernel_size[0], conv.stride[0]


def takes(masknet, name):
    """Whether the forward of a masknet takes an argument of this name.

    True for a forward with ``**kwargs``, because wrappers of adapters pass
    their arguments on.

    Arguments
    ---------
    masknet : torch.nn.Module
        A masknet; it may be wrapped.
    name : str
        Name of the argument.

    Returns
    -------
    bool
        Whether the masknet takes it.

    Example
    -------
    >>> takes(build("tiny").masknet, "lengths")
    True
    """
    parameters = inspect.signature(unwrapped(masknet).forward).parameters
    any_name = (x.kind is x.VAR_KEYWORD for x in parameters.values())
    return name in parameters or any(any_name)


def unwrapped(module):
    """Remove the wrappers of torch.compile and of multi-device training.

    Arguments
    ---------
    module : torch.nn.Module
        A module, wrapped or not.

    Returns
    -------
    torch.nn.Module
        The module inside.

    Example
    -------
    >>> unwrapped(nn.DataParallel(nn.ReLU()))
    ReLU()
    """
    module = getattr(module, "_orig_mod", module)
    several = isinstance(module, (nn.DataParallel, DistributedDataParallel))
    return unwrapped(module.module) if several else module
