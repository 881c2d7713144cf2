"""The starter set: mixtures of synthetic voices, which need no license.

eSpeak NG speaks random sentences with many voices. They are mixed like WSJ0-mix
and written in its folder layout, so that every recipe for WSJ0-mix runs without
other data. Synthetic speech is easier to separate than real speech: results on
it are not comparable with those on WSJ0-mix.

Requires the extra ``demo`` (the wheel of espeakng-loader contains eSpeak NG).
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
from speechbrain_flashformer.training.locks import locked

PARTS = ("tr", "cv", "tt")
MARKER = "voices.json"  # describes a complete set, in its folder
# Increased whenever the same arguments give other files.
VERSION = 1

# Maximum change of a speaker's level, and peak of the files, as in WSJ0-mix.
LEVEL_RANGE_DB = 2.5
PEAK = 0.9

# Suffixes of the speakers of one vocal tract.
PEOPLE = "abcd"

# Whispers and effects, which are not voices.
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
    """Write a set of mixtures, unless the same set exists already.

    The folder appears only when the set is complete. The parts have different
    speakers.

    Arguments
    ---------
    folder : str or Path
        Contains ``wav8k/min/{tr,cv,tt}/{mix,s1,s2}/NAME.wav`` afterwards
        (wav16k for 16000 Hz, s3 for three speakers).
    num_spks : int
        Speakers per mixture, 2 or more.
    sizes : tuple of int
        Numbers of mixtures for training, validation and test.
    seed : int
        The same seed gives the same files.
    sample_rate : int
        Hz.
    utterances : int
        Sentences per speaker.
    progressbar : bool
        Whether to show a progress bar.

    Returns
    -------
    Path
        The folder, for ``data_folder`` of the recipe.

    Raises
    ------
    ImportError
        If espeakng-loader is missing; names the extra to install.
    FileExistsError
        If the folder contains anything other than this set.
    OSError
        If eSpeak NG fails; its own message is on standard error.

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
            # Another process may have written the same set meanwhile.
            if not _is_made(folder, description):
                raise
    return folder


@contextlib.contextmanager
def _made_beside(folder):
    """Create a temporary folder next to a folder, and remove it at the end.

    The folder is locked while it is in use. A killed process loses its lock but
    leaves the folder; the next process removes it.
    """
    with contextlib.ExitStack() as stack:
        # The parent is locked, so that no process removes a folder that another
        # has created but not locked yet.
        with locked(folder.parent):
            for left in folder.parent.glob(f"{folder.name}.*.partial"):
                _remove_if_left(left)
            beside = stack.enter_context(
                tempfile.TemporaryDirectory(
                    prefix=f"{folder.name}.",
                    suffix=".partial",
                    dir=folder.parent,
                )
            )
            stack.enter_context(locked(beside))
        yield Path(beside)


def _remove_if_left(folder):
    """Remove a folder whose process is certain to have ended."""
    with contextlib.suppress(OSError), locked(folder, wait=False) as held:
        if held:
            shutil.rmtree(folder)


def _is_made(folder, description):
    """Whether the folder has this set; raise if it has anything else."""
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
    """Write the mixtures of a description."""
    num_spks, sizes, seed, sample_rate, utterances = (
        description[key]
        for key in ("num_spks", "sizes", "seed", "sample_rate", "utterances")
    )
    root = folder / f"wav{sample_rate // 1000}k" / "min"
    families = _deal_families(np.random.default_rng(seed))
    # One generator per part, so that the size of the training set does not
    # change the test set.
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
    """Write a mixture of num_spks vocal tracts, cut to the shortest source."""
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
    """Divide vocal tracts among the parts, about 8 : 1 : 1.

    Returns a dict from part to families, which are lists of related vocal
    tracts: a family belongs to one part.
    """
    voices = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    families = {}
    for variant in sorted(path.name for path in voices.iterdir()):
        lower = variant.lower()
        if any(word in lower for word in NOT_VOICES):
            continue
        stem = lower.rstrip("0123456789")
        # m1, m2, ... and f1, f2, ... are different vocal tracts.
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
    """Draw the sentences of a part, of about 3 seconds, and their voices.

    Each vocal tract has several speakers, with different accents, pitches and
    rates.
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
