"""Dynamic mixing: an endless set of mixtures of single-speaker recordings.

Mixture ``n`` depends only on the seed and on ``n``. It does not depend on the
number of workers or processes, and no mixture repeats in a training. Levels
follow WSJ0-mix.

Axes: S speakers, T samples.
"""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from speechbrain_flashformer.training.levels import level_db
from speechbrain_flashformer.training.losses import is_defined_for_silence
from speechbrain_flashformer.training.recordings import (
    RecordingReader,
    find_recordings,
)
from speechbrain_flashformer.training.turns import Absence

# WSJ0-mix: level of the first speaker, and of the others relative to it (normal
# distributions: mean and standard deviation in dB), limits of levels, and peak.
FIRST_LEVEL_DB = (-27.43, 2.57)
RELATIVE_LEVEL_DB = (-2.51, 2.66)
LEVEL_LIMITS_DB = (-45.0, 0.0)
PEAK = 0.9

# A cut below this level is a pause, and another cut of the speaker is drawn.
SILENCE_DB = -60.0
TRIES = 100

# Maximum pause between two recordings of a concatenation, in seconds.
LONGEST_PAUSE = 1.0


def dynamic_mix_data_prep(hparams):
    """Build the training set of dynamic mixing.

    Arguments
    ---------
    hparams : dict
        Uses ``base_folder_dm``, ``dm_speaker``, ``num_spks``,
        ``sample_rate``, ``training_signal_len``, ``seed``,
        ``use_speedperturb``, ``speed_changes`` (its minimum and maximum),
        ``dm_same_corpus_share``, ``dm_concatenation_share``, ``dm_effects`` (a
        dict with any keys) and ``loss``.

    Returns
    -------
    DynamicMixtures
        The training set.

    Raises
    ------
    FileNotFoundError
        If ``base_folder_dm`` has no recordings.
    ValueError
        If ``base_folder_dm`` is empty, an effect makes sources silent and the
        loss is not defined for silence, a folder of noise is not used, or as
        ``find_recordings`` and ``DynamicMixtures``.
    """
    if not hparams["base_folder_dm"]:
        raise ValueError(
            "dynamic_mixing needs single-speaker recordings: give their "
            "folder as base_folder_dm"
        )
    effects = list(hparams["dm_effects"].values())
    silent = any(isinstance(x, Absence) and x.share for x in effects)
    if silent and not is_defined_for_silence(hparams["loss"]):
        raise ValueError(
            "the effect Absence needs a loss that is defined for silence: "
            "speechbrain_flashformer.training.losses.pit_snr_loss or "
            "pit_mixed_loss"
        )
    for effect in effects:
        if getattr(effect, "folder", "") and not effect.share:
            raise ValueError(
                f"the noise in {effect.folder} is not used, because the share "
                "of noise is 0: set it (--dm_effects '{noise: {share: 0.5}}')"
            )
    speeds = (100, 100)
    if hparams["use_speedperturb"]:
        speeds = (min(hparams["speed_changes"]), max(hparams["speed_changes"]))
    return DynamicMixtures(
        find_recordings(hparams["base_folder_dm"], hparams["dm_speaker"]),
        hparams["num_spks"],
        hparams["sample_rate"],
        hparams["training_signal_len"],
        hparams["seed"],
        speeds,
        hparams["dm_same_corpus_share"],
        hparams["dm_concatenation_share"],
        effects,
    )


