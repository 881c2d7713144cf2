"""ONNX: the whole way from mixture to sources as one graph, for any length."""

import os
from pathlib import Path

import torch
import torch.nn as nn

from speechbrain_flashformer.separate import MODULES, separate

OPSET = 18
# Largest difference from torch that an export may show, relative to the peak.
TOLERANCE = 1e-4


class WaveformSeparator(nn.Module):
    """Encoder, masknet and decoder as one module, [B, T] -> [B, T, S]."""

    def __init__(self, encoder, masknet, decoder):
        super().__init__()
        self.encoder, self.masknet = encoder, masknet
        self.decoder = decoder

    def forward(self, mixture):
        """Separate mixtures [B, T]."""
        return separate(mixture, self.encoder, self.masknet, self.decoder)


def export_onnx(model, path, overwrite=False):
    """Write a model as ONNX and check it against torch.

    The graph takes ``mixture`` [B, T] at the model's rate, T at least the
    encoder's kernel, and gives ``sources`` [B, T, S]; B and T are dynamic. Its
    metadata hold ``sample_rate`` and ``num_spks``.

    Arguments
    ---------
    model : FlashFormerSeparation
        A loaded model.
    path : str or Path
        The file to write, all at once.
    overwrite : bool
        Whether an existing file is replaced.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ImportError
        When the extra onnx is missing.
    FileExistsError
        When the file exists.
    RuntimeError
        When onnxruntime and torch disagree.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise ImportError(
            f"export needs {error.name}: pip install "
            "'speechbrain-flashformer[onnx]'"
        ) from error
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: remove it, or ask to overwrite")
    rate = model.hparams.sample_rate
    parts = (model.mods[name] for name in MODULES)
    network = WaveformSeparator(*parts).eval().cpu()
    any_size = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.onnx.export(
            network,
            # Long enough for several blocks of attention: a size of one
            # would be taken for a constant.
            (torch.randn(2, 5 * rate + 1),),
            dynamic_shapes=({0: any_size, 1: any_size},),
            input_names=["mixture"],
            output_names=["sources"],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    graph = program.model_proto
    # Where in the source each node came from: more bytes than the weights.
    for node in graph.graph.node:
        node.ClearField("metadata_props")
    onnx.helper.set_model_props(
        graph,
        {
            "sample_rate": str(rate),
            "num_spks": str(model.hparams.num_spks),
        },
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        onnx.save(graph, str(partial))
        session = onnxruntime.InferenceSession(
            str(partial), providers=["CPUExecutionProvider"]
        )
        _check(network, session, rate)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        model.to(model.device)
    return path


def _check(network, session, rate):
    """Compare the graph with torch at other sizes than it was traced with."""
    for batch, samples in ((1, rate), (3, 3 * rate + 7), (1, 5 * rate + 1)):
        mixture = 0.1 * torch.randn(batch, samples)
        with torch.no_grad():
            expected = network(mixture)
        (sources,) = session.run(None, {"mixture": mixture.numpy()})
        worst = (torch.from_numpy(sources) - expected).abs().max()
        if worst > TOLERANCE * expected.abs().max():
            raise RuntimeError(
                f"the graph differs from torch by {worst:.2g} for "
                f"{batch} x {samples} samples: nothing was written"
            )
