"""Inference: separate recordings and streams; load, pack and export models.

``FlashFormerSeparation`` loads a model with SpeechBrain's interface.
``built_in_model`` returns the folder of the model of this package.
"""

from importlib import import_module

HOMES = {"FlashFormerSeparation": "interface", "built_in_model": "folders"}
__all__ = ["FlashFormerSeparation", "built_in_model"]


def __getattr__(name):
    """Import on first use: some modules here do not need SpeechBrain."""
    if name in HOMES:
        return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
