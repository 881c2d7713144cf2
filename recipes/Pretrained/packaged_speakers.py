#!/usr/bin/env python3
"""Sort the speech in Debian's packages by speaker, for pretrained_data.py.

> apt-get download festvox-ru fillets-ng-data-{cs,nl} kajongg klettres-data \
      ktuberling-data tuxpaint-stamps-default
> for package in *.deb; do dpkg -x $package SOUNDS; done
> python packaged_speakers.py SOUNDS OUT

The packages contain the dialogues of a game in Czech and Dutch, sentences of a
Russian voice, and names, syllables and animals, with one or two speakers per
language. Clips are concatenated, so that each OUT/SPEAKER/NUMBER.wav, at 8 kHz,
is at least 8 s long. Licenses: GPL-2 (the two KDE packages: GPL-2 or later);
festvox-ru: a BSD-like license.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

RATE = 8000
LENGTH = 8 * RATE  # minimum length of a concatenation
LEAST = 20 * RATE  # minimum speech of a speaker; others are skipped
PAUSE = (0.05, 0.4)  # seconds between clips
FLOOR = 0.03  # quieter ends are trimmed; relative to the peak of the clip
SEED = 11

# The groups of the first matching pattern form the name of the speaker. Some
# languages of ktuberling are excluded: they have several speakers, and the
# paths do not tell which.
SPEAKERS = (
    r"(festvox|festival)/voices/russian/(\w+)/wav/",
    r"(fillets-ng)/sound/\w+/(cs|nl)/[^/]*-([mv])-[^/]*$",
    r"(kajongg)/voices/((?:de/)?(?:fe)?male\d)/",
    r"(klettres)/(\w+)/(?:alpha|syllab)/",
    r"(ktuberling)/sounds/(?!ca|da|en|fr|ru)(\w+)/",
    r"(tuxpaint)/stamps/.*_desc_(\w\w)\.ogg$",
)


def main(sounds, out):
    """Write OUT/SPEAKER/NUMBER.wav."""
    if out.exists():
        raise FileExistsError(f"{out} exists: remove it or name another")
    clips = defaultdict(list)
    for path in sorted(sounds.rglob("*")):
        who = find_speaker(path.relative_to(sounds).as_posix())
        if who and path.suffix in (".ogg", ".wav") and not path.is_symlink():
            clips[who].append(path)
    if not clips:
        raise FileNotFoundError(f"{sounds} has none of the packages' speech")
    rng = np.random.default_rng(SEED)
    total = 0
    for who, paths in clips.items():
        strings = list(string_clips(paths, rng))
        if sum(map(len, strings)) < LEAST:
            continue
        folder = out / who
        folder.mkdir(parents=True, exist_ok=True)
        for number, signal in enumerate(strings):
            total += len(signal)
            soundfile.write(folder / f"{number:03}.wav", signal, RATE)
        print(f"{who}: {len(strings)} from {len(paths)} clips")
    print(f"{total / RATE / 3600:.1f} hours in {out}")


def find_speaker(path):
    """Return the speaker of a file of a package, "" if unknown."""
    for pattern in SPEAKERS:
        if match := re.search(pattern, path):
            return "-".join(match.groups()).replace("/", "-")
    return ""


def string_clips(paths, rng):
    """Yield concatenations of clips with pauses, [T], T at least LENGTH."""
    parts = []
    for path in paths:
        signal, rate = soundfile.read(path, dtype="float32", always_2d=True)
        clip = cut_ends(resample_poly(signal.mean(1), RATE, rate))
        if len(clip) < 0.2 * RATE:
            continue
        parts += [clip, np.zeros(int(RATE * rng.uniform(*PAUSE)), np.float32)]
        if sum(map(len, parts[:-1])) >= LENGTH:
            yield np.concatenate(parts[:-1])
            parts = []


def cut_ends(signal):
    """Trim the quiet ends of a clip [T]."""
    level = np.abs(signal)
    loud = np.flatnonzero(level > FLOOR * level.max(initial=0))
    return signal[loud[0] : loud[-1] + 1] if len(loud) else signal[:0]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except (FileExistsError, FileNotFoundError) as error:
        sys.exit(str(error))
