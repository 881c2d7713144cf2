"""Options of a separation, and their checks."""

import math
from dataclasses import dataclass

CHOICES = {
    "channels": ("mix", "each"),
    "norm": ("chunk", "recording"),
    "precision": ("fp32", "bf16", "fp16"),
    "runtime": ("auto", "torch", "onnx"),
    "turns": ("voice", "network"),
}
# Sample formats of the written files -> libsndfile's names.
SUBTYPES = {"float": "FLOAT", "pcm16": "PCM_16", "pcm24": "PCM_24"}
# Options that must keep their defaults with streaming.
NOT_STREAMING = ("chunk", "overlap", "norm", "precision", "turns")


@dataclass(frozen=True)
class SeparationOptions:
    """Options of a separation.

    Arguments
    ---------
    channels : str
        ``mix`` separates the mean of the channels, or the loudest channel
        where they cancel each other; ``each`` separates every channel.
    chunk : float
        Chunk length in seconds. Longer recordings are cut into chunks.
    overlap : float
        Overlap of neighboring chunks in seconds, above 0 and below half of
        ``chunk``.
    norm : str
        Source of the statistics of the input norm. ``chunk``: each chunk,
        which follows a level that drifts. ``recording``: the whole recording,
        which is read once more; if the overlap is more than twice the
        receptive field to one side, the result then equals that without chunks.
    turns : str
        ``voice``: a turn of a conversation is moved to the output of its
        speaker if the network puts it elsewhere. ``network``: turns stay where
        the network puts them, as they do if several channels are separated.
    mixture_consistency : bool
        Whether the sources sum to the mixture (without its DC offset, if that
        is removed): adds the residual (mixture minus sum of sources) to the
        sources in equal parts.
    precision : str
        ``fp32``, ``bf16`` or ``fp16``. With fp32 the precision of ``run_opts``
        applies, if that is given.
    streaming : bool
        Whether to separate with a ``StreamingSeparator``, which needs a causal
        model. chunk, overlap, norm, precision and turns must then keep their
        defaults.
    runtime : str
        Runtime of the stream; only with streaming. ``torch``: PyTorch.
        ``onnx``: onnxruntime on the CPU, equal to torch up to 1e-4.
        ``auto``: torch for a recording.
    memory : int
        Approximate limit in megabytes for the activations of one call of the
        network. It sets the number of chunks per call on a GPU.
    progress : bool
        Whether to show a progress bar.
    callback : callable, optional
        Called with (seconds done, total seconds) after each part.

    Raises
    ------
    ValueError
        When an option has an unknown value, or two options contradict each
        other.

    Example
    -------
    >>> SeparationOptions(chunk=4.0, overlap=1.0).norm
    'chunk'
    """

    channels: str = "mix"
    chunk: float = 10.0
    overlap: float = 2.5
    norm: str = "chunk"
    turns: str = "voice"
    mixture_consistency: bool = False
    precision: str = "fp32"
    streaming: bool = False
    runtime: str = "auto"
    memory: int = 512
    progress: bool = False
    callback: object = None

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is one of {', '.join(known)}, not "
                    f"{getattr(self, name)!r}"
                )
        if not 0 < 2 * self.overlap < self.chunk < math.inf:
            raise ValueError(
                "overlap must be more than 0 and less than half of chunk, and "
                f"chunk finite, got {self.overlap} and {self.chunk} seconds"
            )
        chosen = [
            name
            for name in NOT_STREAMING
            if getattr(self, name) != getattr(type(self), name)
        ]
        if self.streaming and chosen:
            raise ValueError(
                f"{' and '.join(chosen)} cannot be set with streaming"
            )
        if self.runtime != "auto" and not self.streaming:
            raise ValueError("runtime can be set only with streaming")
