"""Data sets of a separation recipe, from CSV files.

The mixtures of an epoch, their order and their excerpts depend only on the seed
and the number of the epoch. They do not depend on the number of workers or
processes, and a resumed training gets the same ones.

All functions are at module level, so that data workers can pickle them
(Windows and macOS spawn workers).
"""

import codecs
import csv
import io
from functools import partial
from pathlib import Path

import numpy as np
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataio import load_data_csv, read_audio
from speechbrain.dataio.dataset import DynamicItemDataset, set_output_keys
from speechbrain.dataio.sampler import DynamicBatchSampler
from torch.utils.data import Sampler


def read_table(path):
    """Read a CSV file, in any of the forms that spreadsheets save.

    Arguments
    ---------
    path : str or Path
        CSV file in UTF-8, or in UTF-16 with a byte order mark, with any line
        endings.

    Returns
    -------
    tuple
        List of the column names, and a dict from line number to row (a dict).

    Raises
    ------
    ValueError
        If the encoding is another one or the file is not CSV; names the file.

    Example
    -------
    >>> path = getfixture("tmp_path") / "list.csv"
    >>> _ = path.write_bytes(b"ID,wav\\ra,a.wav\\r")
    >>> read_table(path)
    (['ID', 'wav'], {2: {'ID': 'a', 'wav': 'a.wav'}})
    """
    raw = Path(path).read_bytes()
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        text = raw.decode("utf-16" if raw.startswith(marks) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: save it as CSV in UTF-8"
        ) from error
    rows = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        lines = {}
        for row in rows:
            lines[rows.line_num] = row
        return list(rows.fieldnames or ()), lines
    except csv.Error as error:
        raise ValueError(
            f"{path} is not valid CSV at line {rows.reader.line_num} "
            f"({error}): save it as CSV again"
        ) from error


def dataio_prep(hparams):
    """Build the training, validation and test sets.

    Arguments
    ---------
    hparams : dict
        Uses ``train_data``, ``valid_data``, ``test_data`` (CSV files with the
        columns ID, duration, mix_wav, s1_wav, s2_wav, ...), ``data_folder``,
        ``num_spks``, ``sample_rate``, ``seed``,
        ``limit_training_signal_len`` and ``training_signal_len`` (samples).

    Returns
    -------
    tuple of EpochDataset
        Items have ``id``, ``mix_sig`` and ``s1_sig`` to ``sS_sig``, each [T].

    Raises
    ------
    ValueError
        If a CSV file has no rows.
    """
    crop = None
    if hparams["limit_training_signal_len"]:
        crop = hparams["training_signal_len"]
    return (
        load_dataset(hparams["train_data"], hparams, crop),
        load_dataset(hparams["valid_data"], hparams),
        load_dataset(hparams["test_data"], hparams),
    )


class EpochDataset(DynamicItemDataset):
    """A data set whose items may differ from epoch to epoch.

    Index n is item n % len in epoch n // len. The pipeline gets n as
    ``number``.
    """

    def __getitem__(self, index):
        data_id = self.data_ids[index % len(self)]
        return self.pipeline.compute_outputs(
            {"id": data_id, "number": index, **self.data[data_id]}
        )

    def __iter__(self):
        return (self[index] for index in range(len(self)))


def load_dataset(csv_file, hparams, crop=None):
    """Build one data set.

    Arguments
    ---------
    csv_file : str or Path
        With the columns of ``dataio_prep``.
    hparams : dict
        Uses ``data_folder``, ``num_spks``, ``sample_rate`` and ``seed``.
    crop : int, optional
        Maximum length in samples; longer items become random excerpts.

    Returns
    -------
    EpochDataset
        Items as in ``dataio_prep``.

    Raises
    ------
    ValueError
        If the CSV file has no rows.
    """
    places = {"data_root": hparams["data_folder"]}
    data = load_data_csv(csv_file, places)
    if not data:
        raise ValueError(f"{csv_file} has no rows: prepare the data again")
    dataset = EpochDataset(data)
    dataset.pipeline.add_static_keys(["number"])
    cut = partial(
        choose_cut,
        crop=crop,
        sample_rate=hparams["sample_rate"],
        seed=hparams["seed"],
    )
    dataset.add_dynamic_item(cut, takes=["duration", "number"], provides="cut")
    signals = ["mix"] + [f"s{i + 1}" for i in range(hparams["num_spks"])]
    for name in signals:
        dataset.add_dynamic_item(
            read_cut, takes=[f"{name}_wav", "cut"], provides=f"{name}_sig"
        )
    set_output_keys([dataset], ["id"] + [f"{name}_sig" for name in signals])
    return dataset


