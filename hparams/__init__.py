"""One yaml per model size; installed as speechbrain_flashformer.hparams."""
