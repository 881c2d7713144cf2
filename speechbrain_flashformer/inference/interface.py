"""Separate recordings with a trained model: any length, rate and channels."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from speechbrain.inference.separation import SepformerSeparation
from speechbrain.utils.fetching import FetchConfig, LocalStrategy, fetch
from tqdm import tqdm

from speechbrain_flashformer.inference.audio import (
    AudioReader,
    Resampler,
    check_finite,
    plan_hearing,
    resample_blocks,
)
from speechbrain_flashformer.inference.chunks import ChunkPlan, separate_long
from speechbrain_flashformer.inference.files import SourceWriter
from speechbrain_flashformer.inference.models import load_model
from speechbrain_flashformer.nnet.attention import attention_report
from speechbrain_flashformer.nnet.macs import count_macs
from speechbrain_flashformer.nnet.separator import (
    MODULES,
    encoder_frame,
    encoder_statistics,
    separate,
    takes,
    unwrapped,
)
from speechbrain_flashformer.nnet.streaming import (
    StreamingSeparator,
    silence_broken,
)

# More rows of one sample each are one channel that stands upright.
MOST_CHANNELS = 32

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def built_in_model():
    """The folder of the model that comes with the package.

    Raises
    ------
    FileNotFoundError
        When this version has none.
    """
    folder = Path(__file__).parent.parent / "pretrained"
    if not (folder / "hyperparams.yaml").is_file():
        raise FileNotFoundError(
            "this version comes without a pretrained model: give one as "
            "--model, a folder made by 'flashformer pack' or a model on a hub "
            "as hf:OWNER/NAME"
        )
    return folder


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
        with an overlap of twice the network's reach, chunks then give what
        the whole would.
    mixture_consistency : bool
        Make the sources sum to the mixture (without its offset, if it has
        one): what they lack of it is shared equally.
    precision : str
        ``fp32``, ``bf16`` or ``fp16``. With fp32, that of ``run_opts`` if any.
    streaming : bool
        Separate as a stream, exactly as ``StreamingSeparator`` does, for which
        the model must be causal. There are then no chunks, no norm and no
        precision to choose.
    memory : int
        Megabytes that the activations of one call may take, about.
    progress : bool
        Show a progress bar.
    callback : callable, optional
        Called with (seconds done, seconds in all).
    """

    channels: str = "mix"
    chunk: float = 10.0
    overlap: float = 2.5
    norm: str = "chunk"
    mixture_consistency: bool = False
    precision: str = "fp32"
    streaming: bool = False
    memory: int = 512
    progress: bool = False
    callback: object = None

    def __post_init__(self):
        for name, known in (
            ("channels", ("mix", "each")),
            ("norm", ("chunk", "recording")),
            ("precision", PRECISIONS),
        ):
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
            for name in ("chunk", "overlap", "norm", "precision")
            if getattr(self, name) != getattr(type(self), name)
        ]
        if self.streaming and chosen:
            raise ValueError(
                f"streaming leaves no {' and no '.join(chosen)} to choose"
            )


