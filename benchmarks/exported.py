"""What ``flashformer export`` wrote, in the place of a model."""

from types import SimpleNamespace

import torch

from speechbrain_flashformer.inference import FlashFormerSeparation
from speechbrain_flashformer.inference.export import onnx_session


class ExportedModel:
    """A graph for mixtures of any length, on the CPU."""

    def __init__(self, path):
        self.session = onnx_session(path)
        told = self.session.get_modelmeta().custom_metadata_map
        self.hparams = SimpleNamespace(sample_rate=int(told["sample_rate"]))

    def separate_batch(self, mix):
        """Sources [B, T, S] of mixtures [B, T]."""
        (sources,) = self.session.run(None, {"mixture": mix.numpy()})
        return torch.from_numpy(sources)


def load_separation(source):
    """The model of a packed folder, or of an .onnx file."""
    if source.endswith(".onnx"):
        return ExportedModel(source)
    return FlashFormerSeparation.from_hparams(source)
