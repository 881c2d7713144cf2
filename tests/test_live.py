"""Live sound: what comes out of pipes is what the stream gives."""

import io
import itertools
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_flashformer import cli
from speechbrain_flashformer.inference import FlashFormerSeparation
from speechbrain_flashformer.inference.live import (
    Load,
    PcmReader,
    separate_live,
)
from speechbrain_flashformer.nnet.streaming import StreamingSeparator

RATE = 8000


@pytest.fixture(scope="module")
def model(packed_causal):
    return FlashFormerSeparation.from_hparams(packed_causal)


def noise(samples, channels=1, seed=0):
    generator = np.random.default_rng(seed)
    return 0.1 * generator.normal(size=(samples, channels)).astype("<f4")


def read(source, seconds=0.016, **options):
    with PcmReader(source, **{"sample_rate": RATE, **options}) as reader:
        return torch.cat([*reader.blocks(seconds), torch.zeros(1, 0)], 1)


class Trickle(io.RawIOBase):
    """A pipe that gives a few bytes at a time."""

    def __init__(self, data):
        self.data, self.turn = data, 0

    def read(self, size):
        self.turn += 1
        size = min(size, 1 + self.turn % 7)
        part, self.data = self.data[:size], self.data[size:]
        return part


# --- reading -----------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("encoding, scale", [("s16le", 2**15), ("f32le", 1)])
def test_pcm_is_read_however_it_trickles(channels, encoding, scale):
    pcm = (noise(1003, channels) * scale).astype(
        {"s16le": "<i2", "f32le": "<f4"}[encoding]
    )
    expected = torch.from_numpy(pcm / scale).mean(1)[None].float()
    options = {"channels": channels, "encoding": encoding}
    for source in (io.BytesIO, Trickle):
        heard = read(source(pcm.tobytes()), **options)
        torch.testing.assert_close(heard, expected)


def test_a_cut_sample_at_the_end_is_counted():
    with PcmReader(io.BytesIO(bytes(1003)), RATE, channels=2) as reader:
        assert sum(b.shape[1] for b in reader.blocks(0.01)) == 250
        assert reader.cut == 3
    with PcmReader(io.BytesIO(bytes(161)), RATE) as reader:
        assert [b.shape[1] for b in reader.blocks(0.01)] == [80]
        assert reader.cut == 1


@pytest.mark.parametrize("source", [io.BytesIO, Trickle])
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "RF64"])
def test_a_wav_stream_says_what_it_is(tmp_path, source, subtype, kind):
    samples = noise(999, 2)
    path = tmp_path / "a.wav"
    soundfile.write(path, samples, 44100, subtype, format=kind)
    content = path.read_bytes() + b"LIST\x04\0\0\0none"
    if kind == "RF64":  # whose size is elsewhere: it is read to its end
        content = content[:-12]
    heard = read(source(content), sample_rate=1)
    expected = torch.from_numpy(samples).mean(1)[None]
    torch.testing.assert_close(heard, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [0, 2**31 - 1, 2**32 - 1])
def test_a_wav_stream_of_unknown_size_is_read_to_its_end(tmp_path, size):
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(999), RATE)
    content = path.read_bytes()
    place = content.index(b"data") + 4
    content = content[:place] + struct.pack("<I", size) + content[place + 4 :]
    assert read(io.BytesIO(content)).shape == (1, 999)


def test_wav_streams_that_cannot_be_read_are_told(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(999), RATE, "PCM_24")
    with pytest.raises(ValueError, match="of kind 1 with 24 bits: give 16"):
        read(io.BytesIO(path.read_bytes()))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="the WAV header is incomplete"):
        read(io.BytesIO(path.read_bytes()[:40]))
    assert signal.getsignal(signal.SIGINT) == before
    soundfile.write(path, noise(999), RATE, "PCM_16")
    content = bytearray(path.read_bytes())
    content[22:24] = bytes(2)
    with pytest.raises(ValueError, match="0 channels at 8000 Hz"):
        read(io.BytesIO(content))
    with pytest.raises(ValueError, match="no fmt chunk"):
        read(io.BytesIO(b"RIFF\0\0\0\0WAVEdata\0\0\0\0"))


# --- separating --------------------------------------------------------------


