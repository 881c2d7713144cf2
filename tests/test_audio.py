"""Files in blocks: what is read, resampled and written, and what is refused."""

import itertools
import os
import re
import struct
import threading
from collections import namedtuple

import numpy as np
import pytest
import soundfile
import torch
from torchaudio.functional import resample

from speechbrain_flashformer.cli.separate import clean_up
from speechbrain_flashformer.inference import files
from speechbrain_flashformer.inference.audio import (
    AudioReader,
    Resampler,
)
from speechbrain_flashformer.inference.files import (
    SourceWriter,
    written_beside,
)
from speechbrain_flashformer.inference.pipeline import flow


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
    with pytest.raises(ValueError, match=r"empty\.wav has no samples"):
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


def mono(path, seconds=3, rate=16000, **options):
    """A recording that gets louder and softer; its samples."""
    noise = np.random.default_rng(0).normal(size=seconds * rate)
    samples = 0.1 * noise * (1.1 + np.sin(np.arange(len(noise)) / rate * 3))
    with soundfile.SoundFile(path, "w", rate, 1, **options) as file:
        file.write(samples)
    return samples


def heard(path):
    """What blocks give; as much as is promised before they are read."""
    reader = AudioReader(path)
    whole = torch.cat(list(reader.blocks(seconds=0.5)), 1)
    assert whole.shape == (reader.channels, reader.frames)
    return whole.numpy()[0]


def set_bytes(content, place, value):
    return content[:place] + value + content[place + len(value) :]


