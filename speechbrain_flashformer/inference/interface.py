"""SpeechBrain's way to load and run a model."""

from speechbrain.inference.separation import SepformerSeparation
from speechbrain.utils.fetching import LocalStrategy

from speechbrain_flashformer.inference.models import load_model
from speechbrain_flashformer.inference.recordings import Recordings


class FlashFormerSeparation(Recordings, SepformerSeparation):
    """A ready-to-use model: SpeechBrain's interface, made for recordings.

    The calls are those of ``SepformerSeparation``. Each takes the fields of
    ``SeparationOptions`` as keyword arguments. Outputs have the level that the
    model gives them: they are never brought to full scale unasked.

    Example
    -------
    >>> import torch
    >>> from speechbrain.lobes.models.dual_path import Decoder, Encoder
    >>> from speechbrain_flashformer import FlashFormer
    >>> modules = {
    ...     "encoder": Encoder(kernel_size=16, out_channels=32),
    ...     "masknet": FlashFormer(in_channels=32, d_model=48, num_layers=1),
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

    def _compile(self):
        try:
            super()._compile()
        except (RuntimeError, AttributeError) as error:
            raise ValueError(
                "run_opts: TorchScript (jit) cannot take these modules: take "
                "compile, or name those it can take in jit_module_keys"
            ) from error
