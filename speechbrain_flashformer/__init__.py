"""Speech separation for SpeechBrain: Transformer, FSMN and Flash Attention."""

__all__ = ["FlashFormer", "StreamingSeparator"]
__version__ = "0.1.0"


def __getattr__(name):
    """Import on first use: the command's --help does without torch."""
    if name == "FlashFormer":
        from speechbrain_flashformer.nnet.flashformer import FlashFormer

        return FlashFormer
    if name == "StreamingSeparator":
        from speechbrain_flashformer.nnet.streaming import StreamingSeparator

        return StreamingSeparator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
