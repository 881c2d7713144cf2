"""Separate recordings of any length, rate and number of channels.

Axes: B batch, C channels, S speakers, T, n and m samples.
"""

import contextlib
from functools import partial
from pathlib import Path

import torch

from speechbrain_flashformer.inference.audio import (
    AudioReader,
    Resampler,
    choose_signal,
)
from speechbrain_flashformer.inference.files import SourceWriter
from speechbrain_flashformer.inference.folders import local_file
from speechbrain_flashformer.inference.memory import AudioInMemory
from speechbrain_flashformer.inference.options import SeparationOptions
from speechbrain_flashformer.inference.pipeline import (
    ChunkNetwork,
    StreamSeparator,
    chunk_stages,
    recording_statistics,
    separate_blocks,
)
from speechbrain_flashformer.inference.progress import Progress
from speechbrain_flashformer.inference.runtime import choose_steps, traced_steps
from speechbrain_flashformer.nnet.separator import MODULES, separate, unwrapped
from speechbrain_flashformer.nnet.step import silence_broken
from speechbrain_flashformer.nnet.streaming import StreamingSeparator

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Recordings:
    """Methods of ``FlashFormerSeparation`` and ``RecordingSeparator``.

    The classes provide ``mods``, ``hparams`` and ``precision``, as SpeechBrain
    does. Methods raise an OSError when a file cannot be read or written, and a
    ValueError when an input or an option is invalid.
    """

    precision = "fp32"

    def describe(self):
        """Describe the model, as a dict: see ``description.describe``."""
        from speechbrain_flashformer.inference.description import describe

        return describe(self)

    @torch.no_grad()
    def separate_batch(self, mix):
        """Separate a batch of mixtures without chunks and without gradients.

        Turns stay where the network puts them.

        Arguments
        ---------
        mix : torch.Tensor
            [B, T] at the model's rate, T >= 1.

        Returns
        -------
        torch.Tensor
            [B, T, S] in the type of mix, on the model's device.

        Raises
        ------
        ValueError
            When mix has another shape.
        """
        if mix.ndim != 2 or not mix.numel():
            raise ValueError(
                f"separate_batch takes [batch, time], got {tuple(mix.shape)}"
            )
        mix = mix.to(self._weights_device)
        with self._autocast():
            return separate(mix, *self._networks()).to(mix.dtype)

    def separate_audio(self, audio, sample_rate=None, **options):
        """Separate audio in memory.

        Arguments
        ---------
        audio : torch.Tensor or np.ndarray
            [T] or [C, T]; floats, or int16 or int32 PCM.
        sample_rate : int, optional
            Rate of input and output in Hz; the model's by default.
        **options
            Fields of ``SeparationOptions``.

        Returns
        -------
        torch.Tensor
            [1, T, S], or [C, T, S] with channels="each"; float32, CPU.
        """
        options = SeparationOptions(**options)
        if sample_rate is None:
            sample_rate = self.hparams.sample_rate
        recording = AudioInMemory(audio, sample_rate)
        return _concatenate(self._separate_blocks(recording, options))

    def separate_file(self, path, savedir=None, **options):
        """Separate an audio file and return the sources in memory.

        Arguments
        ---------
        path : str or Path
            An audio file, or a URL.
        savedir : str or Path, optional
            Folder for the download; required for a URL.
        **options
            Fields of ``SeparationOptions``.

        Returns
        -------
        torch.Tensor
            As from ``separate_audio``, at the rate of the file.
        """
        options = SeparationOptions(**options)
        reader = AudioReader(local_file(path, savedir))
        return _concatenate(self._separate_blocks(reader, options))

    def separate_to_files(
        self,
        path,
        folder,
        name=None,
        subtype="float",
        normalize=False,
        overwrite=False,
        **options,
    ):
        """Separate a file into files; memory does not grow with its length.

        Arguments
        ---------
        path : str or Path
            An audio file.
        folder : str or Path
            Where NAME_s1.wav, NAME_s2.wav, ... are written (NAME_c1_s1.wav, ...
            with channels="each"). After an error none of them is written.
        name : str, optional
            NAME; the stem of path by default.
        subtype, normalize, overwrite
            As in ``SourceWriter``.
        **options
            Fields of ``SeparationOptions``.

        Returns
        -------
        list of Path
            The files written.
        """
        options = SeparationOptions(**options)
        reader = AudioReader(path)
        paths = self.output_paths(
            name or Path(path).stem,
            folder,
            reader.channels if options.channels == "each" else None,
        )
        writer = SourceWriter(
            paths,
            reader.sample_rate,
            reader.frames,
            subtype,
            normalize,
            overwrite,
        )
        with writer:
            for sources in self._separate_blocks(reader, options):
                writer.write(sources)
        return writer.paths

    def output_paths(self, name, folder, channels=None):
        """Paths that ``separate_to_files`` writes: by channel, then speaker.

        Arguments
        ---------
        name : str
            NAME, as in ``separate_to_files``.
        folder : str or Path
            Folder of the files.
        channels : int, optional
            C with channels="each"; None if the channels are mixed.

        Returns
        -------
        list of Path
        """
        stems = [name]
        if channels:
            stems = [f"{name}_c{number}" for number in range(1, channels + 1)]
        speakers = range(1, self.hparams.num_spks + 1)
        return [
            Path(folder) / f"{stem}_s{speaker}.wav"
            for stem in stems
            for speaker in speakers
        ]

    def make_stream(self, batch_size=1, run=None):
        """Create a stream at the model's rate.

        Arguments
        ---------
        batch_size : int
            Number of signals that are separated in parallel.
        run : callable, optional
            As in ``StreamingSeparator``.

        Returns
        -------
        StreamingSeparator

        Raises
        ------
        ValueError
            When the model is not causal.
        """
        networks = self._bare_networks()
        if not getattr(networks[1], "causal", False):
            raise ValueError(
                "this model is not causal and cannot stream: give a causal "
                "one, such as the model for live streams of this package "
                "(flashformer info shows its folder)"
            )
        return StreamingSeparator(*networks, batch_size, run)

    def separate_stream(self, blocks, sample_rate=None, run=None):
        """Separate live audio block by block.

        Arguments
        ---------
        blocks : iterable of torch.Tensor
            The audio in order, each float [C, n] of any n.
        sample_rate : int, optional
            Rate of input and output in Hz; the model's by default.
        run : callable, optional
            As returned by ``choose_steps``; traced steps by default.

        Yields
        ------
        torch.Tensor
            The next samples [C, m, S] on the CPU, once for each block and at
            the end; as many in total as the input has.

        Raises
        ------
        ValueError
            When the model is not causal.
        """
        model_rate = self.hparams.sample_rate
        # Before resampling, which would spread invalid samples.
        valid = map(silence_broken, blocks)
        run = run or traced_steps(self)
        separator = StreamSeparator(partial(self.make_stream, run=run))
        rates = sample_rate or model_rate, model_rate
        for sources in separate_blocks(valid, *rates, [separator]):
            yield sources.transpose(1, 2)

    def stream_latency(self, sample_rate=None):
        """Latency of network and resampling, without the length of a block.

        Arguments
        ---------
        sample_rate : int, optional
            Rate of the stream in Hz; the model's by default.

        Returns
        -------
        float
            Seconds.
        """
        rate = self.hparams.sample_rate
        seconds = self.make_stream().latency / rate
        if sample_rate and sample_rate != rate:
            seconds += Resampler(sample_rate, rate).latency
            seconds += Resampler(rate, sample_rate).latency
        return seconds

    def _separate_blocks(self, recording, options):
        """Yield the sources [C, S, n] of an ``AudioReader``."""
        if options.streaming:
            self.make_stream()  # raises early if the model is not causal
        rate, model_rate = recording.sample_rate, self.hparams.sample_rate
        each = options.channels == "each"
        to_signal = choose_signal(recording.blocks(), each, recording.path)
        # One chunk per block, so that progress is reported chunk by chunk.
        step = min(10.0, options.chunk - options.overlap)
        separator, *others = self._separators(recording, to_signal, options)
        seconds = recording.frames / rate
        with Progress(
            model_rate, seconds, options.progress, options.callback
        ) as progress:
            yield from separate_blocks(
                map(to_signal, recording.blocks(step)),
                rate,
                model_rate,
                [separator, progress, *others],
                options.mixture_consistency,
            )

    def _separators(self, recording, to_signal, options):
        """Make the stages that separate at the model's rate."""
        if options.streaming:
            run = choose_steps(self, options.runtime)
            return [StreamSeparator(partial(self.make_stream, run=run))]
        rate, num_spks = self.hparams.sample_rate, self.hparams.num_spks
        networks, statistics = self._networks(), None
        if options.norm == "recording":
            mixture = map(to_signal, recording.blocks())
            statistics = recording_statistics(
                mixture, recording.sample_rate, rate, networks
            )
        network = ChunkNetwork(
            networks, lambda: self._autocast(options.precision), statistics
        )
        return chunk_stages(network, options, rate, num_spks)

    def _networks(self):
        return [self.mods[name] for name in MODULES]

    def _bare_networks(self):
        """The networks without the wrappers of ``run_opts``."""
        return [unwrapped(network) for network in self._networks()]

    def _autocast(self, precision="fp32"):
        """Autocast to a precision; with fp32 to that of ``run_opts``."""
        dtype = PRECISIONS[precision] or PRECISIONS[self.precision]
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._weights_device.type, dtype)

    @property
    def _weights_device(self):
        # ``self.device`` is not updated when ``to`` moves the modules.
        return next(self.mods.encoder.parameters()).device


def _concatenate(parts):
    """Concatenate sources [C, S, n] to [C, T, S], as in SpeechBrain."""
    return torch.cat(list(parts), 2).transpose(1, 2)
