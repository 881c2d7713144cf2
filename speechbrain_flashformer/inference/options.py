"""How a recording is separated: the one place where that is checked."""

from dataclasses import dataclass

CHOICES = {
    "channels": ("mix", "each"),
    "norm": ("chunk", "recording"),
    "precision": ("fp32", "bf16", "fp16"),
    "runtime": ("auto", "torch", "onnx"),
}
SUBTYPES = {"float": "FLOAT", "pcm16": "PCM_16", "pcm24": "PCM_24"}  # written
# What a stream leaves none of to choose.
NOT_STREAMING = ("chunk", "overlap", "norm", "precision")


@dataclass(frozen=True)
class SeparationOptions:
    """How a recording is separated.

    Arguments
    ---------
    channels : str
        ``mix`` takes the mean of the channels, or the loudest one where they
        cancel each other; ``each`` separates each.
    chunk : float
        Seconds that the network is given at once; longer recordings are cut.
    overlap : float
        Seconds that neighbouring chunks share.
    norm : str
        ``chunk``: each chunk is normed by itself, which follows a level that
        drifts. ``recording``: by the whole recording, read once more;
        with an overlap of twice the receptive field, chunks then give what
        the whole would.
    mixture_consistency : bool
        Make the sources sum to the mixture (without its offset, if it has
        one): adds the residual to the sources in equal parts.
    precision : str
        ``fp32``, ``bf16`` or ``fp16``. With fp32, that of ``run_opts`` if any.
    streaming : bool
        Separate as a stream, exactly as ``StreamingSeparator`` does, for which
        the model must be causal. There are then no chunks, no norm and no
        precision to choose.
    runtime : str
        What runs a stream, with streaming alone: ``torch``; ``onnx``, which is
        onnxruntime, on the CPU, to 1e-4 the same; ``auto``, which is torch
        for a recording.
    memory : int
        Megabytes that the activations of one call may take, about.
    progress : bool
        Show a progress bar.
    callback : callable, optional
        Called with (seconds done, seconds in all).

    Raises
    ------
    ValueError
        When an option is none of its choices, or two contradict each other.

    Example
    -------
    >>> SeparationOptions(chunk=4.0, overlap=1.0).norm
    'chunk'
    """

    channels: str = "mix"
    chunk: float = 10.0
    overlap: float = 2.5
    norm: str = "chunk"
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
        if not 0 < 2 * self.overlap < self.chunk:
            raise ValueError(
                "overlap is more than 0 and less than half of chunk, got "
                f"{self.overlap} and {self.chunk} seconds"
            )
        chosen = [
            name
            for name in NOT_STREAMING
            if getattr(self, name) != getattr(type(self), name)
        ]
        if self.streaming and chosen:
            raise ValueError(
                f"streaming leaves no {' and no '.join(chosen)} to choose"
            )
        if self.runtime != "auto" and not self.streaming:
            raise ValueError("a runtime is chosen for streaming alone")