class FlashFormerSeparation(SepformerSeparation):
    """A ready-to-use model: SpeechBrain's interface, made for recordings.

    The calls are those of ``SepformerSeparation``. Each takes the fields of
    ``SeparationOptions`` as keyword arguments. Outputs have the level that the
    model gives them: they are never brought to full scale unasked.

    Example
    -------
    >>> from speechbrain.lobes.models.dual_path import Decoder, Encoder
    >>> from speechbrain_flashformer import FlashFormer
    >>> modules = {
    ...     "encoder": Encoder(kernel_size=16, out_channels=32),
    ...     "masknet": FlashFormer(in_channels=32, d_model=64, num_layers=1),
    ...     "decoder": Decoder(32, 1, kernel_size=16, stride=8, bias=False),
    ... }
    >>> hparams = {"num_spks": 2, "sample_rate": 8000}
    >>> model = FlashFormerSeparation(modules, hparams)
    >>> stereo = torch.randn(2, 44100)
    >>> model.separate_audio(stereo, 44100).shape
    torch.Size([1, 44100, 2])
    """

    @classmethod
    def from_hparams(
        cls,
        source,
        hparams_file="hyperparams.yaml",
        overrides=None,
        overrides_must_match=True,
        savedir=None,
        download_only=False,
        local_strategy=LocalStrategy.SYMLINK,
        fetch_config=None,
        trust=False,
        **kwargs,
    ):
        """Load a packed model.

        Arguments
        ---------
        source : str or Path
            A folder made by ``flashformer pack``, or ``hf:OWNER/NAME`` for a
            model of the Hugging Face hub.
        hparams_file : str
            The yaml of the model.
        overrides : dict or str, optional
            Takes the place of what the yaml says.
        overrides_must_match : bool
            Whether an override of what the yaml does not have is an error.
        savedir : str or Path, optional
            Gets links to, or copies of, the files of a model of a hub. For a
            folder it means nothing: its files stay where they are.
        download_only : bool
            Fetch and return None.
        local_strategy : LocalStrategy
            Whether savedir gets links or copies.
        fetch_config : FetchConfig, optional
            Of SpeechBrain's ``fetch``.
        trust : bool
            Whether the model's yaml may call anything. Else it may only ask
            for what ``flashformer pack`` writes, and runs no code of its own.
        **kwargs
            Of SpeechBrain's ``Pretrained``: ``run_opts``, ``freeze_params``.

        Returns
        -------
        FlashFormerSeparation

        Raises
        ------
        OSError
            When a file is missing or cannot be read.
        ValueError
            When a file is broken, does not fit, or would have to be trusted.
        """
        hparams = load_model(
            source,
            hparams_file,
            overrides,
            overrides_must_match,
            savedir,
            local_strategy,
            fetch_config,
            trust,
            download_only,
        )
        if download_only:
            return None
        return cls(hparams["modules"], hparams, **kwargs)

    def describe(self):
        """What the model is and how it runs here, as a dict of texts."""
        rate, spks = self.hparams.sample_rate, self.hparams.num_spks
        encoder, masknet, decoder = self._bare_networks()
        seconds = 10
        mixture = torch.randn(1, seconds * rate, device=self._weights_device)
        macs = count_macs(lambda: separate(mixture, encoder, masknet, decoder))
        with torch.no_grad(), attention_report() as ran:
            separate(mixture, encoder, masknet, decoder)
        parameters = sum(p.numel() for p in self.mods.parameters())
        described = {
            "masknet": type(masknet).__name__,
            "speakers": spks,
            "sampling rate": f"{rate} Hz",
            "parameters": f"{parameters / 1e6:.2f} million",
            "compute": f"{macs / seconds / 1e9:.2f} GMAC per second of audio",
        }
        if hasattr(masknet, "receptive_field"):
            stride = encoder_frame(encoder)[1]
            reach = [
                "all" if side < 0 else f"{side * stride / rate:.1f} s"
                for side in masknet.receptive_field
            ]
            described["context"] = f"{reach[0]} before, {reach[1]} after"
            why = "its window is unbounded"
            if not masknet.causal:
                why = "the network is not causal"
            described["streaming"] = f"no, {why}"
            if masknet.can_stream:
                latency = 1000 * self.make_stream().latency / rate
                described["streaming"] = f"with {latency:g} ms of latency"
        if ran:
            described["attention"] = ran[0]["backend"]
            for name, why in ran[0]["not_used"].items():
                described[f"  not {name}"] = why
        return described

    # --- in memory ----------------------------------------------------------

    @torch.no_grad()
    def separate_batch(self, mix):
        """Separate mixtures at the model's rate, each whole; no gradients.

        Arguments
        ---------
        mix : torch.Tensor
            [B, T], T >= 1.

        Returns
        -------
        torch.Tensor
            [B, T, S].
        """
        if mix.ndim != 2 or not mix.numel():
            raise ValueError(
                f"separate_batch takes [batch, time], got {tuple(mix.shape)}"
            )
        mix = mix.to(self._weights_device)
        with self._autocast():
            return separate(mix, *self._networks()).to(mix.dtype)

    def separate_audio(self, audio, sample_rate=None, **options):
        """Separate audio that is in memory.

        Arguments
        ---------
        audio : torch.Tensor or np.ndarray
            [T] or [C, T]; integers are taken as PCM.
        sample_rate : int, optional
            Hz, of input and output; the model's by default.
        **options
            Fields of ``SeparationOptions``.

        Returns
        -------
        torch.Tensor
            [1, T, S], or [C, T, S] with channels="each"; float32, CPU.
        """
        audio = _as_float(audio)
        check_finite(audio, "the audio")
        rate = sample_rate
        if rate is None:
            rate = self.hparams.sample_rate
        if rate != int(rate) or rate < 1:
            raise ValueError(f"sample_rate is a whole number, not {rate}")
        rate = int(rate)

        def _blocks():
            return audio.split(10 * rate, 1)

        options = SeparationOptions(**options)
        parts = self._stream(
            _blocks, rate, audio.shape[1], options, "the audio"
        )
        return torch.cat(list(parts), 1)

    def separate_file(self, path, savedir=None, **options):
        """Separate a file; the sources come back at its rate, in memory.

        Arguments
        ---------
        path : str or Path
            An audio file, or a URL.
        savedir : str or Path, optional
            Where a file from a URL is kept; needed for one.
        **options
            Fields of ``SeparationOptions``.

        Returns
        -------
        torch.Tensor
            [1, T, S], or [C, T, S] with channels="each"; float32, CPU.
        """
        reader = AudioReader(_local(path, savedir))
        options = SeparationOptions(**options)
        return torch.cat(list(self._separated(reader, options)), 1)

    # --- file to files ------------------------------------------------------

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
        """Separate a file of any length into files, in little memory.

        Arguments
        ---------
        path : str or Path
            An audio file.
        folder : str or Path
            Gets NAME_s1.wav, NAME_s2.wav, ... (NAME_c1_s1.wav, ... with
            channels="each"), all at the end or, after an error, none.
        name : str, optional
            NAME; that of the file by default.
        subtype, normalize, overwrite
            As in ``SourceWriter``.
        **options
            Fields of ``SeparationOptions``.

        Returns
        -------
        list of Path
            The files written.
        """
        reader = AudioReader(path)
        options = SeparationOptions(**options)
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
            for part in self._separated(reader, options):
                # [C, n, S] -> [n, C S]
                writer.write(part.transpose(0, 1).flatten(1))
        return writer.paths

    def output_paths(self, name, folder, channels=None):
        """The files of a recording that ``separate_to_files`` writes.

        Arguments
        ---------
        name : str
            NAME.
        folder : str or Path
            Where they are.
        channels : int, optional
            How many are separated each; none by default.

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

    # --- streams ------------------------------------------------------------

    def make_stream(self, batch_size=1):
        """A new stream at the model's rate, a ``StreamingSeparator``.

        Arguments
        ---------
        batch_size : int
            Signals side by side.

        Raises
        ------
        ValueError
            When the model is not causal.
        """
        networks = self._bare_networks()
        if not getattr(networks[1], "causal", False):
            raise ValueError(
                "this model is not causal and cannot stream: give one that is "
                "as --model; flashformer-streaming.yaml of the recipe trains "
                "one (docs/streaming.md)"
            )
        return StreamingSeparator(*networks, batch_size)

    def separate_stream(self, blocks, sample_rate=None):
        """Separate sound while it is heard.

        Arguments
        ---------
        blocks : iterable of torch.Tensor
            The sound as it comes, each [C, n] of any n, float.
        sample_rate : int, optional
            Hz, of input and output; the model's by default.

        Yields
        ------
        torch.Tensor
            The next samples of the sources, [C, m, S], CPU: once for each
            block and at the end, as many samples in all as were heard.

        Raises
        ------
        ValueError
            When the model is not causal.

        Example
        -------
        >>> from speechbrain.lobes.models.dual_path import Decoder, Encoder
        >>> from speechbrain_flashformer import FlashFormer
        >>> masknet = FlashFormer(32, d_model=64, num_layers=1, causal=True)
        >>> modules = {
        ...     "encoder": Encoder(kernel_size=16, out_channels=32),
        ...     "masknet": masknet,
        ...     "decoder": Decoder(32, 1, kernel_size=16, stride=8, bias=False),
        ... }
        >>> hparams = {"num_spks": 2, "sample_rate": 8000}
        >>> model = FlashFormerSeparation(modules, hparams)
        >>> heard = torch.randn(1, 4000).split(160, dim=1)
        >>> sum(part.shape[1] for part in model.separate_stream(heard, 16000))
        4000
        """
        rate = sample_rate or self.hparams.sample_rate
        heard = given = 0

        def _counted():
            nonlocal heard
            for block in blocks:
                heard += block.shape[1]
                # A resampler would spread what is no sound.
                yield silence_broken(block)

        for part in self._at_model_rate(_counted(), rate, self._streamed):
            part = part[:, : heard - given]
            given += part.shape[1]
            yield part

    def stream_latency(self, sample_rate=None):
        """Seconds until a sample that was heard comes out, at most.

        Those of the network and, at another rate than the model's, of
        resampling; blocks that are heard at once add their own length.
        """
        rate = self.hparams.sample_rate
        seconds = self.make_stream().latency / rate
        if sample_rate and sample_rate != rate:
            seconds += Resampler(sample_rate, rate).latency
            seconds += Resampler(rate, sample_rate).latency
        return seconds

    def _streamed(self, blocks):
        """Sources [C, m, S] of blocks [C, n] at the model's rate."""
        stream = None
        for block in blocks:
            stream = stream or self.make_stream(len(block))
            yield stream.feed(block).cpu()
        if stream:
            yield stream.flush().cpu()

    def _at_model_rate(self, blocks, rate, run):
        """Run [C, n] to [C, m, S] at the model's rate on blocks at another."""
        model_rate = self.hparams.sample_rate
        parts = run(resample_blocks(blocks, rate, model_rate))
        return _resample_sources(parts, model_rate, rate)

    # --- the way of all recordings ------------------------------------------

    def _networks(self):
        return [self.mods[name] for name in MODULES]

    def _bare_networks(self):
        """Without what ``run_opts`` wrapped around them, which hides them."""
        return [unwrapped(network) for network in self._networks()]

    def _autocast(self, precision="fp32"):
        """The precision asked for, else that of ``run_opts``."""
        dtype = PRECISIONS[precision] or PRECISIONS[self.precision]
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._weights_device.type, dtype)

    def _compile(self):
        try:
            super()._compile()
        except (RuntimeError, AttributeError) as error:
            raise ValueError(
                "run_opts: TorchScript (jit) cannot take these modules: take "
                "compile, or name those it can take in jit_module_keys"
            ) from error

    def _separated(self, reader, options):
        """Yield the sources [C, n, S] of an ``AudioReader``."""
        return self._stream(
            reader.blocks,
            reader.sample_rate,
            reader.frames,
            options,
            reader.path,
        )

    @property
    def _weights_device(self):
        # Brought elsewhere with ``to``, ``device`` is where they were loaded.
        return next(self.mods.encoder.parameters()).device

    def _stream(self, read, rate, frames, options, name):
        """Yield the sources [C, n, S] at ``rate``; ``read()`` gives blocks."""
        if options.streaming:
            self.make_stream()  # or tell why not, before the file is read
        hear = plan_hearing(read(), options.channels == "each", name)

        def _mixture():
            return map(hear, read())

        model_rate = self.hparams.sample_rate
        statistics = None
        if options.norm == "recording":
            if not takes(self.mods.masknet, "statistics"):
                network = type(unwrapped(self.mods.masknet)).__name__
                raise ValueError(
                    f"norm 'recording' is one of FlashFormer's, {network} has "
                    "none: take 'chunk'"
                )
            with torch.no_grad():
                statistics = encoder_statistics(
                    resample_blocks(_mixture(), rate, model_rate),
                    self.mods.encoder,
                )

        def _in_chunks(blocks):
            return separate_long(
                blocks,
                self._forward(options, statistics),
                model_rate,
                self._plan(options),
                self.hparams.num_spks,
            )

        blocks = _mixture()
        if options.mixture_consistency:
            blocks = _Kept(blocks)
        run = self._streamed if options.streaming else _in_chunks
        parts = self._at_model_rate(blocks, rate, run)
        seconds = frames / rate
        with tqdm(
            total=round(seconds, 1),
            unit="s",
            disable=not options.progress,
            dynamic_ncols=True,
        ) as bar:
            done = 0
            for part in parts:
                part = part[:, : frames - done]
                done += part.shape[1]
                if options.mixture_consistency:
                    rest = blocks.take(part.shape[1]) - part.sum(2)
                    part = part + rest[:, :, None] / part.shape[2]
                yield part
                bar.update(part.shape[1] / rate)
                if options.callback:
                    options.callback(done / rate, seconds)

    def _plan(self, options):
        """Chunks in samples, as many at once as fit the memory."""
        rate = self.hparams.sample_rate
        encoder, masknet, _ = self._bare_networks()
        _, stride = encoder_frame(encoder)
        align = stride * getattr(masknet, "token_stride", 1)
        chunk, overlap = (
            round(options.chunk * rate),
            round(options.overlap * rate),
        )
        # Masks, their products and a few tensors at the frame rate.
        channels = next(encoder.parameters()).shape[0]
        per_frame = 4 * channels * (2 * self.hparams.num_spks + 4)
        megabytes = chunk / stride * per_frame / 1e6
        batch = 1
        # On a CPU one chunk fills all cores.
        if self._weights_device.type != "cpu":
            batch = max(1, int(options.memory / megabytes))
        return ChunkPlan(chunk, overlap, align, batch)

    def _forward(self, options, statistics):
        """The network as [B, T] -> [B, T, S] on the CPU."""
        device = self._weights_device

        @torch.no_grad()
        def _forward(chunks):
            chunks = chunks.to(device)
            given = statistics
            if given is not None:
                times = len(chunks) // len(given[0])
                given = tuple(value.repeat(times) for value in given)
            with self._autocast(options.precision):
                sources = separate(chunks, *self._networks(), statistics=given)
            sources = sources.float().cpu()
            if not sources.isfinite().all():
                raise ValueError(
                    "the model gives no finite numbers for this recording: is "
                    f"it far too loud, or {options.precision} too narrow?"
                )
            return sources

        return _forward


