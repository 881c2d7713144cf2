"""Inference: recordings, streams, model folders, files.

``FlashFormerSeparation`` is SpeechBrain's way to load a model.
"""

__all__ = ["FlashFormerSeparation"]


def __getattr__(name):
    """Import on first use: file names and pipes do without SpeechBrain."""
    if name == "FlashFormerSeparation":
        from speechbrain_flashformer.inference.interface import (
            FlashFormerSeparation,
        )

        return FlashFormerSeparation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
