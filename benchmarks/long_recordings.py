#!/usr/bin/env python3
"""Long recordings: memory and time against length, and the speakers' order.

> python benchmarks/long_recordings.py MODEL [--speech FOLDER] [--only WHAT]

MODEL is a packed folder. Two tables are written:

* results/long_length.csv: real-time factor and extra peak memory of
  ``separate_to_files`` for 1 minute to 2 hours of noise, each in a process of
  its own;
* results/long_order.csv: conversations of 10 minutes with turns, overlaps and
  pauses, by pairs of generated voices and, with --speech, of FOLDER's speakers
  (a folder each). A turn is wrong when it comes out where most of that
  speaker's speech does not. Beside the model stands an oracle, which knows the
  sources but for a leak of 20 dB and orders them at random in every chunk: its
  wrong turns are those of the chunks' order, the model's are also its own.

WHAT is ``length`` or ``order``.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from evaluate_model import wrong_turns
from records import write_csv

from speechbrain_flashformer.inference import FlashFormerSeparation
from speechbrain_flashformer.inference.chunks import ChunkPlan, ChunkSeparator
from speechbrain_flashformer.training.voices import make_voices

RESULTS = Path(__file__).parent / "results"
MINUTES = (1, 10, 60, 120)
PAIRS = 8
RATE = 8000
CONVERSATION = 600  # seconds
TURN, PAUSE = (3, 10), (1, 12)  # seconds, shortest and longest


def main():
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--speech", type=Path)
    parser.add_argument("--only", choices=("length", "order"))
    parser.add_argument("--minutes", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.minutes:
        print(json.dumps(measure_length(args.model, args.minutes)))
        return
    if args.only != "order":
        rows = [run_alone(args.model, minutes) for minutes in MINUTES]
        write_csv(RESULTS / "long_length.csv", rows)
    if args.only != "length":
        write_csv(
            RESULTS / "long_order.csv", measure_order(args.model, args.speech)
        )


def run_alone(model, minutes):
    """``measure_length`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, str(model), "--minutes", str(minutes)],
        check=True,
        capture_output=True,
        text=True,
    )
    row = json.loads(done.stdout.splitlines()[-1])
    print(row)
    return row


def measure_length(model, minutes):
    """Time and memory beyond those of the loaded model."""
    model = FlashFormerSeparation.from_hparams(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mixture.wav"
        rng = np.random.default_rng(0)
        with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16") as file:
            for _ in range(minutes):
                file.write(0.1 * rng.standard_normal(60 * RATE))
        model.separate_audio(torch.randn(1, RATE))  # warm-up
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        model.separate_to_files(path, folder)
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "minutes": minutes,
        "threads": torch.get_num_threads(),
        "rtf": round(seconds / (60 * minutes), 5),
        "extra peak memory (MB)": round((after - before) / 1024),
    }


# --- order -------------------------------------------------------------------


class Oracle:
    """A network that is told the sources [2, T], chunk by chunk."""

    LEAK = 0.1

    def __init__(self, sources, plan, rng):
        self.sources = torch.from_numpy(sources).float()
        self.plan, self.rng, self.calls = plan, rng, 0

    def __call__(self, chunks):
        """Take chunks [1, n], give the sources [1, 2, n]."""
        samples = chunks.shape[1]
        last = self.sources.shape[1] - samples
        start = min(self.calls * self.plan.hop, last)
        self.calls += 1
        true = self.sources[:, start : start + samples]
        true = true + self.LEAK * true.flip(0)
        return true[self.rng.permutation(2)][None]


def measure_order(model, speech):
    """Rows of wrong turns, of the oracle and of the model."""
    model = FlashFormerSeparation.from_hparams(model)
    plan = ChunkPlan(10 * RATE, round(2.5 * RATE), align=1)
    sets = {"generated voices": speak()}
    if speech:
        sets[speech.name] = read_speakers(speech)
    rows = []
    for name, speakers in sets.items():
        rng = np.random.default_rng(0)
        for _ in range(PAIRS):
            pair = rng.choice(sorted(speakers), 2, replace=False)
            sources, turns = converse([speakers[who] for who in pair], rng)
            mixture = torch.from_numpy(sources.sum(0, keepdims=True)).float()
            oracle = Oracle(sources, plan, rng)
            separator = ChunkSeparator(oracle, RATE, plan, 2)
            parts = [separator.feed(mixture), separator.flush()]
            told = torch.cat(parts, 2)[0].numpy()
            heard = model.separate_audio(mixture, RATE)[0].T.numpy()
            row = {
                "speech": name,
                "speakers": " ".join(pair),
                "turns": len(turns),
                "wrong, oracle": wrong_turns(told, sources, turns),
                "wrong, model": wrong_turns(heard, sources, turns),
            }
            rows.append(row)
            print(row)
    return rows


def speak():
    """Sentences of generated voices, by vocal tract."""
    speakers = {}
    with tempfile.TemporaryDirectory() as folder:
        root = make_voices(Path(folder) / "set", sizes=(1, 200, 200), seed=3)
        for path in sorted(root.glob("wav8k/min/[ct][vt]/s1/*.wav")):
            name = path.stem.split("_")[1]  # cv00000_SPEAKER_OTHER
            speakers.setdefault(name, []).append(soundfile.read(path)[0])
    return {n: signals for n, signals in speakers.items() if len(signals) > 3}


def read_speakers(folder):
    """Recordings by the folder they are in."""
    speakers = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".wav", ".flac"):
            signal, rate = soundfile.read(path)
            assert rate == RATE, f"{path} has {rate} Hz, not {RATE}"
            speakers.setdefault(path.parent.name, []).append(signal)
    return speakers


def converse(speakers, rng):
    """A conversation: sources [2, T], turns (speaker, start, stop)."""
    sources = np.zeros((2, CONVERSATION * RATE))
    turns, place, who = [], 0, 0
    while place < CONVERSATION - TURN[1] - PAUSE[1]:
        both = rng.random() < 0.4
        who = 1 - who
        seconds = rng.uniform(*TURN)
        for s in (0, 1) if both else (who,):
            start, stop = round(place * RATE), round((place + seconds) * RATE)
            said, samples = [], 0
            while samples < stop - start:
                signal = speakers[s][rng.integers(len(speakers[s]))]
                said.append(0.05 * signal / np.sqrt(np.mean(signal**2)))
                samples += len(signal)
            sources[s, start:stop] = np.concatenate(said)[: stop - start]
            turns.append((s, start, stop))
        place += seconds
        if rng.random() < 0.5:
            place += rng.uniform(*PAUSE)
    return sources, turns


if __name__ == "__main__":
    main()
