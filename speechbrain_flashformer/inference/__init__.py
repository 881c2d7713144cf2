"""Inference: recordings, streams, model folders, files.

``FlashFormerSeparation`` is SpeechBrain's way to load a model,
``built_in_model`` the folder of the one that comes with the package.
"""

from importlib import import_module

HOMES = {"FlashFormerSeparation": "interface", "built_in_model": "folders"}
__all__ = ["FlashFormerSeparation", "built_in_model"]


def __getattr__(name):
    """Import on first use: file names and pipes do without SpeechBrain."""
    if name in HOMES:
        return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
