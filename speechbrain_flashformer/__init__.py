"""Speech separation for SpeechBrain: Transformer, FSMN and Flash Attention."""

from speechbrain_flashformer.masknet import FlashFormer
from speechbrain_flashformer.streaming import StreamingSeparator

__all__ = ["FlashFormer", "StreamingSeparator"]
__version__ = "0.1.0"