@pytest.mark.parametrize("block", [0.003, 0.016, 0.5])
@pytest.mark.parametrize("rate", [8000, 44100])
def test_what_comes_out_is_what_the_stream_gives(model, rate, block):
    samples = noise(rate // 5)
    sink = io.BytesIO()
    with PcmReader(
        io.BytesIO(samples.tobytes()), rate, encoding="f32le"
    ) as reader:
        load = separate_live(model, reader, block, sink)
    out = np.frombuffer(sink.getvalue(), "<f4").reshape(-1, 2)
    expected = model.separate_audio(
        torch.from_numpy(samples.T), rate, streaming=True
    )[0]
    assert len(out) == len(samples)
    assert load.audio == pytest.approx(0.2)
    np.testing.assert_allclose(out, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 44100, 48000, 11025])
def test_samples_come_out_within_the_latency_told(model, rate):
    latency = model.stream_latency(rate)
    heard = given = 0

    def blocks():
        nonlocal heard
        for _ in range(rate // 40):
            heard += 1
            yield torch.zeros(1, 1)
            assert given / rate > heard / rate - latency

    for part in model.separate_stream(blocks(), rate):
        given += part.shape[1]
    assert given == heard


def test_nothing_is_heard_beyond_the_latency_told(model):
    rate, place = 44100, 4000
    samples = torch.randn(1, 8000)
    other = samples.clone()
    other[:, place:] = torch.randn(1, 4000)
    one, two = (
        model.separate_audio(x, rate, streaming=True) for x in (samples, other)
    )
    early = place - round(model.stream_latency(rate) * rate)
    torch.testing.assert_close(one[:, :early], two[:, :early])
    assert not torch.allclose(one[:, place:], two[:, place:])


def test_sixteen_bits_clip_and_are_counted():
    load = Load()
    sources = torch.tensor([[1.5, -1.0], [0.25, -2.0]])
    pcm = np.frombuffer(load.encode(sources, "s16le"), "<i2")
    assert pcm.tolist() == [32767, -32768, 8192, -32768]
    assert load.clipped == 2


def test_load_is_told_in_little_memory():
    load = Load()
    spent = np.random.default_rng(0).uniform(0.001, 0.002, 10_000)
    clock = iter(np.stack([np.zeros_like(spent), spent], 1).ravel())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "speechbrain_flashformer.inference.live.perf_counter",
            lambda: next(clock),
        )
        for _ in load.watch(iter([torch.zeros(1, 15)] * 10_000), 8000):
            pass
    assert load.spent / load.audio == pytest.approx(0.8, rel=0.01)
    assert load.percentile(99.9) == pytest.approx(0.001999, rel=0.011)
    assert load.percentile(50) == pytest.approx(0.0015, rel=0.011)
    assert load.overruns == (spent > 0.001875).sum()
    assert len(load.times) < 100


def test_a_stream_that_falls_behind_is_told_while_it_does(monkeypatch):
    # 10 s in time, 100 s too slow, 10 s in time.
    spent = np.repeat([0.5, 1.25, 0.5], [10, 100, 10])
    clock = iter(np.stack([np.zeros_like(spent), spent], 1).ravel())
    monkeypatch.setattr(
        "speechbrain_flashformer.inference.live.perf_counter",
        lambda: next(clock),
    )
    told = []
    load = Load(lambda value: told.append((load.audio, value)))
    for _ in load.watch([torch.zeros(1, 8000)] * 120, 8000):
        pass
    assert told == [(15, 1.25), (45, 1.25), (75, 1.25), (105, 1.25)]


def test_the_command_says_that_it_falls_behind(
    flashformer, capsys, monkeypatch
):
    # A clock that runs a second between two looks at it.
    clock = itertools.count()
    monkeypatch.setattr(
        "speechbrain_flashformer.inference.live.perf_counter",
        lambda: next(clock),
    )
    assert flashformer(pcm(6 * RATE).tobytes(), "--block", 500) == 0
    told = capsys.readouterr().err
    assert len(re.findall(r"falls behind: load [2-4]\.00 ", told)) == 1


