"""Speech separation for SpeechBrain: Transformer, FSMN and Flash Attention."""

from importlib import import_module

__version__ = "0.1.0"

# Imported on first use, because the masknet needs only torch and the command
# line's --help not even that.
HOMES = {
    "FlashFormer": "nnet.flashformer",
    "FlashFormerSeparation": "inference.interface",
    "StreamingSeparator": "nnet.streaming",
    "build": "nnet.separator",
}
__all__ = list(HOMES)


def __getattr__(name):
    """Import a public name from its module on first use."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
