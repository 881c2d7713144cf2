"""Scores of a test, computed in threads and written in the order of the test.

Axes: B batch, T samples, S speakers.
"""

import csv
import hashlib
import math
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch

from speechbrain_flashformer.inference.files import written_beside
from speechbrain_flashformer.training.metrics import (
    best_order,
    padding_mask,
    perceptual,
    reorder,
    sdr,
    si_snr,
)

# The summary rows at the end of a table.
SUMMARY = {
    "avg": np.mean,
    "median": np.median,
    "5th percentile": partial(np.percentile, q=5),
}
COLUMNS = ["snt_id", "sdr", "sdr_i", "si-snr", "si-snr_i"]
WORST = 5  # number of worst mixtures whose audio is saved
# Folders for the audio of the first and of the worst mixtures of a test.
AUDIO_FOLDERS = ("audio_results", "audio_worst")
# Suffix of the outputs of a test that is still running.
RUNNING = ".running"
# Characters that some file system forbids in names. Maximum length of a stem in
# bytes, which leaves room for the suffixes below on every file system.
NOT_IN_NAMES, LONGEST_NAME = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]'), 200
# Maximum number of mixtures per thread that wait for a score (bounds memory).
WAITING = 4


def quick_scores(names, mixture, targets, predictions, lengths):
    """Compute the scores of a batch that validation needs.

    Arguments
    ---------
    names : list of str
        Names of the B mixtures.
    mixture : torch.Tensor
        [B, T].
    targets, predictions : torch.Tensor
        [B, T, S], predictions in any order of speakers.
    lengths : torch.Tensor
        Relative lengths, [B].

    Returns
    -------
    tuple
        Two lists with one entry per mixture. Rows are dicts with ``snt_id``,
        ``si-snr`` and ``si-snr_i`` in dB, ``level_db`` (level of the estimates
        relative to the targets) and ``polarity`` (-1 if the estimates are
        inverted). Signals are mixture [T], targets [S, T] and estimates [S, T]
        in the order of the targets, without padding.

    Raises
    ------
    ValueError
        If targets and predictions have different shapes.

    Example
    -------
    >>> targets = torch.randn(1, 100, 2)
    >>> mixture, lengths = targets.sum(2), torch.ones(1)
    >>> rows, _ = quick_scores(["a"], mixture, targets, -targets, lengths)
    >>> rows[0]["polarity"]
    -1.0
    """
    scores, order = best_order(targets, predictions, lengths)
    predictions = reorder(predictions, order)
    mixtures = mixture.unsqueeze(2).expand_as(targets)
    gains = scores - si_snr(targets, mixtures, lengths)
    mask = padding_mask(targets, lengths)
    clean, separated = targets * mask, predictions * mask
    power = separated.square().sum(1) / clean.square().sum(1)
    columns = {
        "si-snr": scores.mean(1),
        "si-snr_i": gains.mean(1),
        "level_db": 10 * torch.log10(power).mean(1),
        "polarity": (clean * separated).sum((1, 2)).sign(),
    }
    # One transfer, so that a GPU synchronizes once.
    values = torch.stack([mask.sum((1, 2)), *columns.values()], 1).tolist()
    rows, signals = [], []
    for b, (name, (samples, *numbers)) in enumerate(zip(names, values)):
        rows.append({"snt_id": name, **dict(zip(columns, numbers))})
        n = int(samples)
        parts = (x[b, :n].T for x in (targets, predictions))
        signals.append((mixture[b, :n], *parts))
    return rows, signals


class ResultsWriter:
    """Computes the slow scores in threads; writes the rows in order of ``add``.

    Arguments
    ---------
    path : str or Path
        CSV file of the growing table.
    sample_rate : int
        Hz.
    more : list of str
        Metrics besides SDR: ``pesq``, ``stoi``.
    """

    def __init__(self, path, sample_rate, more=()):
        self.path, self.sample_rate = path, sample_rate
        self.more = list(more)
        self.rows, self.worst, self.waiting = [], [], []
        self.file = open(path, "w", newline="", encoding="utf-8")
        self.table = csv.DictWriter(
            self.file, COLUMNS + self.more, extrasaction="ignore"
        )
        self.table.writeheader()
        # As many threads as torch may use. Each runs torch single-threaded:
        # otherwise torch would start as many threads again in each of them.
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(
            self.threads, initializer=torch.set_num_threads, initargs=(1,)
        )

    def add(self, row, mixture, targets, predictions):
        """Start scoring one mixture.

        Arguments
        ---------
        row : dict
            From ``quick_scores``.
        mixture : torch.Tensor
            [T], on any device.
        targets, predictions : torch.Tensor
            [S, T], in the same order, on any device.

        Raises
        ------
        RuntimeError
            If an earlier mixture cannot be scored; names it.
        """
        signals = [x.cpu() for x in (mixture, targets, predictions)]
        self.worst.append((row, signals))
        self.worst.sort(key=lambda item: sort_key(item[0]))
        del self.worst[WORST:]
        score = self.pool.submit(self._score, row, *signals)
        self.waiting.append((row["snt_id"], score))
        while len(self.waiting) > WAITING * self.threads:
            self._take()

    def close(self):
        """Wait for the remaining scores.

        Returns
        -------
        list of dict
            All rows.

        Raises
        ------
        RuntimeError
            If a mixture cannot be scored; names it.
        """
        while self.waiting:
            self._take()
        self.pool.shutdown()
        self.file.close()
        return self.rows

    def _score(self, row, mixture, targets, predictions):
        both = torch.stack([predictions, mixture.expand_as(targets)])
        after, before = sdr(targets, both).mean(1).tolist()
        row = {**row, "sdr": after, "sdr_i": after - before}
        for name in self.more:
            values = perceptual(name, targets, predictions, self.sample_rate)
            row[name] = float(np.mean(values))
        return row

    def _take(self):
        name, score = self.waiting.pop(0)
        try:
            row = score.result()
        except Exception as error:
            self.pool.shutdown(cancel_futures=True)
            raise RuntimeError(f"cannot score {name}: {error}") from error
        self.rows.append(row)
        self.table.writerow(row)
        self.file.flush()


