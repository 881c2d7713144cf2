"""From CSV files to data sets: what a separation recipe reads.

Every function here stands at module level, so that data workers start with
any method (Windows and macOS spawn them).
"""

from functools import partial

import torch
from speechbrain.dataio.dataio import read_audio
from speechbrain.dataio.dataset import DynamicItemDataset, set_output_keys


def load_datasets(hparams):
    """Build the training, validation and test sets.

    Arguments
    ---------
    hparams : dict
        Reads ``train_data``, ``valid_data``, ``test_data`` (CSV files with the
        columns ID, duration, mix_wav, s1_wav, s2_wav, ...), ``num_spks``,
        ``sample_rate``, ``limit_training_signal_len`` and
        ``training_signal_len`` (samples).

    Returns
    -------
    tuple of DynamicItemDataset
        Items have ``id``, ``mix_sig`` and ``s1_sig`` to ``sS_sig``, each [T].
    """
    crop = None
    if hparams["limit_training_signal_len"]:
        crop = hparams["training_signal_len"]
    return (
        load_dataset(hparams["train_data"], hparams, crop),
        load_dataset(hparams["valid_data"], hparams),
        load_dataset(hparams["test_data"], hparams),
    )


def load_dataset(csv_file, hparams, crop=None):
    """Build one set; with ``crop``, items are random cuts of that length."""
    dataset = DynamicItemDataset.from_csv(
        csv_file, replacements={"data_root": hparams["data_folder"]}
    )
    dataset.add_dynamic_item(
        partial(choose_cut, crop=crop, sample_rate=hparams["sample_rate"]),
        takes="duration",
        provides="cut",
    )
    signals = ["mix"] + [f"s{i + 1}" for i in range(hparams["num_spks"])]
    for name in signals:
        dataset.add_dynamic_item(
            read_cut, takes=[f"{name}_wav", "cut"], provides=f"{name}_sig"
        )
    set_output_keys([dataset], ["id"] + [f"{name}_sig" for name in signals])
    return dataset


def choose_cut(duration, crop, sample_rate):
    """Pick where a cut begins: (start, stop) in samples.

    Example
    -------
    >>> start, stop = choose_cut("2.0", crop=8000, sample_rate=8000)
    >>> stop - start
    8000
    """
    samples = round(float(duration) * sample_rate)
    if crop is None or samples <= crop:
        return 0, samples
    start = torch.randint(samples - crop + 1, ()).item()
    return start, start + crop


def read_cut(file, cut):
    """Read samples ``cut = (start, stop)`` of a mono file, [T]."""
    return read_audio({"file": file, "start": cut[0], "stop": cut[1]})
