"""Dynamic mixing: new training mixtures for ever from single-speaker speech.

Mixture ``n`` is made of the seed and ``n`` alone: the same whatever the number
of workers or processes, and never the same twice in a training. Levels follow
WSJ0-mix.

Axes: T samples.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from scipy.signal import butter, fftconvolve, firwin2, sosfilt
from torch.utils.data import Dataset
from torchaudio.functional import resample
from tqdm import tqdm

from speechbrain_flashformer.training.data import read_table

# WSJ0-mix: the first speaker's level and that of the others beside it
# (normal, mean and deviation in dB), the loudest and softest, and the peak.
FIRST_LEVEL_DB = (-27.43, 2.57)
RELATIVE_LEVEL_DB = (-2.51, 2.66)
LEVEL_LIMITS_DB = (-45.0, 0.0)
PEAK = 0.9

# A cut softer than this is a pause, and another one of the speaker is drawn.
SILENCE_DB = -60.0
TRIES = 100

# Least share of its time that is spoken: by a speaker when turns are taken, in
# a mixture that stands in silence.
LEAST_SPOKEN = 0.2

# Largest denominator of a ratio of rates: at 44.1 kHz, 97 % of the speed is
# 42777 to 8000, for which the resampler would build a filter of 3 GB. The
# nearest such ratio is off by less than a thousandth: two cents of pitch.
FINEST_RATIO = 400

# Longest pause between two recordings that are joined, seconds.
LONGEST_PAUSE = 1.0

# Telephones: lower and upper edge in Hz, steepness as the order of the filter.
TELEPHONE_LOW = (100.0, 400.0)
TELEPHONE_HIGH = (2800.0, 3800.0)
TELEPHONE_ORDER = (2, 6)

# The rooms' reverberation times, seconds; drawn uniformly.
ROOM_T60 = (0.1, 0.5)


def load_mixtures(hparams):
    """Build the ``DynamicMixtures`` that a recipe's hyperparameters describe.

    Reads ``base_folder_dm``, ``dm_speaker``, ``num_spks``, ``sample_rate``,
    ``training_signal_len``, ``seed``, ``use_speedperturb``,
    ``speed_changes`` (of which the least and the greatest count),
    ``dm_same_corpus_share``, ``dm_absent_share``, ``dm_join_share``,
    ``dm_turn_share``, ``dm_silence_share``, ``dm_noise_folder``,
    ``dm_noise_share``, ``dm_noise_snr``, ``dm_room_share``, ``dm_colour_db``,
    ``dm_telephone_share`` and ``dm_flip_share``.
    """
    if not hparams["base_folder_dm"]:
        raise ValueError(
            "dynamic_mixing needs single-speaker recordings: give their "
            "folder as base_folder_dm"
        )
    speeds = (100, 100)
    if hparams["use_speedperturb"]:
        speeds = (min(hparams["speed_changes"]), max(hparams["speed_changes"]))
    noise = []
    if hparams["dm_noise_folder"]:
        found = find_recordings(hparams["dm_noise_folder"])
        noise = [recording.path for recording in found]
    return DynamicMixtures(
        find_recordings(hparams["base_folder_dm"], hparams["dm_speaker"]),
        hparams["num_spks"],
        hparams["sample_rate"],
        hparams["training_signal_len"],
        hparams["seed"],
        speeds,
        noise=noise,
        same_corpus_share=hparams["dm_same_corpus_share"],
        absent_share=hparams["dm_absent_share"],
        join_share=hparams["dm_join_share"],
        turn_share=hparams["dm_turn_share"],
        silence_share=hparams["dm_silence_share"],
        noise_share=hparams["dm_noise_share"],
        noise_snr=hparams["dm_noise_snr"],
        room_share=hparams["dm_room_share"],
        colour_db=hparams["dm_colour_db"],
        telephone_share=hparams["dm_telephone_share"],
        flip_share=hparams["dm_flip_share"],
    )


class Recording(NamedTuple):
    """Where speech is, who speaks, and the corpus that it is from."""

    path: Path
    speaker: str
    corpus: str = ""


def find_recordings(place, speaker="folder"):
    """List recordings and who speaks in each.

    Arguments
    ---------
    place : str or Path
        A folder, searched to all depths for wav and flac files; or a CSV file
        with the columns ``wav`` (paths, relative ones beside the CSV),
        ``speaker`` and, where there are several, ``corpus``.
    speaker : str
        How a folder tells who speaks: ``folder``, the name of the folder that
        holds the file; ``file``, each file is its own; else a regular
        expression searched in the path below ``place``, whose groups that
        matched are the name.

    Returns
    -------
    list of Recording
        Those of a folder, all of one corpus, by path; those of a CSV file in
        its order.

    Raises
    ------
    FileNotFoundError
        When nothing is found.
    ValueError
        When the CSV has not these columns or an empty cell in them, or a path
        does not match.
    """
    place = Path(place)
    if place.is_file():
        found = list(_listed(place))
    else:
        paths = sorted(
            path
            for path in place.rglob("*")
            if path.suffix.lower() in (".wav", ".flac")
            # What macOS keeps beside a file on other file systems.
            and not path.name.startswith("._")
        )
        found = [Recording(x, _speaker(x, place, speaker)) for x in paths]
    if not found:
        raise FileNotFoundError(f"no wav or flac file in {place}")
    return found


def _listed(place):
    columns, rows = read_table(place)
    if missing := {"wav", "speaker"} - set(columns):
        raise ValueError(f"{place} has no column {sorted(missing)[0]}")
    for number, row in rows.items():
        if not row["wav"] or not row["speaker"]:
            raise ValueError(f"{place}, line {number}: wav or speaker is empty")
        path = place.parent / row["wav"]
        yield Recording(path, row["speaker"], row.get("corpus") or "")


def _speaker(path, place, speaker):
    below = path.relative_to(place)
    if speaker == "file":
        return below.as_posix()
    if speaker == "folder":
        return below.parent.name or path.parent.name
    try:
        match = re.search(speaker, below.as_posix())
    except re.error as error:
        raise ValueError(
            f"dm_speaker {speaker!r} is not folder, file or a regular "
            f"expression: {error}"
        ) from error
    if not match:
        raise ValueError(
            f"dm_speaker {speaker!r} does not match {below} in {place}"
        )
    return "".join(group for group in match.groups() if group) or match[0]


class DynamicMixtures(Dataset):
    """An endless training set of mixtures made on the fly.

    All speakers are equally likely, however much speech there is of each; of
    the recordings of a speaker, those twice as long are twice as likely. A
    recording shorter than ``samples`` stands at a random place in the mixture,
    which ends with its longest source.

    Arguments
    ---------
    recordings : list of Recording
        As from ``find_recordings``; mono, any sampling rate.
    num_spks : int
        S, different speakers in a mixture.
    sample_rate : int
        Of the mixtures, Hz.
    samples : int
        Longest mixture.
    seed : int
        The same seed gives the same mixtures.
    speeds : tuple of int
        Least and greatest speed, in percent; pitch and formants go with it.
    same_corpus_share : float
        Share of the mixtures whose speakers are all from one corpus, as long
        as it has enough of them: else the microphone may tell who is who.
    absent_share : float
        Share of the mixtures in which the first speaker is alone, the other
        sources being 0. Needs a loss that is defined for a silent source.
    join_share : float
        Share of the mixtures in which each speaker goes on for all of
        ``samples``, with recordings of theirs and pauses between.
    turn_share : float
        Share of the mixtures in which each speaker says only a part, a fifth
        at least, of what there is time for: as in a conversation.
    silence_share : float
        Share of the mixtures that are cut short and stand in silence, which
        then takes up to four fifths of the time.
    noise : list of Path
        Noise recordings.
    noise_share : float
        Share of the mixtures with noise in them (the sources stay clean):
        one of ``noise``, or without any, a noise of random colour.
    noise_snr : tuple of float
        Least and greatest ratio of the loudest source to the noise, dB; that
        of WHAM! (arXiv:1907.01160) is -6 to 3.
    room_share : float
        Share of the mixtures in a room, with a synthetic reverberation in the
        sources too.
    colour_db : float
        Each source passes a random filter up to so many dB up or down, as if
        through another microphone.
    telephone_share : float
        Share of the mixtures whose sources all pass one band, as if recorded
        from a telephone.
    flip_share : float
        Share of the mixtures that are turned upside down, sources too.
        Pressure that makes one microphone's signal rise makes another's fall;
        speech is not the same both ways, and a corpus may be all one way.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> for name in "ab":
    ...     noise = 0.1 * np.random.randn(8000)
    ...     soundfile.write(folder / f"{name}.wav", noise, 8000)
    >>> recordings = find_recordings(folder, speaker="file")
    >>> mixtures = DynamicMixtures(recordings, 2, 8000, samples=4000, seed=1)
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
        absent_share=0.0,
        join_share=0.0,
        turn_share=0.0,
        silence_share=0.0,
        noise=(),
        noise_share=0.0,
        noise_snr=(5.0, 35.0),
        room_share=0.0,
        colour_db=0.0,
        telephone_share=0.0,
        flip_share=0.0,
    ):
        self.num_spks, self.samples = num_spks, samples
        self.sample_rate, self.seed = sample_rate, seed
        self.speeds = speeds
        self.same_corpus_share = same_corpus_share
        self.absent_share = absent_share
        self.join_share, self.turn_share = join_share, turn_share
        self.silence_share = silence_share
        self.noise = list(noise)
        self.noise_share, self.noise_snr = noise_share, noise_snr
        self.room_share = room_share
        self.colour_db, self.telephone_share = colour_db, telephone_share
        self.flip_share = flip_share
        self.paths = [str(recording.path) for recording in recordings]
        names, firsts, speakers = np.unique(
            # Two corpora may have a name for two people.
            [f"{x.corpus}\0{x.speaker}" for x in recordings],
            return_index=True,
            return_inverse=True,
        )
        if len(names) < num_spks:
            raise ValueError(
                f"dynamic mixing of {num_spks} speakers needs as many; "
                f"{Path(self.paths[0]).parent} and the rest hold {len(names)}: "
                "see dm_speaker"
            )
        self.corpora = np.array([recordings[i].corpus for i in firsts])
        self.rates, self.frames = _headers(self.paths, "recordings")
        if self.noise:
            self.noise_rates, self.noise_frames = _headers(self.noise, "noise")
        # Of each speaker, their recordings.
        order = np.argsort(speakers, kind="stable")
        self.spoken = np.split(order, np.cumsum(np.bincount(speakers))[:-1])

    def __getitem__(self, n):
        """Mixture n: id, mix_sig [T] and s1_sig to sS_sig [T]."""
        rng = np.random.default_rng([self.seed, n])
        joined = _happens(self.join_share, rng)
        in_turns = rng.random() < self.turn_share
        spoken = 1.0
        if _happens(self.silence_share, rng):
            spoken = rng.uniform(LEAST_SPOKEN, 1)
        cuts, length = [], 0
        for speaker in self._draw_speakers(rng):
            for _ in range(TRIES):
                pick = self._draw_recording(speaker, rng)
                percent = int(rng.integers(self.speeds[0], self.speeds[1] + 1))
                cut = self._cut(pick, percent, rng)
                if joined:
                    cut = self._join(cut, speaker, percent, rng)
                cut = cut[: ceil(len(cut) * spoken)]
                whole = len(cut)
                if in_turns:
                    cut = cut[: ceil(whole * rng.uniform(LEAST_SPOKEN, 1))]
                if _level_db(cut) > SILENCE_DB:
                    break
            else:
                raise ValueError(
                    f"nothing but silence in {TRIES} cuts of one speaker; the "
                    f"last was of {self.paths[pick]}"
                )
            cuts.append(cut)
            length = max(length, whole)
        if _happens(self.absent_share, rng):
            length = len(cuts[0])
            cuts[1:] = [cuts[0][:0]] * (self.num_spks - 1)
        return self._mix(n, cuts, length, spoken, rng)

    def _draw_speakers(self, rng):
        """Numbers of the speakers of a mixture."""
        first = rng.integers(len(self.spoken))
        others = np.arange(len(self.spoken))
        if _happens(self.same_corpus_share, rng):
            same = np.flatnonzero(self.corpora == self.corpora[first])
            others = same if len(same) >= self.num_spks else others
        others = others[others != first]
        more = rng.choice(others, self.num_spks - 1, replace=False)
        return [first, *more]

    def _draw_recording(self, speaker, rng):
        """One of a speaker's recordings; second by second, all are alike."""
        theirs = self.spoken[speaker]
        upto = np.cumsum(self.frames[theirs] / self.rates[theirs])
        return theirs[np.searchsorted(upto, rng.random() * upto[-1])]

    def _join(self, cut, speaker, percent, rng):
        """``samples`` of what a speaker says, of which ``cut`` is the first."""
        level, theirs = _level_db(cut), self.spoken[speaker]
        longest = round(LONGEST_PAUSE * self.sample_rate)
        pieces, length = [], 0
        while length < self.samples:
            pause = np.zeros(rng.integers(longest), np.float32)
            pieces += [pause, cut]
            length += len(pause) + len(cut)
            cut = self._cut(rng.choice(theirs), percent, rng)
            # Recordings of one person may differ in level; pauses stay quiet.
            if _level_db(cut) > SILENCE_DB:
                cut = cut * 10 ** ((level - _level_db(cut)) / 20)
        return np.concatenate(pieces)[: self.samples]

    def _cut(self, pick, percent, rng):
        """A piece of a recording at a speed, at most ``samples``."""
        rate = int(self.rates[pick])
        # Faster speech is a recording that claims a higher rate.
        new, old = self.sample_rate * 100, rate * percent
        wanted = min(-(-self.samples * old // new), self.frames[pick])
        start = rng.integers(self.frames[pick] - wanted + 1)
        cut = _read(self.paths[pick], wanted, start)
        return self._resample(cut, old, new)[: self.samples]

    @staticmethod
    def _resample(signal, old, new):
        if old == new:
            return signal
        ratio = Fraction(old, new).limit_denominator(FINEST_RATIO)
        signal = torch.from_numpy(signal)
        return resample(signal, ratio.numerator, ratio.denominator).numpy()

    def _mix(self, n, cuts, length, spoken, rng):
        total = min(int(length / spoken), self.samples)
        begin = rng.integers(total - length + 1) if spoken < 1 else 0
        in_room = rng.random() < self.room_share
        t60 = rng.uniform(*ROOM_T60)
        band = None
        if _happens(self.telephone_share, rng):
            band = telephone(self.sample_rate, rng)
        first = rng.normal(*FIRST_LEVEL_DB)
        sources, loudest = [], LEVEL_LIMITS_DB[0]
        for i, cut in enumerate(cuts):
            level = first + (rng.normal(*RELATIVE_LEVEL_DB) if i else 0)
            level = np.clip(level, *LEVEL_LIMITS_DB)
            source = np.zeros(total, np.float32)
            if not len(cut):  # absent
                sources.append(source)
                continue
            start = begin + rng.integers(length - len(cut) + 1)
            source[start : start + len(cut)] = cut
            if self.colour_db:
                source = colour(source, self.colour_db, rng)
            if in_room:
                source = reverberate(source, t60, self.sample_rate, rng)
            if band is not None:
                source = sosfilt(band, source)
            said = source[start : start + len(cut)]
            sources.append(source * 10 ** ((level - _level_db(said)) / 20))
            loudest = max(loudest, level)
        mixture = sum(sources)
        if rng.random() < self.noise_share:
            noise = self._noise(total, rng)
            snr = rng.uniform(*self.noise_snr)
            gain_db = loudest - snr - _level_db(noise)
            mixture = mixture + noise * 10 ** (gain_db / 20)
        peak = max(np.abs(x).max() for x in (mixture, *sources))
        scale = min(1.0, PEAK / peak)
        # All of it: a microphone that hears both speakers has one polarity.
        if _happens(self.flip_share, rng):
            scale = -scale
        item = {"id": f"dm{n}", "mix_sig": mixture}
        item |= {f"s{i + 1}_sig": x for i, x in enumerate(sources)}
        for name in list(item)[1:]:
            wave = (item[name] * scale).astype(np.float32)
            item[name] = torch.from_numpy(wave)
        return item

    def _noise(self, length, rng):
        if not self.noise:
            return random_noise(length, rng)
        pick = rng.integers(len(self.noise))
        rate, frames = int(self.noise_rates[pick]), self.noise_frames[pick]
        wanted = min(-(-length * rate // self.sample_rate), frames)
        start = rng.integers(frames - wanted + 1)
        noise = _read(self.noise[pick], wanted, start)
        noise = self._resample(noise, rate, self.sample_rate)
        return np.resize(noise, length)


def colour(signal, most_db, rng):
    """Filter a signal [T] with a smooth random response within +-most_db."""
    edges = np.linspace(0, 1, 7)
    gains = 10 ** (rng.uniform(-most_db, most_db, len(edges)) / 20)
    full = np.convolve(signal, firwin2(65, edges, gains))
    return full[32 : 32 + len(signal)]


def telephone(sample_rate, rng):
    """A random band of speech, as second-order sections for ``sosfilt``."""
    edges = [rng.uniform(*TELEPHONE_LOW), rng.uniform(*TELEPHONE_HIGH)]
    edges[1] = min(edges[1], 0.95 * sample_rate / 2)
    order = rng.integers(TELEPHONE_ORDER[0], TELEPHONE_ORDER[1] + 1)
    return butter(order, edges, "bandpass", fs=sample_rate, output="sos")


def reverberate(signal, t60, sample_rate, rng):
    """Place a signal [T] in a synthetic room: noise that decays after it.

    The direct sound stays in place. The ratio of direct to reverberant energy
    is drawn between 0 and 15 dB.
    """
    samples = np.arange(1, round(t60 * sample_rate))
    tail = rng.normal(size=len(samples)) * 10 ** (
        -3 * samples / (t60 * sample_rate)
    )
    ratio_db = rng.uniform(0, 15)
    tail *= 10 ** (-ratio_db / 20) / np.linalg.norm(tail)
    response = np.concatenate([[1.0], tail])
    return fftconvolve(signal, response)[: len(signal)]


def random_noise(length, rng):
    """Noise [T] whose power falls with frequency, by 0 to 2 orders."""
    spectrum = np.fft.rfft(rng.normal(size=length))
    frequency = np.maximum(np.arange(len(spectrum)), 1)
    return np.fft.irfft(spectrum / frequency ** rng.uniform(0, 1), length)


def _happens(share, rng):
    # A share of 0 draws nothing: a seed's mixtures stay what they were before
    # there was the choice.
    return share > 0 and rng.random() < share


def _level_db(signal):
    return 10 * np.log10(np.mean(np.square(signal, dtype=np.float64)) + 1e-12)


def _headers(paths, what):
    """Rates and frames of mono recordings."""
    with ThreadPoolExecutor() as pool:
        headers = tqdm(
            pool.map(_header, paths),
            what,
            len(paths),
            dynamic_ncols=True,
            disable=None,
        )
        return np.array(list(headers)).T


def _header(path):
    """Rate and frames of a mono recording."""
    try:
        info = soundfile.info(path)
    except (OSError, soundfile.SoundFileError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if info.channels != 1:
        raise ValueError(
            f"{path} has {info.channels} channels: dynamic mixing takes mono"
        )
    if not info.frames:
        raise ValueError(f"{path} is empty")
    return info.samplerate, info.frames


def _read(path, frames, start):
    try:
        signal, _ = soundfile.read(
            path, int(frames), int(start), dtype="float32"
        )
    except (OSError, soundfile.SoundFileError) as error:
        raise ValueError(
            f"cannot read {path} from frame {start} on: {error}"
        ) from error
    if not np.isfinite(signal).all():
        raise ValueError(
            f"{path} has samples that are not finite, in {frames} from frame "
            f"{start} on: mend it or take it out"
        )
    return signal
