"""Models exported by ``flashformer export``, with the interface of a model."""

from types import SimpleNamespace

import torch

from speechbrain_flashformer.inference import FlashFormerSeparation
from speechbrain_flashformer.inference.export import onnx_session


class ExportedModel:
    """An ONNX graph for mixtures of any length, on the CPU."""

    def __init__(self, path):
        self.session = onnx_session(path)
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.hparams = SimpleNamespace(sample_rate=int(metadata["sample_rate"]))

    def separate_batch(self, mix):
        """Separate mixtures [B, T] into [B, T, S]."""
        (sources,) = self.session.run(None, {"mixture": mix.numpy()})
        return torch.from_numpy(sources)


def load_separation(source):
    """Load a packed folder or an .onnx file."""
    if source.endswith(".onnx"):
        return ExportedModel(source)
    return FlashFormerSeparation.from_hparams(source)
