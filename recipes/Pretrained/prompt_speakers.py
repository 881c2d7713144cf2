#!/usr/bin/env python3
"""Sort Debian's telephone prompts by speaker: a test set for evaluate_model.py.

> apt-get download asterisk-core-sounds-{en,es,fr,it,ru}-wav \
      asterisk-prompt-{it-menardi-wav,fr-armelle,es-co}
> for package in *.deb; do dpkg -x $package SOUNDS; done
> python prompt_speakers.py SOUNDS/usr/share/asterisk/sounds OUT
> python ../../benchmarks/evaluate_model.py MODEL prompts=OUT

Seven announcers, most of them women, in five languages. No speaker and no
microphone occurs in the training data. For testing only. Licenses: Creative
Commons BY or BY-SA 3.0, GPL-2 (es-co), a BSD-like license (fr-armelle).
"""

import sys
from pathlib import Path

import soundfile

# Folders and files that are not speech. The file tt-monkeys is the same in six
# packages.
NOT_SPEECH = ("silence", "tt-monkeys")


def main(sounds, out):
    """Write OUT/SPEAKER/NAME.wav."""
    count = 0
    for folder in sorted(sounds.iterdir()):
        if folder.is_symlink() or not folder.is_dir():
            continue
        # The last word is the speaker: en_US_f_Allison and es_MX_f_Allison are
        # the same person.
        speaker = out / folder.name.split("_")[-1]
        for path in sorted(folder.rglob("*")):
            parts = path.relative_to(sounds).with_suffix("").parts
            if path.suffix not in (".wav", ".gsm") or {*parts} & {*NOT_SPEECH}:
                continue
            speaker.mkdir(parents=True, exist_ok=True)
            signal, rate = soundfile.read(path)
            soundfile.write(speaker / f"{'_'.join(parts)}.wav", signal, rate)
            count += 1
    if not count:
        raise FileNotFoundError(f"{sounds} has no folders with wav or gsm")
    print(f"{count} prompts in {out}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except FileNotFoundError as error:
        sys.exit(str(error))
