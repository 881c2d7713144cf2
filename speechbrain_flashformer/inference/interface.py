"""SpeechBrain's interface to load and run a separation model."""

from speechbrain.inference.separation import SepformerSeparation
from speechbrain.utils.fetching import LocalStrategy

from speechbrain_flashformer.inference.models import load_model
from speechbrain_flashformer.inference.recordings import Recordings


class FlashFormerSeparation(Recordings, SepformerSeparation):
    """A pretrained model that separates recordings of any length and rate.

    It has the methods of ``SepformerSeparation`` and more. Methods that read a
    recording take the fields of ``SeparationOptions`` as keyword arguments.
    Outputs keep the level that the model gives them. They are not normalized
    unless you ask for it.

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
            model on the Hugging Face hub.
        hparams_file : str
            Name of the yaml file in the model folder.
        overrides : dict or str, optional
            Values that replace those of the yaml.
        overrides_must_match : bool
            Whether an override of a key that the yaml does not have is an
            error.
        savedir : str or Path, optional
            Folder for links to, or copies of, the files of a model on the hub.
            It has no effect for a local folder, whose files are used in place.
        download_only : bool
            Fetch the files and return None.
        local_strategy : LocalStrategy
            Whether savedir holds links or copies.
        fetch_config : FetchConfig, optional
            Passed to SpeechBrain's ``fetch``.
        trust : bool
            Whether the yaml of the model may call any code. By default it may
            only contain what ``flashformer pack`` writes.
        **kwargs
            Passed to SpeechBrain's ``Pretrained``: ``run_opts``,
            ``freeze_params``.

        Returns
        -------
        FlashFormerSeparation or None
            None with download_only.

        Raises
        ------
        OSError
            When a file is missing or cannot be read.
        ValueError
            When a file is broken, does not match the others, or needs
            ``trust``.

        Example
        -------
        >>> import torch
        >>> from speechbrain_flashformer.inference import built_in_model
        >>> model = FlashFormerSeparation.from_hparams(built_in_model())
        >>> model.separate_batch(torch.zeros(1, 8000)).shape
        torch.Size([1, 8000, 2])
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
