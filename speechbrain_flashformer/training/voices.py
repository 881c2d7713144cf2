"""Starter data without a licence: mixtures of synthetic voices.

eSpeak NG speaks random sentences with many voices; they are mixed like
WSJ0-mix and written in its folder layout, so that every recipe for WSJ0-mix
runs on a machine that has no data. Synthetic speech is easier than real
speech: figures on it do not compare with WSJ0-mix.

Needs the extra ``demo`` (espeakng-loader carries eSpeak NG in a wheel).
"""

import contextlib
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from speechbrain_flashformer.training.espeak import espeakng_loader, speak_all

try:
    import fcntl
except ImportError:
    fcntl = None

PARTS = ("tr", "cv", "tt")
MARKER = "voices.json"
# Raised whenever the same arguments give other files.
VERSION = 1

# Relative levels of the speakers and peak of the files, as in WSJ0-mix.
LEVEL_RANGE_DB = 2.5
PEAK = 0.9

PEOPLE = "abcd"

# Whispers and effects that no one would call a voice.
NOT_VOICES = ("whisper", "robo", "robot", "demonic", "storm", "tweaky")
ACCENTS = """
    en-us en-us-nyc en en-gb-x-rp en-gb-scotland en-gb-x-gbclan
    en-gb-x-gbcwmd en-029
""".split()

WHO = (
    "the old captain|my neighbour|a young teacher|her brother|nobody here|"
    "the tall engineer|our doctor|every student|that singer|the night guard|"
    "his cousin|the whole family|a quiet visitor|the new driver|one farmer|"
    "their manager|the baker|a lost tourist|the committee|my best friend"
)
DOES = (
    "found|carried|painted|forgot|borrowed|repaired|sold|described|watched|"
    "counted|ordered|hid|measured|noticed|followed|wanted|dropped|returned|"
    "asked for|talked about"
)
WHAT = (
    "a broken umbrella|seven green bottles|the morning paper|some fresh bread|"
    "a heavy wooden chair|the wrong address|a letter from home|warm coffee|"
    "the last ticket|an orange bicycle|fourteen boxes|a piece of string|"
    "the garden fence|a small radio|two silver coins|the blue notebook|"
    "a very long story|some cheap shoes|the engine|an early train"
)
WHERE = (
    "near the river|behind the station|in the kitchen|across the valley|"
    "under the bridge|at the market|by the open window|on the third floor|"
    "outside the museum|along the coast|in a dark corner|up on the roof"
)
WHEN = (
    "before sunrise|late on Friday|during the storm|after the meeting|"
    "twice a week|at half past nine|all summer|without a word|in a hurry|"
    "just in time|for no reason|once again"
)


def make_voices(
    folder,
    num_spks=2,
    sizes=(1000, 100, 100),
    seed=0,
    sample_rate=8000,
    utterances=5,
    progressbar=True,
):
    """Write a set of mixtures, or find the same one finished already.

    The set appears under its name only when it is complete. Speakers of one
    part never speak in another.

    Arguments
    ---------
    folder : str or Path
        Becomes ``folder/wav8k/min/{tr,cv,tt}/{mix,s1,s2}/NAME.wav`` (wav16k
        for 16000 Hz, s3 for three speakers).
    num_spks : int
        Speakers per mixture, 2 or more.
    sizes : tuple of int
        Mixtures for training, validation and test.
    seed : int
        The same seed gives the same files.
    sample_rate : int
        Hz.
    utterances : int
        Sentences that each voice speaks.
    progressbar : bool
        Whether to show one.

    Returns
    -------
    Path
        The folder, ready as ``data_folder`` of the recipe.

    Raises
    ------
    ImportError
        When espeakng-loader is missing; names the extra to install.
    FileExistsError
        When the folder holds something else than this very set.

    Example
    -------
    >>> folder = make_voices(getfixture("tmp_path") / "set", sizes=(2, 1, 1),
    ...                      utterances=1, progressbar=False)
    >>> sorted(path.name for path in folder.rglob("tr*.wav"))[0][:7]
    'tr00000'
    """
    if espeakng_loader is None:
        raise ImportError(
            "the starter set needs eSpeak NG: pip install "
            "'speechbrain-flashformer[demo]', or give a data_folder"
        )
    folder = Path(folder)
    description = {
        "version": VERSION,
        "espeakng-loader": version("espeakng-loader"),
        "num_spks": num_spks,
        "sizes": list(sizes),
        "seed": seed,
        "sample_rate": sample_rate,
        "utterances": utterances,
    }
    if _is_made(folder, description):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _made_beside(folder) as beside:
        made = beside / "set"
        _write_set(made, description, progressbar)
        (made / MARKER).write_text(json.dumps(description))
        try:
            if folder.exists():
                folder.rmdir()
            os.replace(made, folder)
        except OSError:
            # Another process may have made it meanwhile.
            if not _is_made(folder, description):
                raise
    return folder