class DynamicMixtures(Dataset):
    """An endless training set of mixtures made on the fly.

    All speakers are equally likely, no matter how much speech each has. The
    recordings of a speaker are drawn in proportion to their duration. A mixture
    is as long as its longest source; shorter sources have a random position in
    it.

    Arguments
    ---------
    recordings : list of Recording
        As from ``find_recordings``; mono, any sampling rate.
    num_spks : int
        S, different speakers in a mixture.
    sample_rate : int
        Sampling rate of the mixtures, Hz.
    samples : int
        Maximum length of a mixture.
    seed : int
        The same seed gives the same mixtures.
    speeds : tuple of int
        Minimum and maximum speed in percent; it changes pitch and formants too.
    same_corpus_share : float
        Share of the mixtures whose speakers are all from one corpus, if it has
        enough speakers. Otherwise the network could tell speakers apart by
        their microphones.
    concatenation_share : float
        Share of the mixtures in which each source fills all of ``samples``:
        recordings of the speaker one after another, with pauses.
    effects : list of callable
        Effects like those in ``effects``, applied in this order.

    Raises
    ------
    ValueError
        If a share is not from 0 to 1, there are too few speakers, or a
        recording cannot be read; names it.

    Example
    -------
    >>> import soundfile
    >>> from speechbrain_flashformer.training.effects import Noise
    >>> folder = getfixture("tmp_path")
    >>> for name in "ab":
    ...     noise = 0.1 * np.random.randn(8000)
    ...     soundfile.write(folder / f"{name}.wav", noise, 8000)
    >>> recordings = find_recordings(folder, speaker="file")
    >>> mixtures = DynamicMixtures(
    ...     recordings, 2, 8000, samples=4000, seed=1, effects=[Noise(0.5)]
    ... )
    >>> mixtures[12345]["mix_sig"].shape
    torch.Size([4000])
    """

    def __init__(
        self,
        recordings,
        num_spks,
        sample_rate,
        samples,
        seed,
        speeds=(100, 100),
        same_corpus_share=0.0,
        concatenation_share=0.0,
        effects=(),
    ):
        self.num_spks, self.samples = num_spks, samples
        self.sample_rate, self.seed = sample_rate, seed
        self.speeds, self.effects = speeds, list(effects)
        self.same_corpus_share = same_corpus_share
        self.concatenation_share = concatenation_share
        shares = [(type(x).__name__, x.share) for x in self.effects]
        shares.append(("same corpus", same_corpus_share))
        shares.append(("concatenation", concatenation_share))
        for name, share in shares:
            if not 0 <= share <= 1:
                raise ValueError(
                    f"the share of {name} must be from 0 to 1, not {share}"
                )
        names, firsts, speakers = np.unique(
            # Different speakers of two corpora may have the same name.
            [f"{x.corpus}\0{x.speaker}" for x in recordings],
            return_index=True,
            return_inverse=True,
        )
        if len(names) < num_spks:
            raise ValueError(
                f"dynamic mixing of {num_spks} speakers needs as many; "
                f"{Path(recordings[0].path).parent} and the rest hold "
                f"{len(names)}: see dm_speaker"
            )
        self.reader = RecordingReader([x.path for x in recordings])
        self.corpora = np.array([recordings[i].corpus for i in firsts])
        # Indices of the recordings of each speaker.
        order = np.argsort(speakers, kind="stable")
        self.spoken = np.split(order, np.cumsum(np.bincount(speakers))[:-1])

    def __getitem__(self, n):
        """Mixture n: id, mix_sig [T] and s1_sig to sS_sig [T]."""
        rng = np.random.default_rng([self.seed, n])
        concatenated = _happens(self.concatenation_share, rng)
        cuts = [
            self._draw_cut(speaker, concatenated, rng)
            for speaker in self._draw_speakers(rng)
        ]
        signals = _place(cuts, rng)
        for effect in self.effects:
            if _happens(effect.share, rng):
                signals = effect(signals, rng, self.sample_rate)
        mixture, sources = signals.sum(0), signals[:-1]
        peak = max(np.abs(mixture).max(), np.abs(sources).max())
        scale = np.float32(min(1.0, PEAK / peak))
        item = {"id": f"dm{n}", "mix_sig": mixture}
        item |= {f"s{i + 1}_sig": x for i, x in enumerate(sources)}
        for name in list(item)[1:]:
            item[name] = torch.from_numpy(item[name] * scale)
        return item

    def _draw_speakers(self, rng):
        """Draw the speakers of a mixture; returns their indices."""
        first = rng.integers(len(self.spoken))
        others = np.arange(len(self.spoken))
        if _happens(self.same_corpus_share, rng):
            same = np.flatnonzero(self.corpora == self.corpora[first])
            others = same if len(same) >= self.num_spks else others
        others = others[others != first]
        more = rng.choice(others, self.num_spks - 1, replace=False)
        return [first, *more]

    def _draw_cut(self, speaker, concatenated, rng):
        """Draw speech of a speaker, at most ``samples`` and not silent."""
        for _ in range(TRIES):
            index = self._draw_recording(speaker, rng)
            percent = int(rng.integers(self.speeds[0], self.speeds[1] + 1))
            cut = self._cut(index, percent, rng)
            if concatenated:
                cut = self._concatenate(cut, speaker, percent, rng)
            if level_db(cut) > SILENCE_DB:
                return cut
        raise ValueError(
            f"nothing but silence in {TRIES} cuts of one speaker; the last was "
            f"of {self.reader.paths[index]}"
        )

    def _draw_recording(self, speaker, rng):
        """Draw a recording of a speaker, in proportion to the durations."""
        theirs = self.spoken[speaker]
        upto = np.cumsum(self.reader.frames[theirs] / self.reader.rates[theirs])
        return theirs[np.searchsorted(upto, rng.random() * upto[-1])]

    def _cut(self, index, percent, rng):
        return self.reader.cut(
            index, self.samples, self.sample_rate, rng, percent
        )

    def _concatenate(self, cut, speaker, percent, rng):
        """Fill ``samples`` with speech of a speaker, starting with ``cut``."""
        level = level_db(cut)
        longest = round(LONGEST_PAUSE * self.sample_rate)
        pieces, length = [], 0
        while length < self.samples:
            pause = np.zeros(rng.integers(longest), np.float32)
            pieces += [pause, cut]
            length += len(pause) + len(cut)
            index = self._draw_recording(speaker, rng)
            cut = self._cut(index, percent, rng)
            # Match the levels of the recordings, except for pauses.
            if level_db(cut) > SILENCE_DB:
                cut = cut * 10 ** ((level - level_db(cut)) / 20)
        return np.concatenate(pieces)[: self.samples]


def _happens(share, rng):
    """Draw whether an effect applies; a share of 0 draws no random number."""
    return share > 0 and rng.random() < share


def _place(cuts, rng):
    """Place cuts at random positions and levels: [S + 1, T] without noise."""
    length = max(map(len, cuts))
    signals = np.zeros((len(cuts) + 1, length), np.float32)
    first = rng.normal(*FIRST_LEVEL_DB)
    for i, cut in enumerate(cuts):
        level = first + (rng.normal(*RELATIVE_LEVEL_DB) if i else 0)
        gain_db = np.clip(level, *LEVEL_LIMITS_DB) - level_db(cut)
        start = rng.integers(length - len(cut) + 1)
        signals[i, start : start + len(cut)] = cut * 10 ** (gain_db / 20)
    return signals
