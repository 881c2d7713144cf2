"""Scores of a test: computed beside the network, written as they come.

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

# The last rows of a table, which sum it up.
SUMMARY = {
    "avg": np.mean,
    "median": np.median,
    "5th percentile": partial(np.percentile, q=5),
}
COLUMNS = ["snt_id", "sdr", "sdr_i", "si-snr", "si-snr_i"]
WORST = 5
# Audio of the first and of the worst mixtures of a test.
AUDIO_FOLDERS = ("audio_results", "audio_worst")
# Suffix of the outputs of a test that is still running.
RUNNING = ".running"
# What some file system has in no name, and the longest that all can have with
# what is put behind it, bytes.
NOT_IN_NAMES, LONGEST_NAME = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]'), 200
# Mixtures waiting for a score, per thread: what bounds the memory.
WAITING = 4


def quick_scores(names, mixture, targets, predictions, lengths):
    """What every validation needs, of each item of a batch.

    Arguments
    ---------
    names : list of str
        B of them.
    mixture : torch.Tensor
        [B, T].
    targets, predictions : torch.Tensor
        [B, T, S], in any order of speakers.
    lengths : torch.Tensor
        Relative, [B].

    Returns
    -------
    tuple
        Rows (dict) with ``snt_id``, ``si-snr``, ``si-snr_i`` in dB,
        ``level_db``, how much louder the estimates are, and ``polarity``, -1
        where theirs is inverted; and for each item its signals (mixture
        [T], targets [S, T], estimates [S, T] in the order of the targets), cut
        to length.
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
    # The device is waited for once.
    values = torch.stack([mask.sum((1, 2)), *columns.values()], 1).tolist()
    rows, signals = [], []
    for b, (name, (samples, *numbers)) in enumerate(zip(names, values)):
        rows.append({"snt_id": name, **dict(zip(columns, numbers))})
        n = int(samples)
        parts = (x[b, :n].T for x in (targets, predictions))
        signals.append((mixture[b, :n], *parts))
    return rows, signals


class ResultsWriter:
    """Adds the slow scores in threads, and writes each row when it is there.

    Arguments
    ---------
    path : str or Path
        Of the table that grows: CSV.
    sample_rate : int
        Hz.
    more : list of str
        Measures beside SDR: ``pesq``, ``stoi``.
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
        # As many as torch may use, each without a team of its own: torch
        # would give every one of them as many again.
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(
            self.threads, initializer=torch.set_num_threads, initargs=(1,)
        )

    def add(self, row, mixture, targets, predictions):
        """Score one mixture: [T], [S, T] and [S, T], any device."""
        signals = [x.cpu() for x in (mixture, targets, predictions)]
        self.worst.append((row, signals))
        self.worst.sort(key=lambda item: sort_key(item[0]))
        del self.worst[WORST:]
        score = self.pool.submit(self._score, row, *signals)
        self.waiting.append((row["snt_id"], score))
        while len(self.waiting) > WAITING * self.threads:
            self._take()

    def close(self):
        """Wait for what is left; the rows."""
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
    """Sorts rows from the worst: no number, then the lowest SI-SNRi."""
    return (not math.isnan(row["si-snr_i"]), row["si-snr_i"])


def write_results(path, rows, more=()):
    """Write the finished table: rows by name, then what sums them up.

    Arguments
    ---------
    path : str or Path
        Written beside and renamed.
    rows : list of dict
        At least one.
    more : list of str
        Measures beside ``COLUMNS``.

    Returns
    -------
    dict
        ``avg``, ``median`` and ``5th percentile``: row of each. Of ``more``
        they pass over what is no number: where there was too little speech.
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
    """What the files of a mixture are called; mostly its name.

    Example
    -------
    >>> file_stem("take [1] 100 %"), file_stem("a/b")
    ('take [1] 100 %', 'a_b-c14cddc0')
    """
    stem = NOT_IN_NAMES.sub("_", name).encode()[:LONGEST_NAME]
    stem = stem.decode(errors="ignore")
    if stem == name:
        return name
    # Else two that differ in what was left out would have one file.
    return f"{stem}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def write_example(folder, name, mixture, targets, predictions, sample_rate):
    """Write NAME_mix.wav, and NAME_s1.wav and NAME_s1hat.wav of each source.

    NAME is ``file_stem(name)``.

    Estimates are brought to the level and polarity of their source: SI-SNR
    training leaves both free, and a quiet or clipped file tells nothing.

    Arguments
    ---------
    folder : str or Path
        Made when it is not there.
    name : str
        Of the mixture.
    mixture : torch.Tensor
        [T].
    targets, predictions : torch.Tensor
        [S, T].
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
    # One gain for all, so that they stay comparable.
    peak = max(signal.abs().max().item() for signal in signals.values())
    scale = min(1.0, 0.99 / max(peak, 1e-8))
    for suffix, signal in signals.items():
        soundfile.write(
            folder / f"{file_stem(name)}_{suffix}.wav",
            (signal * scale).cpu().numpy(),
            sample_rate,
        )


def remove_running(folder):
    """Remove what a test that did not end has left in an output folder."""
    for path in Path(folder).glob(f"*{RUNNING}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def replace_audio(folder):
    """Put the audio of a test that has ended in place of the one before.

    A test that saved none leaves what there is.
    """
    for name in AUDIO_FOLDERS:
        old, new = Path(folder, name), Path(folder, name + RUNNING)
        if new.exists():
            if old.exists():
                old.rename(old.with_name(f"{name}.old{RUNNING}"))
            new.rename(old)
    remove_running(folder)
