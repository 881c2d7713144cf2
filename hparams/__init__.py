"""The models, one yaml each; shipped as speechbrain_flashformer.hparams."""