class _Kept:
    """Blocks [C, n] that are kept until they are taken again."""

    def __init__(self, blocks):
        self.blocks, self.kept = blocks, []

    def __iter__(self):
        for block in self.blocks:
            self.kept.append(block)
            yield block

    def take(self, samples):
        """The first samples not taken yet, [C, samples]."""
        kept = torch.cat(self.kept, 1)
        self.kept = [kept[:, samples:]]
        return kept[:, :samples]


def _resample_sources(parts, old, new):
    """Resample parts [C, n, S]."""
    if old == new:
        yield from parts
        return
    shape = []

    def _rows():
        for part in parts:
            shape[:] = part.shape[0], part.shape[2]
            yield part.transpose(1, 2).flatten(0, 1)  # [C S, n]

    for block in resample_blocks(_rows(), old, new):
        yield block.unflatten(0, shape).transpose(1, 2)


def _as_float(audio):
    """An array or tensor [T] or [C, T] as float32 [C, T]."""
    if isinstance(audio, np.ndarray):
        native = audio.dtype.newbyteorder("=")
        audio = torch.from_numpy(np.ascontiguousarray(audio, native))
    if audio.ndim not in (1, 2) or not audio.numel():
        raise ValueError(
            f"audio is [time] or [channels, time], got {tuple(audio.shape)}"
        )
    rows, columns = audio.shape if audio.ndim == 2 else (1, audio.shape[0])
    if rows > columns and (columns > 1 or rows > MOST_CHANNELS):
        raise ValueError(
            f"audio is [channels, time], got {tuple(audio.shape)}: transpose it"
        )
    if audio.dtype in (torch.int16, torch.int32):
        audio = audio / -torch.iinfo(audio.dtype).min
    elif not audio.is_floating_point():
        raise ValueError(f"audio is float, int16 or int32, got {audio.dtype}")
    return audio.detach().float().cpu().reshape(-1, audio.shape[-1])


def _local(path, savedir):
    """A file on this machine, fetched when the path is a URL."""
    if "://" not in str(path):
        return path
    if savedir is None:
        raise ValueError(f"give a savedir for {path}, to keep the file in")
    source, name = str(path).rsplit("/", 1)
    return fetch(
        name,
        source=source,
        savedir=savedir,
        local_strategy=LocalStrategy.SYMLINK,
        fetch_config=FetchConfig(overwrite=True),
    )