@contextlib.contextmanager
def _made_beside(folder):
    """A new folder, locked and removed at the end; or by the next that begins.

    A process that is killed loses its lock, but cannot remove the folder.
    """
    with contextlib.ExitStack() as stack:
        # One at a time, so that none removes what another has not locked yet.
        with _locked(folder.parent):
            for left in folder.parent.glob(f"{folder.name}.*.partial"):
                with contextlib.suppress(OSError), _locked(left, wait=False):
                    shutil.rmtree(left)
            beside = stack.enter_context(
                tempfile.TemporaryDirectory(
                    prefix=f"{folder.name}.",
                    suffix=".partial",
                    dir=folder.parent,
                )
            )
            stack.enter_context(_locked(beside))
        yield Path(beside)


@contextlib.contextmanager
def _locked(folder, wait=True):
    """Hold the lock of a folder; an OSError if another does, and no wait."""
    if fcntl is None:  # Windows: nothing is ever taken for left behind
        if not wait:
            raise OSError
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:  # taken, or a file system without locks
            if not wait:
                raise
        yield
    finally:
        os.close(handle)


def _is_made(folder, description):
    """Whether the folder is this very set; raise if it is anything else."""
    marker = folder / MARKER
    if marker.is_file() and json.loads(marker.read_text()) == description:
        return True
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} exists and is not this set of voices: remove it or "
            "choose another folder"
        )
    return False


def _write_set(folder, description, progressbar):
    """Write the mixtures that a description tells of."""
    num_spks, sizes, seed, sample_rate, utterances = (
        description[key]
        for key in ("num_spks", "sizes", "seed", "sample_rate", "utterances")
    )
    root = folder / f"wav{sample_rate // 1000}k" / "min"
    families = _deal_families(np.random.default_rng(seed))
    # Each part draws on its own: another training set has the same test set.
    rngs = {
        part: np.random.default_rng([seed, num_spks, number])
        for number, part in enumerate(PARTS)
    }
    lines = [
        line
        for part, rng in rngs.items()
        for line in _write_lines(part, families[part], utterances, rng)
    ]
    with tqdm(
        total=len(lines) + sum(sizes),
        desc=f"{num_spks}-speaker starter set",
        disable=not progressbar,
        dynamic_ncols=True,
    ) as bar:
        pools = {part: {} for part in PARTS}
        spoken = speak_all(lines, sample_rate, folder.parent, bar)
        for line, signal in zip(lines, spoken):
            pool = pools[line["part"]].setdefault(line["tract"], [])
            pool.append((line["id"], signal))
        for (part, rng), size in zip(rngs.items(), sizes):
            for index in range(size):
                name = f"{part}{index:05d}"
                _write_mixture(
                    root / part, name, pools[part], num_spks, sample_rate, rng
                )
                bar.update(1)


def _write_mixture(root, name, pool, num_spks, sample_rate, rng):
    """Mix speech of num_spks vocal tracts; the shortest ends the mixture."""
    tracts = rng.choice(sorted(pool), num_spks, replace=False)
    chosen = [pool[tract][rng.integers(len(pool[tract]))] for tract in tracts]
    speakers, sources = zip(*chosen)
    length = min(map(len, sources))
    gains = 10 ** (rng.uniform(-1, 1, num_spks) * LEVEL_RANGE_DB / 20)
    sources = [
        gain * source[:length] / np.sqrt(np.mean(source[:length] ** 2))
        for gain, source in zip(gains, sources)
    ]
    mixture = sum(sources)
    scale = PEAK / max(np.abs(x).max() for x in (mixture, *sources))
    name = "_".join([name, *speakers]) + ".wav"
    for i, signal in enumerate((mixture, *sources)):
        path = root / (f"s{i}" if i else "mix") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, signal * scale, sample_rate, "PCM_16")


def _deal_families(rng):
    """Vocal tracts of each part, about 8 : 1 : 1, with relatives together."""
    voices = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    families = {}
    for variant in sorted(path.name for path in voices.iterdir()):
        lower = variant.lower()
        if any(word in lower for word in NOT_VOICES):
            continue
        stem = lower.rstrip("0123456789")
        # m1, m2, ... and f1, f2, ... are unrelated.
        stem = lower if len(stem) == 1 else stem
        families.setdefault(stem, []).append(variant)
    order = [families[stem] for stem in rng.permutation(sorted(families))]
    tenth = len(order) // 10
    return {
        "tr": order[2 * tenth :],
        "cv": order[:tenth],
        "tt": order[tenth : 2 * tenth],
    }


def _write_lines(part, families, utterances, rng):
    """What is to be spoken in a part, and how; sentences of about 3 seconds.

    Each vocal tract speaks as several people, alike in nothing else.
    """
    lines = []
    for variant in (variant for family in families for variant in family):
        for person in PEOPLE:
            accent = rng.choice(ACCENTS)
            pitch, width = rng.integers(20, 81), rng.integers(30, 81)
            rate = rng.integers(140, 211)
            for _ in range(utterances):
                lines.append(
                    {
                        "part": part,
                        "tract": variant,
                        "id": "".join(filter(str.isalnum, variant)) + person,
                        "voice": f"{accent}+{variant}",
                        "pitch": int(pitch + rng.integers(-4, 5)),
                        "range": int(width + rng.integers(-10, 11)),
                        "rate": int(rate + rng.integers(-10, 11)),
                        "text": " ".join(
                            str(rng.choice(words.split("|")))
                            for words in (WHO, DOES, WHAT, WHERE, WHEN)
                        ),
                    }
                )
    return lines
