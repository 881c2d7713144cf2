"""Files in blocks: what is read, resampled and written, and what is refused."""

import numpy as np
import pytest
import soundfile
import torch
from torchaudio.functional import resample

from speechbrain_flashformer import audio
from speechbrain_flashformer.audio import (
    AudioReader,
    Resampler,
    SourceWriter,
    resample_blocks,
)


@pytest.mark.parametrize(
    "name, subtype, tolerance",
    [
        ("a.wav", "PCM_16", 1e-4),
        ("a.wav", "PCM_24", 1e-6),
        ("a.wav", "FLOAT", 0),
        ("a.flac", "PCM_24", 1e-6),
    ],
)
def test_blocks_give_the_file(tmp_path, name, subtype, tolerance):
    samples = np.random.default_rng(0).uniform(-1, 1, (1001, 2))
    soundfile.write(tmp_path / name, samples, 44100, subtype)
    reader = AudioReader(tmp_path / name)
    assert (reader.sample_rate, reader.channels, reader.frames) == (
        44100,
        2,
        1001,
    )
    whole = torch.cat(list(reader.blocks(seconds=100 / 44100)), 1)
    expected = torch.from_numpy(samples.T).float()
    torch.testing.assert_close(whole, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "content, message",
    [(b"not audio", "cannot read .*text.wav"), (b"", "cannot read .*text.wav")],
)
def test_a_text_named_wav_is_refused(tmp_path, content, message):
    (tmp_path / "text.wav").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        AudioReader(tmp_path / "text.wav")


def test_missing_and_empty_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.wav"):
        AudioReader(tmp_path / "none.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 8000)
    with pytest.raises(ValueError, match=r"empty\.wav holds no samples"):
        AudioReader(tmp_path / "empty.wav")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path, bad):
    samples = np.zeros(16000)
    samples[9000] = bad
    soundfile.write(tmp_path / "nan.wav", samples, 8000, "FLOAT")
    reader = AudioReader(tmp_path / "nan.wav")
    with pytest.raises(ValueError, match=r"nan\.wav .*block at 1\.0 s"):
        list(reader.blocks(seconds=1))


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "cut.flac"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 80000)
    soundfile.write(path, noise, 8000)
    path.write_bytes(path.read_bytes()[:60000])
    with pytest.raises(ValueError, match=r"cut\.flac"):
        list(AudioReader(path).blocks(seconds=1))


def test_a_truncated_wav_is_refused_and_one_from_a_pipe_is_not(tmp_path):
    path = tmp_path / "cut.wav"
    soundfile.write(path, np.full(8000, 0.1), 8000)
    content = path.read_bytes()
    path.write_bytes(content[:9000])
    with pytest.raises(ValueError, match=r"cut\.wav is cut short"):
        AudioReader(path)
    # A pipe's header cannot know how long the audio will be.
    size = content.index(b"data") + 4
    path.write_bytes(content[:size] + b"\xff" * 4 + content[size + 4 :])
    assert AudioReader(path).frames == 8000


@pytest.mark.parametrize(
    "old, new",
    [(44100, 8000), (8000, 44100), (48000, 8000), (8000, 16000), (11025, 8000)],
)
@pytest.mark.parametrize("block", [1, 37, 1000, 10**6])
def test_resampling_in_blocks_equals_the_whole(old, new, block):
    if block == 1:
        whole = torch.randn(2, 700)
    else:
        whole = torch.randn(2, 20011)
    parts = list(resample_blocks(whole.split(block, 1), old, new))
    expected = resample(whole, old, new)
    out = torch.cat(parts, 1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "old, new", [(44100, 8000), (8000, 44100), (48000, 8000), (8000, 11025)]
)
def test_resampled_samples_come_within_the_latency(old, new):
    resampler = Resampler(old, new)
    assert resampler.latency < 0.003
    given = 0
    for fed in range(1, old // 20):
        given += resampler.feed(torch.zeros(1, 1)).shape[1]
        assert given / new > fed / old - resampler.latency


def test_resampler_holds_little():
    resampler = Resampler(44100, 8000)
    for _ in range(100):
        resampler.feed(torch.zeros(1, 10000))
        assert resampler.buffer.shape[1] < 10000


# --- writing -----------------------------------------------------------------


def write(paths, sources, **options):
    with SourceWriter(paths, 8000, len(sources), **options) as writer:
        for part in sources.split(300):
            writer.write(part)


def read(paths):
    return np.stack([soundfile.read(path)[0] for path in paths], 1)


@pytest.fixture
def paths(tmp_path):
    return [tmp_path / "out" / f"a_s{i}.wav" for i in (1, 2)]


def test_float_files_keep_any_level(paths):
    sources = 5 * torch.randn(1000, 2)
    write(paths, sources)
    np.testing.assert_array_equal(read(paths), sources.numpy())


@pytest.mark.parametrize(
    "subtype, step", [("pcm16", 2**-15), ("pcm24", 2**-23)]
)
@pytest.mark.parametrize("peak", [0.5, 1.0, 4.0])
def test_pcm_does_not_clip_and_keeps_the_balance(paths, subtype, step, peak):
    sources = torch.rand(1000, 2) * 2 - 1
    sources *= peak / sources.abs().max()
    write(paths, sources, subtype=subtype)
    # Full scale fits but for half a step.
    gain = 1 if peak <= 1 else 0.99 / peak
    np.testing.assert_allclose(
        read(paths), gain * sources.numpy(), atol=1.01 * step + 1e-7
    )
    assert soundfile.info(paths[0]).subtype == subtype.upper().replace(
        "PCM", "PCM_"
    )


def test_normalize_is_one_gain_and_leaves_silence(paths):
    sources = torch.randn(1000, 2) * torch.tensor([0.01, 0.001])
    write(paths, sources, normalize=True)
    out = read(paths)
    assert abs(np.abs(out).max() - 0.9) < 1e-6
    ratio = out / sources.numpy()
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-4)
    write(paths, torch.zeros(1000, 2), normalize=True, overwrite=True)
    assert not read(paths).any()