def sort_key(row):
    """Sort key of a row, worst first: NaN, then by rising SI-SNRi."""
    return (not math.isnan(row["si-snr_i"]), row["si-snr_i"])


def write_results(path, rows, more=()):
    """Write the complete table: rows sorted by name, then the summary.

    Arguments
    ---------
    path : str or Path
        CSV file, written under a temporary name and renamed.
    rows : list of dict
        At least one.
    more : list of str
        Metrics besides ``COLUMNS``.

    Returns
    -------
    dict
        Summary rows ``avg``, ``median`` and ``5th percentile``. For ``more``
        they skip NaN, which marks a mixture with too little speech.
    """
    columns = COLUMNS + list(more)
    summary = {
        kind: {"snt_id": kind}
        | {c: float(f(_values(rows, c, c in more))) for c in columns[1:]}
        for kind, f in SUMMARY.items()
    }
    with (
        written_beside(path) as beside,
        beside.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["snt_id"]))
        writer.writerows(summary.values())
    return summary


def _values(rows, column, only_numbers):
    values = np.array([row[column] for row in rows])
    if only_numbers and not np.isnan(values).all():
        values = values[~np.isnan(values)]
    return values


def file_stem(name):
    """File name of a mixture, without suffix.

    Arguments
    ---------
    name : str
        Name of the mixture.

    Returns
    -------
    str
        The name. If a file system could reject it, forbidden characters are
        replaced, it is shortened and gets a hash.

    Example
    -------
    >>> file_stem("take [1] 100 %"), file_stem("a/b")
    ('take [1] 100 %', 'a_b-c14cddc0')
    """
    stem = NOT_IN_NAMES.sub("_", name).encode()[:LONGEST_NAME]
    stem = stem.decode(errors="ignore")
    if stem == name:
        return name
    # The hash separates names that differ only in the removed characters.
    return f"{stem}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def write_example(folder, name, mixture, targets, predictions, sample_rate):
    """Write NAME_mix.wav, and NAME_s1.wav and NAME_s1hat.wav of each source.

    NAME is ``file_stem(name)``. Estimates get the level and polarity of their
    sources, because training with SI-SNR fixes neither, and a quiet or clipped
    file is of no use.

    Arguments
    ---------
    folder : str or Path
        Created if it does not exist.
    name : str
        Name of the mixture.
    mixture : torch.Tensor
        [T].
    targets, predictions : torch.Tensor
        [S, T], in the same order.
    sample_rate : int
        Hz.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    signals = {"mix": mixture}
    for i, (target, estimate) in enumerate(zip(targets, predictions), 1):
        gain = target.norm() / estimate.norm().clamp(min=1e-8)
        if target @ estimate < 0:
            gain = -gain
        signals[f"s{i}"] = target
        signals[f"s{i}hat"] = estimate * gain
    # One gain for all signals, so that their levels stay comparable.
    peak = max(signal.abs().max().item() for signal in signals.values())
    scale = min(1.0, 0.99 / max(peak, 1e-8))
    for suffix, signal in signals.items():
        soundfile.write(
            folder / f"{file_stem(name)}_{suffix}.wav",
            (signal * scale).cpu().numpy(),
            sample_rate,
        )


def remove_running(folder):
    """Remove the files of an unfinished test.

    Arguments
    ---------
    folder : str or Path
        Output folder of the training.
    """
    for path in Path(folder).glob(f"*{RUNNING}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def replace_audio(folder):
    """Replace the audio of an earlier test by that of the finished test.

    If the finished test saved no audio, the existing audio remains.

    Arguments
    ---------
    folder : str or Path
        Output folder of the training.
    """
    for name in AUDIO_FOLDERS:
        old, new = Path(folder, name), Path(folder, name + RUNNING)
        if new.exists():
            if old.exists():
                old.rename(old.with_name(f"{name}.old{RUNNING}"))
            new.rename(old)
    remove_running(folder)
