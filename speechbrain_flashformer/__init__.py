"""Speech separation for SpeechBrain: Transformer, FSMN and Flash Attention."""

from speechbrain_flashformer.masknet import FlashFormer

__all__ = ["FlashFormer"]
__version__ = "0.1.0"
