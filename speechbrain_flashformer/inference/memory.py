"""Audio in memory with the interface of an audio file."""

import numpy as np
import torch

from speechbrain_flashformer.inference.audio import check_finite

# An array with one column and more rows than this is taken for a transposed
# signal, not for channels of one sample.
MAX_CHANNELS = 32


class AudioInMemory:
    """Audio in memory with the interface of an ``AudioReader``.

    Arguments
    ---------
    audio : torch.Tensor or np.ndarray
        [T] or [C, T]; floats, or int16 or int32 PCM.
    sample_rate : int
        Hz.

    Raises
    ------
    ValueError
        When the audio has another shape or type, or a sample is not finite, or
        the rate is not a whole number above 0.

    Example
    -------
    >>> [block.shape for block in AudioInMemory(torch.zeros(9), 8000).blocks()]
    [torch.Size([1, 9])]
    """

    path = "the audio"

    def __init__(self, audio, sample_rate):
        self.audio = _as_float(audio)
        check_finite(self.audio, self.path)
        if sample_rate != int(sample_rate) or sample_rate < 1:
            raise ValueError(
                f"sample_rate must be a whole number, not {sample_rate}"
            )
        self.sample_rate = int(sample_rate)
        self.frames = self.audio.shape[1]

    def blocks(self, seconds=10.0):
        """Split the audio into blocks.

        Arguments
        ---------
        seconds : float
            Length of a block.

        Returns
        -------
        tuple of torch.Tensor
            The blocks in order, each float32 [C, n].
        """
        return self.audio.split(max(1, round(seconds * self.sample_rate)), 1)


def _as_float(audio):
    """Convert an array or tensor [T] or [C, T] to float32 [C, T]."""
    if isinstance(audio, np.ndarray):
        native = audio.dtype.newbyteorder("=")
        audio = torch.from_numpy(np.ascontiguousarray(audio, native))
    if audio.ndim not in (1, 2) or not audio.numel():
        raise ValueError(
            "audio must be [time] or [channels, time], got "
            f"{tuple(audio.shape)}"
        )
    rows, columns = audio.shape if audio.ndim == 2 else (1, audio.shape[0])
    if rows > columns and (columns > 1 or rows > MAX_CHANNELS):
        raise ValueError(
            f"audio must be [channels, time], got {tuple(audio.shape)}: "
            "transpose it"
        )
    if audio.dtype in (torch.int16, torch.int32):
        audio = audio / -torch.iinfo(audio.dtype).min
    elif not audio.is_floating_point():
        raise ValueError(
            f"audio must be float, int16 or int32, got {audio.dtype}"
        )
    return audio.detach().float().cpu().reshape(-1, audio.shape[-1])