CONTAINERS = {
    "a.wav": {},
    "a.flac": {},
    "a.ogg": {},
    "a.opus": {"format": "OGG", "subtype": "OPUS"},
    "a.mp3": {},
    "a.aiff": {},
    "a.w64": {},
    "a.rf64": {},
    "a.caf": {},
    "a.au": {},
    "adpcm.wav": {"subtype": "IMA_ADPCM"},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_cut_file_that_promises_its_length_is_refused(tmp_path, name):
    mono(tmp_path / name, **CONTAINERS[name])
    content = (tmp_path / name).read_bytes()
    assert len(heard(tmp_path / name)) >= 48000
    (tmp_path / name).write_bytes(content[: 2 * len(content) // 3])
    with pytest.raises(ValueError, match=f"{name}.*ffmpeg"):
        heard(tmp_path / name)


# (container, where its size is after a mark, layout of that)
SIZES = {
    "a.wav": (b"data", 4, "<I"),
    "a.rf64": (b"ds64", 16, "<Q"),
    "a.w64": (bytes.fromhex("d3118cd100c04f8edb8a"), 10, "<Q"),
    "a.aiff": (b"SSND", 4, ">I"),
    "a.caf": (b"data", 4, ">Q"),
    "a.au": (b".snd", 8, ">I"),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("written", ["none", "most", "half of most"])
def test_a_size_that_nobody_wrote_is_no_size(tmp_path, name, written):
    mono(tmp_path / name)
    expected = heard(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    mark, behind, layout = SIZES[name]
    most = 2 ** (8 * struct.calcsize(layout))
    value = {"none": 0, "most": most - 1, "half of most": most // 2 - 1}
    # The last mark: a GUID has the same end as those before it.
    place = content.rindex(mark) + behind
    size = struct.pack(layout, value[written])
    (tmp_path / name).write_bytes(set_bytes(content, place, size))
    np.testing.assert_array_equal(heard(tmp_path / name), expected)


@pytest.mark.parametrize("size", [10**9, 2 * 10**9, 0x7FFFF000, 0x80000000])
def test_round_sizes_of_a_wav_are_no_sizes(tmp_path, size):
    mono(tmp_path / "a.wav")
    content = (tmp_path / "a.wav").read_bytes()
    for mark in (b"RIFF", b"data"):
        place = content.index(mark) + 4
        content = set_bytes(content, place, struct.pack("<I", size))
    (tmp_path / "a.wav").write_bytes(content)
    assert len(heard(tmp_path / "a.wav")) == 48000


def test_a_large_wav_that_is_cut_is_told(tmp_path):
    mono(tmp_path / "a.wav")
    content = (tmp_path / "a.wav").read_bytes()
    size = struct.pack("<I", 3 * 10**9 + 44)
    place = content.index(b"data") + 4
    (tmp_path / "a.wav").write_bytes(set_bytes(content, place, size))
    with pytest.raises(ValueError, match="96000 of 3000000044 bytes"):
        AudioReader(tmp_path / "a.wav")


@pytest.mark.parametrize("size", ["wrapped", "all ones"])
def test_more_sound_than_32_bits_count(tmp_path, size):
    path = tmp_path / "a.wav"
    mono(path)
    content = path.read_bytes()
    place = content.index(b"data") + 4
    count = 2**32 + 96000
    low = count % 2**32 if size == "wrapped" else 2**32 - 1
    path.write_bytes(set_bytes(content, place, struct.pack("<I", low)))
    with path.open("r+b") as file:
        file.truncate(place + 4 + count)  # a hole takes no room
    assert AudioReader(path).frames == count // 2


def test_a_wav_without_sound_has_no_samples_whatever_follows(tmp_path):
    mono(tmp_path / "a.wav")
    content = (tmp_path / "a.wav").read_bytes()
    place = content.index(b"data") + 4
    notes = bytes(4) + b"LIST" + struct.pack("<I", 6) + b"INFO.."
    (tmp_path / "a.wav").write_bytes(content[:place] + notes)
    with pytest.raises(ValueError, match="has no samples"):
        AudioReader(tmp_path / "a.wav")


def test_flac_of_unknown_length_is_read_to_its_end(tmp_path):
    path = tmp_path / "a.flac"
    mono(path)
    expected = heard(path)
    content = bytearray(path.read_bytes())
    # The last 36 bits before the MD5 sum in STREAMINFO.
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    np.testing.assert_array_equal(heard(path), expected)


def drop_xing(path):
    content = path.read_bytes()
    mark = re.search(b"Xing|Info", content[:200]).start()
    # The next header of the same kind.
    second = content.index(content[:2], mark)
    path.write_bytes(content[second:])


@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_mp3_without_a_count_is_read_to_its_end(tmp_path, mode, rate):
    path = tmp_path / "a.mp3"
    options = {"bitrate_mode": mode, "compression_level": 0.5}
    mono(path, rate=rate, **options)
    expected = heard(path)
    assert len(expected) == 3 * rate
    drop_xing(path)
    samples = heard(path)
    assert 0 <= len(samples) - 3 * rate < 3 * 1152
    # What follows is the same but for the encoder's delay, 576 samples.
    np.testing.assert_allclose(
        samples[576 + 2000 :][: 2 * rate],
        expected[2000:][: 2 * rate],
        atol=1e-3,
    )


def test_mp3_with_other_things_between_is_read_to_its_end(tmp_path):
    path = tmp_path / "a.mp3"
    mono(path)
    once = path.read_bytes()
    tag = b"ID3\4\0\0\0\0\x20\0" + 1024 * b"\xff\xfb\x90\x00"
    last = b"TAG" + bytes(125)
    path.write_bytes(tag + once + last + tag + once + last)
    samples = heard(path)
    assert 0 <= len(samples) - 96000 < 4 * 1152


@pytest.mark.parametrize("size", [0, 10])
def test_a_tag_at_the_end_of_an_mp3_ends_it(tmp_path, size):
    path = tmp_path / "a.mp3"
    mono(path)
    once = heard(path)
    tag = b"ID3\4\0\0\0\0\0" + bytes([size])
    for end in (tag, tag + bytes(size), tag[:5]):
        content = path.read_bytes()
        path.write_bytes(content + end)
        np.testing.assert_array_equal(heard(path), once)
    path.write_bytes(tag[:5])
    with pytest.raises(ValueError, match=r"no MPEG frames .*a\.mp3"):
        AudioReader(path)


@pytest.mark.parametrize(
    "between",
    [b"TXXX comment, ID3 tagged by someone\0", b"ID3\4\0\0\x80\1\0\0"]
    + [b"ID3\4\0\0\x7f\x7f\x7f\x7f"],
)
def test_what_is_no_tag_skips_nothing_of_an_mp3(tmp_path, between):
    path = tmp_path / "a.mp3"
    mono(path)
    once = path.read_bytes()
    path.write_bytes(once + between + once)
    assert 0 <= len(heard(path)) - 96000 < 4 * 1152


def test_mp3_in_a_wav_is_read_to_its_end(tmp_path):
    path = tmp_path / "a.mp3"
    mono(path, bitrate_mode="VARIABLE", compression_level=0.5)
    drop_xing(path)
    expected = heard(path)
    kind = struct.pack(
        "<HHIIHHHHIHHH", 85, 1, 16000, 4000, 1, 0, 12, 1, 2, 288, 1, 1393
    )
    mp3 = path.read_bytes()
    chunks = (
        (b"fmt ", kind),
        (b"fact", struct.pack("<I", 48000)),
        (b"data", mp3),
    )
    wav = b"WAVE" + b"".join(
        name + struct.pack("<I", len(content)) + content
        for name, content in chunks
    )
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF" + struct.pack("<I", len(wav)) + wav)
    np.testing.assert_array_equal(heard(path), expected)


def test_mpeg_of_layer_two_is_read_to_its_end_or_refused(tmp_path):
    path = tmp_path / "a.mp2"
    # 44.1 kHz, 192 kbit/s, silent; every other frame has a byte more.
    frames = bytes.fromhex("fffda000") + bytes(622)
    frames += bytes.fromhex("fffda200") + bytes(623)
    path.write_bytes(100 * frames)
    assert len(heard(path)) == 200 * 1152
    low = bytes.fromhex("fffd1000") + bytes(100)
    path.write_bytes(100 * frames + 1000 * low)
    with pytest.raises(ValueError, match="of 1382400 samples can be read"):
        heard(path)


@pytest.mark.parametrize("name", ["a.ogg", "a.opus", "a.flac", "a.mp3"])
def test_joined_streams_are_read_to_the_end_of_the_last(tmp_path, name):
    path = tmp_path / name
    mono(path, **CONTAINERS[name])
    once, content = heard(path), path.read_bytes()
    path.write_bytes(content + content)
    twice = heard(path)
    assert 0 <= len(twice) - 2 * len(once) < 4 * 1152
    if name != "a.mp3":
        np.testing.assert_array_equal(twice[: len(once)], once)
        np.testing.assert_array_equal(twice[len(once) :], once)


@pytest.mark.parametrize("name", ["a.wav", "a.rf64", "a.caf", "a.au", "a.aiff"])
def test_joined_files_that_cannot_be_are_refused(tmp_path, name):
    mono(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content + content)
    with pytest.raises(ValueError, match=f"{name} is of several files"):
        AudioReader(tmp_path / name)


@pytest.mark.parametrize("order", ["sff", "fs", "fsf", "ss"])
def test_flac_without_comments_is_joined_like_others(tmp_path, order):
    path = tmp_path / "a.flac"
    mono(path)
    once, full = heard(path), path.read_bytes()
    # Metadata end with their first block, which is 34 bytes long.
    place, is_last = 4, False
    while not is_last:
        is_last = full[place] >= 0x80
        place += 4 + int.from_bytes(full[place + 1 : place + 4], "big")
    stripped = b"fLaC\x80" + full[5:42] + full[place:]
    joined = {"f": full, "s": stripped}
    path.write_bytes(b"".join(joined[kind] for kind in order))
    np.testing.assert_array_equal(heard(path), np.tile(once, len(order)))


@pytest.mark.parametrize("first", [0.5, 1])
def test_joined_mp3_of_which_one_is_cut_are_refused(tmp_path, first):
    path = tmp_path / "a.mp3"
    mono(path)
    content = path.read_bytes()
    half = content[: len(content) // 2]
    path.write_bytes(content + half if first == 1 else half + content)
    with pytest.raises(ValueError, match=r"a\.mp3 is cut short, it holds"):
        AudioReader(path)


def test_an_ogg_file_cut_between_pages_is_told(tmp_path, recwarn):
    path = tmp_path / "a.ogg"
    mono(path)
    heard(path)
    assert not recwarn
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"OggS")])
    with pytest.warns(UserWarning, match=r"a\.ogg has no end"):
        AudioReader(path)


@pytest.mark.parametrize(
    "name, notes",
    [
        ("a.caf", b"free" + struct.pack(">Q", 4) + bytes(4)),
        ("a.wav", b"LIST" + struct.pack("<I", 6) + b"INFO.."),
        ("a.w64", b"free" + bytes(12) + struct.pack("<Q", 32) + bytes(8)),
        ("a.aiff", b"ANNO" + struct.pack(">I", 3) + b"abc\0"),
        ("odd.wav", b"LIST" + struct.pack("<I", 6) + b"INFO.."),
    ],
)
def test_joined_files_with_chunks_between_are_refused(tmp_path, name, notes):
    path = tmp_path / name
    if name == "odd.wav":
        soundfile.write(path, np.zeros(999), 8000, "PCM_U8")
    else:
        mono(path)
    once = path.read_bytes() + notes
    path.write_bytes(once)
    assert len(heard(path)) >= 999
    path.write_bytes(once + once)
    with pytest.raises(ValueError, match=f"{name} is of several files"):
        AudioReader(path)


@pytest.mark.parametrize("subtype", ["MS_ADPCM", "GSM610", "IMA_ADPCM"])
@pytest.mark.parametrize("size", [0, 2**32 - 1])
def test_a_coded_wav_without_its_size_is_read(tmp_path, subtype, size):
    path = tmp_path / "a.wav"
    mono(path, subtype=subtype)
    expected, content = heard(path), path.read_bytes()
    for mark in (b"RIFF", b"data"):
        place = content.index(mark) + 4
        content = set_bytes(content, place, struct.pack("<I", size))
    path.write_bytes(content)
    np.testing.assert_array_equal(heard(path), expected)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.au", b".snd"),
        ("a.wav", b"RF64\xff\xff\xff\xffWAVEdata\xff\xff\xff\xff"),
    ],
)
def test_a_file_that_is_less_than_a_header_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is cut short, in its head"):
        AudioReader(tmp_path / name)


@pytest.mark.parametrize("kind", ["AVR", "NIST", "SVX", "VOC"])
@pytest.mark.parametrize("missing", [1, 8000])
def test_seldom_kinds_are_whole_or_refused(tmp_path, kind, missing):
    path = tmp_path / f"a.{kind.lower()}"
    samples = np.random.default_rng(0).uniform(-1, 1, (8000, 1 + missing % 2))
    samples = samples[:, : 1 if kind == "SVX" else None]  # it has but one
    soundfile.write(path, samples, 8000, "PCM_16", format=kind)
    whole = path.read_bytes()
    np.testing.assert_allclose(heard(path), samples[:, 0], atol=1e-4)
    path.write_bytes(whole[: len(whole) - (kind == "VOC") - missing])
    with pytest.raises(ValueError, match=rf"a\.{kind.lower()} is cut short"):
        AudioReader(path)
    path.write_bytes(whole + whole)
    with pytest.raises(ValueError, match=r"is of several files"):
        AudioReader(path)


def test_voc_files_whose_size_has_too_few_bits_are_read(tmp_path):
    path = tmp_path / "long.voc"
    soundfile.write(path, np.zeros(9_000_000), 8000, "PCM_16", format="VOC")
    assert AudioReader(path).frames == 9_000_000


def test_what_follows_the_blocks_of_a_voc_file_is_none(tmp_path):
    path = tmp_path / "a.voc"
    soundfile.write(path, np.ones(8000) / 2, 8000, "PCM_16", format="VOC")
    path.write_bytes(path.read_bytes()[:-1] + b"     ")
    assert AudioReader(path).frames >= 8000


@pytest.mark.parametrize("coding", ["ULAW", "ALAW", "PCM_32"])
def test_nist_files_of_every_coding_are_read(tmp_path, coding):
    path = tmp_path / "a.nist"
    soundfile.write(path, np.ones((800, 2)) / 2, 8000, coding, format="NIST")
    assert AudioReader(path).frames == 800
    content = path.read_bytes()
    path.write_bytes(content.replace(b"sample_n_bytes -i 1", b"#" * 19))
    assert AudioReader(path).frames == 800


def test_a_shortened_nist_file_names_what_unpacks_it(tmp_path):
    path = tmp_path / "a.wv1"
    soundfile.write(path, np.ones(800) / 2, 8000, "PCM_16", format="NIST")
    told = b"sample_coding -s26 pcm,embedded-shorten-v1.1"
    content = path.read_bytes()
    header = re.sub(rb"sample_coding -s3 pcm", told, content[:1024])[:1024]
    path.write_bytes(header + content[1024:])
    with pytest.raises(ValueError, match="with shorten: unpack it with 'sph2p"):
        AudioReader(path)


@pytest.mark.parametrize("kind", ["MAT5", "SDS", "XI"])
def test_kinds_that_cannot_be_checked_are_refused(tmp_path, kind):
    subtype = "DPCM_16" if kind == "XI" else None
    path = tmp_path / "a.mat"
    soundfile.write(path, np.zeros(999), 44100, subtype, format=kind)
    with pytest.raises(ValueError, match=rf"a\.mat is a file of kind {kind}"):
        AudioReader(path)


@pytest.mark.parametrize("name", ["a.ogg", "a.mp3"])
def test_joined_streams_of_two_rates_are_refused(tmp_path, name):
    mono(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    mono(tmp_path / name, rate=44100)
    content += (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} changes its rate"):
        AudioReader(tmp_path / name)


@pytest.mark.skipif(os.name == "nt", reason="no FIFO there")
@pytest.mark.parametrize("cut", [False, True])
def test_a_pipe_is_read_once_and_given_twice(tmp_path, cut):
    mono(tmp_path / "a.wav")
    expected = heard(tmp_path / "a.wav")
    content = (tmp_path / "a.wav").read_bytes()
    pipe = tmp_path / "pipe.wav"
    os.mkfifo(pipe)
    content = content[:20000] if cut else content
    feed = threading.Thread(target=pipe.write_bytes, args=[content])
    feed.start()
    if cut:
        with pytest.raises(ValueError, match=r"pipe\.wav is cut short"):
            AudioReader(pipe)
    else:
        reader = AudioReader(pipe)
        for _ in range(2):
            whole = torch.cat(list(reader.blocks()), 1)
            np.testing.assert_array_equal(whole[0], expected)
    feed.join()


def test_a_name_that_is_no_utf8_is_read_and_written(tmp_path):
    name = os.fsdecode(b"caf\xe9.wav")
    try:
        (tmp_path / name).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    mono(tmp_path / "a.wav")
    (tmp_path / "a.wav").replace(tmp_path / name)
    sources = torch.from_numpy(heard(tmp_path / name))[:, None]
    write([tmp_path / "out" / name], sources, subtype="pcm16")
    np.testing.assert_allclose(
        heard(tmp_path / "out" / name), sources[:, 0], atol=1e-4
    )


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
    parts = list(flow(whole.split(block, 1), [Resampler(old, new)]))
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
            writer.write(part.T[None])


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
        writer.write(torch.zeros(1, 2, 50))
        raise RuntimeError("on the way")
    assert list(paths[0].parent.iterdir()) == []


def test_a_failure_keeps_the_old_files(paths):
    write(paths, torch.ones(10, 2))
    with (
        pytest.raises(RuntimeError),
        SourceWriter(paths, 8000, 100, overwrite=True) as writer,
    ):
        writer.write(torch.zeros(1, 2, 50))
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

    monkeypatch.setattr(files.soundfile.SoundFile, "write", full)
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


@pytest.mark.parametrize(
    "options, needed",
    [({}, 8), ({"normalize": True}, 12)]
    + [({"subtype": "pcm16"}, 10), ({"subtype": "pcm24"}, 11)],
)
def test_what_is_written_anew_has_to_fit_too(
    paths, monkeypatch, options, needed
):
    # More samples than 32 bits count, and a disk that has a byte too few.
    frames = 2**33
    usage = namedtuple("usage", "free")(needed * frames - 1)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    message = f"need {needed * frames / 1e6:.0f} MB"
    with (
        pytest.raises(OSError, match=message),
        SourceWriter(paths, 8000, frames, **options),
    ):
        raise AssertionError("began all the same")


@pytest.mark.parametrize(
    "exists, failing",
    [(False, 1), (False, 2)] + [(True, number) for number in (1, 2, 3, 4)],
)
def test_a_rename_that_fails_leaves_all_as_it_was(
    paths, monkeypatch, exists, failing
):
    if exists:
        write(paths, torch.zeros(10, 2))
    before = {
        path.name: path.read_bytes() for path in paths[0].parent.glob("*")
    }
    replace, count = os.replace, itertools.count(1)

    def refuse(source, target):
        if next(count) == failing:
            raise OSError("no rename today")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OSError, match="no rename today"):
        write(paths, torch.ones(10, 2), overwrite=True)
    after = {path.name: path.read_bytes() for path in paths[0].parent.iterdir()}
    assert after == before


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_signal_right_after_a_rename_undoes_it(paths, monkeypatch, number):
    write(paths, torch.zeros(10, 2))
    stop_after(monkeypatch, number)
    with pytest.raises(SystemExit):
        write(paths, torch.ones(10, 2), overwrite=True)
    assert not read(paths).any()
    assert sorted(paths[0].parent.iterdir()) == paths


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_what_a_killed_process_replaced_comes_back(paths, monkeypatch, number):
    write(paths, torch.zeros(10, 2))
    # As a process that is killed: it undoes nothing.
    stop_after(monkeypatch, number)
    monkeypatch.setattr(files, "_undo_rename", lambda *_: None)
    monkeypatch.setattr(SourceWriter, "_discard", lambda _: None)
    with pytest.raises(SystemExit):
        write(paths, torch.ones(10, 2), overwrite=True)
    monkeypatch.undo()
    folder = paths[0].parent
    task = (folder / "a.wav", folder, "a")
    written, failure = clean_up(task, os.getpid(), -9)
    assert not written and "its process died" in failure
    # Once all had their names, they are the new ones.
    assert read(paths).all() if number == 4 else not read(paths).any()
    assert sorted(folder.iterdir()) == paths


def stop_after(monkeypatch, number):
    replace, count = os.replace, itertools.count(1)

    def replace_and_stop(source, target):
        replace(source, target)
        if next(count) == number:
            raise SystemExit

    monkeypatch.setattr(files.os, "replace", replace_and_stop)


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

    monkeypatch.setattr(files.soundfile, "SoundFile", refuse)
    with pytest.raises(OSError, match="cannot write in .*out"):
        write(paths, torch.zeros(10, 2))
    assert list(paths[0].parent.iterdir()) == []


def test_a_second_file_that_cannot_be_opened_takes_the_first(
    paths, monkeypatch
):
    real, opened = soundfile.SoundFile, []

    def refuse_second(*arguments, **options):
        opened.append(arguments)
        if len(opened) == 2:
            raise soundfile.LibsndfileError(2, "Error opening: ")
        return real(*arguments, **options)

    monkeypatch.setattr(files.soundfile, "SoundFile", refuse_second)
    with pytest.raises(OSError, match="cannot write in .*out"):
        write(paths, torch.zeros(10, 2))
    assert list(paths[0].parent.iterdir()) == []


def test_what_appears_meanwhile_is_not_replaced(paths):
    with (
        pytest.raises(FileExistsError, match=r"a_s2\.wav exists"),
        SourceWriter(paths, 8000, 10) as writer,
    ):
        writer.write(torch.zeros(1, 2, 10))
        paths[1].write_text("mine")
    assert [path.name for path in paths[0].parent.iterdir()] == ["a_s2.wav"]
    assert paths[1].read_text() == "mine"


def test_long_recordings_get_a_header_that_holds_them(paths, monkeypatch):
    monkeypatch.setattr(files, "WAV_LIMIT", 1000)
    write(paths, torch.ones(500, 2))
    assert soundfile.info(paths[0]).format == "RF64"
    assert read(paths).all()


def test_pcm_that_fits_a_wav_is_one(paths, monkeypatch):
    monkeypatch.setattr(files, "WAV_LIMIT", 1500)
    write(paths, torch.ones(500, 2), subtype="pcm16")
    assert soundfile.info(paths[0]).format == "WAV"


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


@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_what_is_written_beside_is_whole_or_not_there(
    tmp_path, is_folder, fails
):
    def fill(path, text):
        if is_folder:
            path.mkdir()
            path = path / "inside"
        path.write_text(text)

    def held(path):
        return (path / "inside" if is_folder else path).read_text()

    path = tmp_path / "new" / "a"
    with written_beside(path) as partial:
        fill(partial, "old")
        assert not path.exists()
    assert held(path) == "old"
    if fails:
        with pytest.raises(KeyboardInterrupt), written_beside(path) as partial:
            fill(partial, "half")
            raise KeyboardInterrupt
    else:
        with written_beside(path) as partial:
            fill(partial, "new")
    assert held(path) == ("old" if fails else "new")
    assert list(path.parent.iterdir()) == [path]


def test_no_file_is_written_over_a_folder(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "kept.txt").write_text("mine")
    with pytest.raises(OSError), written_beside(folder) as partial:
        partial.write_text("a file")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "kept.txt"]


def test_unknown_subtype_is_refused(paths):
    with pytest.raises(ValueError, match="choose one of float, pcm16, pcm24"):
        SourceWriter(paths, 8000, 10, subtype="mp3")