@pytest.mark.parametrize("rate", [RATE, 44100])
def test_samples_that_are_no_sound_are_silence(model, rate):
    samples = noise(4000)[:, 0]
    broken = samples.copy()
    broken[1000:1003] = np.nan, np.inf, 1e30
    samples[1000:1003] = 0
    out = []
    for each in (samples, broken):
        sink, source = io.BytesIO(), io.BytesIO(each.tobytes())
        with PcmReader(source, rate, encoding="f32le") as reader:
            load = separate_live(model, reader, 0.016, sink)
        out.append(sink.getvalue())
    assert out[0] == out[1] and load.silenced == 3


def test_a_long_block_is_warmed_up_in_little_time(model, monkeypatch):
    fed = []
    feed = StreamingSeparator.feed

    def _count(self, block):
        fed.append(block.shape[1])
        return feed(self, block)

    monkeypatch.setattr(StreamingSeparator, "feed", _count)
    sound = io.BytesIO(bytes(2 * RATE))
    with PcmReader(sound, RATE) as reader:
        separate_live(model, reader, 30, io.BytesIO())
    assert sum(fed) < 4 * RATE


# --- in a process ------------------------------------------------------------


def start(model_folder, *options, **pipes):
    return subprocess.Popen(
        [sys.executable, "-m", "speechbrain_flashformer.cli", "stream"]
        + ["--model", str(model_folder), *map(str, options)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Where tests run in the background, Ctrl-C is ignored from the start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **{"stdout": subprocess.PIPE, **pipes},
    )


def pcm(samples):
    return (noise(samples)[:, 0] * 2**15).astype("<i2")


def test_sources_come_while_sound_is_heard(model, packed_causal, tmp_path):
    process = start(packed_causal, "-o", "-", "-o", tmp_path / "out")
    heard = pcm(RATE)
    process.stdin.write(heard.tobytes())
    process.stdin.flush()
    # A block of 128 samples and 71 more before one is known.
    early = 4 * (RATE - 128 - 71)
    out = process.stdout.read(early)
    assert len(out) == early and process.poll() is None
    process.stdin.close()
    out += process.stdout.read()
    assert process.wait(60) == 0
    expected = model.separate_audio(
        torch.from_numpy(heard), RATE, streaming=True
    )[0].numpy()
    piped = np.frombuffer(out, "<i2").reshape(-1, 2) / 2**15
    np.testing.assert_allclose(piped, expected, atol=1e-4)
    for i in range(2):
        path = tmp_path / f"out/stdin_s{i + 1}.wav"
        assert soundfile.info(path).format == "WAV"
        np.testing.assert_allclose(
            soundfile.read(path)[0], expected[:, i], atol=1e-6
        )
    told = process.stderr.read().decode()
    assert "latency 25.0 ms: block 16, network 9.0, resampling 0.0" in told
    assert "1.0 s processed; load" in told and "99.9% of the blocks" in told


@pytest.mark.parametrize(
    "sent, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_what_was_heard_is_finished_when_stopped(
    packed_causal, tmp_path, sent, status
):
    process = start(packed_causal, "-o", "-", "-o", tmp_path / "out")
    process.stdin.write(pcm(RATE).tobytes())
    process.stdin.flush()
    out = process.stdout.read(4 * (RATE - 200))  # it has begun
    time.sleep(0.2)
    process.send_signal(sent)
    # The pipe stays open: it is not the end of the input that ends it.
    out += process.stdout.read()
    assert process.wait(60) == status
    written = soundfile.read(tmp_path / "out/stdin_s1.wav")[0]
    assert len(out) == 4 * len(written)
    # All but the block that was not whole.
    assert RATE - 128 < len(written) <= RATE
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert b"processed; load" in process.stderr.read()


def test_it_ends_when_nobody_listens(packed_causal, tmp_path):
    process = start(packed_causal, "-o", "-", "-o", tmp_path / "out")

    def speak():
        try:
            for _ in range(1000):
                process.stdin.write(pcm(RATE).tobytes())
        except BrokenPipeError:
            pass

    speaker = threading.Thread(target=speak)
    speaker.start()
    process.stdout.read(1000)
    process.stdout.close()
    assert process.wait(100) == 0
    speaker.join()
    errors = process.stderr.read()
    assert b"processed; load" in errors and b"Error" not in errors
    frames = soundfile.info(tmp_path / "out/stdin_s1.wav").frames
    assert 250 <= frames < 100 * RATE


# --- the command, in this process --------------------------------------------


@pytest.fixture
def flashformer(packed_causal, tmp_path, monkeypatch):
    """The command on sound from a file, its sources in tmp_path / "out"."""

    def run(sound, *options, model=packed_causal):
        (tmp_path / "sound").write_bytes(sound)
        with open(tmp_path / "sound") as file:
            monkeypatch.setattr(sys, "stdin", file)
            arguments = ["stream", "-o", tmp_path / "out", *options]
            arguments += ["--model", model] if model else []
            return cli.main([str(argument) for argument in arguments])

    return run


def test_raw_sound_of_another_rate_and_channels(
    flashformer, model, tmp_path, capsys
):
    stereo = np.stack([pcm(4410), pcm(4410)[::-1]])
    options = ("--rate", 44100, "--input-channels", 2, "--block", 5)
    assert flashformer(stereo.T.tobytes(), *options) == 0
    told = capsys.readouterr().err
    assert "latency 16.1 ms: block 5, network 9.0, resampling 2.1" in told
    expected = model.separate_audio(stereo, 44100, streaming=True)[0]
    written = soundfile.read(tmp_path / "out/stdin_s1.wav")[0]
    np.testing.assert_allclose(written, expected[:, 0].numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "options, sound, status, message",
    [
        ((), b"", 1, "no sound came on standard input"),
        (("--rate", 16000), "wav", 1, "--rate is 16000, but the WAV header"),
        (("--format", "f32le"), "wav", 1, "--format is f32le, but the WAV"),
        (("-o", "another"), b"", 2, "one folder only"),
        (("--block", 0), b"", 2, "--block must be more than 0"),
        (("--block", "inf"), b"", 2, "--block must be more than 0"),
        (("--rate", -1), b"", 2, "--rate and --input-channels must be 1"),
        (("--rate", 0), b"", 2, "--rate and --input-channels must be 1"),
        (("--rate", 44101), bytes(800), 1, "no filter of a sensible size"),
        ((), b"fLaC" + bytes(800), 1, "is FLAC, not PCM: decode it"),
    ],
)
def test_wrong_use_is_told(
    flashformer, tmp_path, capsys, options, sound, status, message
):
    if sound == "wav":
        soundfile.write(tmp_path / "a.wav", noise(100), RATE, "PCM_16")
        sound = (tmp_path / "a.wav").read_bytes()
    assert flashformer(sound, *options) == status
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_existing_files_stay_unless_told(flashformer, tmp_path, capsys):
    assert flashformer(bytes(2000)) == 0
    before = (tmp_path / "out/stdin_s1.wav").read_bytes()
    assert flashformer(bytes(4000)) == 1
    assert "stdin_s1.wav exists" in capsys.readouterr().err
    assert (tmp_path / "out/stdin_s1.wav").read_bytes() == before
    assert flashformer(bytes(4000), "--overwrite") == 0
    assert soundfile.info(tmp_path / "out/stdin_s1.wav").frames == 2000


def test_an_offline_model_says_what_to_do(flashformer, packed, capsys):
    assert flashformer(bytes(2000), model=packed) == 1
    told = capsys.readouterr().err
    assert "not causal and cannot stream: give a causal one" in told


def test_a_pipe_that_does_not_wait_is_read_to_its_end(packed_causal, tmp_path):
    """As some parents leave it: nothing there yet is not the end."""
    end, begin = os.pipe()
    os.set_blocking(end, False)
    process = subprocess.Popen(
        [sys.executable, "-m", "speechbrain_flashformer.cli", "stream"]
        + ["--model", packed_causal, "-o", tmp_path / "out"],
        stdin=end,
        stderr=subprocess.PIPE,
    )
    os.write(begin, bytes(3200))
    # It says this when all is ready and it begins to wait.
    while b"latency" not in process.stderr.readline():
        pass
    time.sleep(2)
    os.close(end)
    os.write(begin, bytes(3200))
    os.close(begin)
    assert process.wait(60) == 0
    assert soundfile.info(tmp_path / "out/stdin_s1.wav").frames == 3200
    process.stderr.close()


def test_closed_pipes_are_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["stream"]) == 2
    assert "standard input or output is closed" in capsys.readouterr().err


def test_terminals_are_told(monkeypatch, capsys):
    class Terminal:
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    assert cli.main(["stream"]) == 2
    assert "standard input is a terminal" in capsys.readouterr().err