def choose_cut(duration, number, crop, sample_rate, seed):
    """Choose the excerpt of an item.

    Arguments
    ---------
    duration : str or float
        Seconds.
    number : int
        Index of ``EpochDataset``, which determines the excerpt.
    crop : int or None
        Maximum length in samples.
    sample_rate : int
        Hz.
    seed : int
        Seed of the training.

    Returns
    -------
    tuple of int
        Start and stop, in samples.

    Example
    -------
    >>> start, stop = choose_cut("2.0", 7, 8000, sample_rate=8000, seed=1)
    >>> stop - start
    8000
    """
    samples = round(float(duration) * sample_rate)
    if crop is None or samples <= crop:
        return 0, samples
    rng = np.random.default_rng([seed, number])
    start = int(rng.integers(samples - crop + 1))
    return start, start + crop


def read_cut(file, cut):
    """Read samples ``cut = (start, stop)`` of a mono file; returns [T]."""
    return read_audio({"file": file, "start": cut[0], "stop": cut[1]})


class EpochSampler(Sampler):
    """Samples indices that are unique to an epoch: e * size + i in epoch e.

    Arguments
    ---------
    size : int
        Items per epoch.
    shuffle : bool
        Whether to shuffle each epoch.
    seed : int
        Seed of the shuffling.
    batches : Sampler, optional
        Yields lists of indices below ``size`` and has ``set_epoch``, such as
        SpeechBrain's ``DynamicBatchSampler``. The indices are shifted to the
        epoch.

    Example
    -------
    >>> sampler = EpochSampler(3)
    >>> sampler.set_epoch(2)
    >>> list(sampler)
    [6, 7, 8]
    """

    def __init__(self, size, shuffle=False, seed=0, batches=None):
        self.size, self.shuffle, self.seed = size, shuffle, seed
        self.batches, self.epoch = batches, 0

    def set_epoch(self, epoch):
        """Set the number of the next epoch; SpeechBrain calls this."""
        self.epoch = epoch
        if self.batches is not None:
            self.batches.set_epoch(epoch)

    def __iter__(self):
        first = self.epoch * self.size
        if self.batches is not None:
            return iter([[first + i for i in b] for b in self.batches])
        if not self.shuffle:
            return iter(range(first, first + self.size))
        rng = np.random.default_rng([self.seed, self.epoch])
        return iter((first + rng.permutation(self.size)).tolist())

    def __len__(self):
        return self.size if self.batches is None else len(self.batches)


def training_loader_options(hparams, dataset, size):
    """Options of the training ``DataLoader``, from the settings of a recipe.

    Arguments
    ---------
    hparams : dict
        Uses ``dataloader_opts`` (its ``shuffle`` becomes a sampler),
        ``dynamic_mixing``, ``dynamic_batching``, ``seed``, and for dynamic
        batching ``max_batch_length`` (seconds), ``num_buckets``,
        ``sample_rate``, ``limit_training_signal_len`` and
        ``training_signal_len``.
    dataset : EpochDataset
        Training set from ``dataio_prep``.
    size : int
        Items per epoch.

    Returns
    -------
    dict
        Keyword arguments of a ``DataLoader``.

    Raises
    ------
    ValueError
        If dynamic batching and dynamic mixing are both on.
    """
    options = {**hparams["dataloader_opts"], "collate_fn": PaddedBatch}
    shuffle = options.pop("shuffle", False) and not hparams["dynamic_mixing"]
    seed = hparams["seed"]
    if not hparams["dynamic_batching"]:
        return options | {"sampler": EpochSampler(size, shuffle, seed)}
    if hparams["dynamic_mixing"]:
        raise ValueError(
            "dynamic_batching groups recordings of like length, and dynamic "
            "mixing cuts its own: set one of them to False"
        )
    longest = float("inf")
    if hparams["limit_training_signal_len"]:
        longest = hparams["training_signal_len"] / hparams["sample_rate"]
    seconds = [
        min(float(item["duration"]), longest) for item in dataset.data.values()
    ]
    batches = DynamicBatchSampler(
        dataset,
        max_batch_length=hparams["max_batch_length"],
        num_buckets=hparams["num_buckets"],
        lengths_list=seconds,
        # Shuffled examples would change the number of batches per epoch, and a
        # distributed sampler would not notice. Only batches are shuffled.
        shuffle=False,
        batch_ordering="random" if shuffle else "ascending",
        seed=seed,
    )
    for name in ("batch_size", "drop_last"):
        options.pop(name, None)
    return options | {"batch_sampler": EpochSampler(size, batches=batches)}