def test_existing_files_stay_unless_told(paths):
    write(paths, torch.zeros(10, 2))
    with pytest.raises(FileExistsError, match=r"a_s1\.wav exists"):
        write(paths, torch.ones(10, 2))
    assert not read(paths).any()
    write(paths, torch.ones(10, 2), overwrite=True)
    assert read(paths).all()


def test_a_failure_leaves_nothing(paths):
    with (
        pytest.raises(RuntimeError, match="on the way"),
        SourceWriter(paths, 8000, 100) as writer,
    ):
        writer.write(torch.zeros(50, 2))
        raise RuntimeError("on the way")
    assert list(paths[0].parent.iterdir()) == []


def test_a_failure_keeps_the_old_files(paths):
    write(paths, torch.ones(10, 2))
    with (
        pytest.raises(RuntimeError),
        SourceWriter(paths, 8000, 100, overwrite=True) as writer,
    ):
        writer.write(torch.zeros(50, 2))
        raise RuntimeError
    assert read(paths).all()
    assert sorted(path.name for path in paths[0].parent.iterdir()) == [
        "a_s1.wav",
        "a_s2.wav",
    ]


@pytest.mark.parametrize("when", ["write", "rewrite"])
def test_a_full_disk_is_told_and_leaves_nothing(paths, monkeypatch, when):
    real = soundfile.SoundFile.write
    subtype = "FLOAT" if when == "write" else "PCM_16"

    def full(self, data):
        if self.subtype == subtype:
            # What soundfile does on a short count of libsndfile.
            raise AssertionError
        real(self, data)

    monkeypatch.setattr(audio.soundfile.SoundFile, "write", full)
    with pytest.raises(OSError, match="is the disk full"):
        write(paths, torch.zeros(100, 2), subtype="pcm16")
    assert list(paths[0].parent.iterdir()) == []


def test_too_small_a_disk_is_told_before_work(paths):
    with (
        pytest.raises(OSError, match="MB free, the sources need"),
        SourceWriter(paths, 8000, 10**15),
    ):
        raise AssertionError("began all the same")
    assert list(paths[0].parent.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "out").write_text("a file")
    with (
        pytest.raises(OSError, match="cannot write in .*out"),
        SourceWriter([tmp_path / "out" / "a.wav"], 8000, 10),
    ):
        raise AssertionError("began all the same")


def test_a_folder_without_permission_is_told(paths, monkeypatch):
    # As root every folder can be written: let the system say no.
    def refuse(*arguments, **options):
        raise soundfile.LibsndfileError(2, "Error opening: ")

    monkeypatch.setattr(audio.soundfile, "SoundFile", refuse)
    with pytest.raises(OSError, match="cannot write in .*out"):
        write(paths, torch.zeros(10, 2))
    assert list(paths[0].parent.iterdir()) == []


def test_long_recordings_get_a_header_that_holds_them(paths, monkeypatch):
    monkeypatch.setattr(audio, "WAV_LIMIT", 1000)
    write(paths, torch.ones(500, 2))
    assert soundfile.info(paths[0]).format == "RF64"
    assert read(paths).all()


def test_a_folder_in_the_place_of_a_file_is_told(paths):
    write(paths, torch.ones(10, 2))
    paths[1].unlink()
    paths[1].mkdir()
    with pytest.raises(IsADirectoryError, match="a_s2.wav is a folder"):
        write(paths, torch.zeros(10, 2), overwrite=True)
    assert soundfile.read(paths[0])[0].all()


def test_the_longest_names_can_be_written(tmp_path):
    path = tmp_path / ("x" * 248 + "_s1.wav")
    write([path], torch.ones(10, 1))
    assert path.is_file()


def test_unknown_subtype_is_refused(paths):
    with pytest.raises(ValueError, match="choose one of float, pcm16, pcm24"):
        SourceWriter(paths, 8000, 10, subtype="mp3")
