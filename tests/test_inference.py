"""FlashFormerSeparation: any input, kept level, long files, safe loading."""

import inspect
import warnings

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.inference.separation import SepformerSeparation
from torchaudio.functional import resample

from speechbrain_flashformer.inference import FlashFormerSeparation
from speechbrain_flashformer.inference.options import SeparationOptions


@pytest.fixture(scope="module")
def model(packed_once):
    return FlashFormerSeparation.from_hparams(packed_once)


@pytest.fixture
def noise():
    return torch.randn(1, 24003, generator=torch.Generator().manual_seed(5))


def save(path, signal, rate, subtype=None):
    soundfile.write(path, np.asarray(signal.T), rate, subtype)
    return path


# --- the calls of SpeechBrain ------------------------------------------------


def test_calls_are_those_of_speechbrain():
    for name in ("separate_batch", "separate_file"):
        theirs = inspect.signature(getattr(SepformerSeparation, name))
        ours = inspect.signature(getattr(FlashFormerSeparation, name))
        assert list(ours.parameters)[: len(theirs.parameters)] == list(
            theirs.parameters
        )


def test_batch_rows_are_as_alone(model, noise):
    two = torch.cat([noise, noise.flip(1)])
    out = model.separate_batch(two)
    assert out.shape == (2, 24003, 2)
    torch.testing.assert_close(
        out[:1], model.separate_batch(noise), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(8000,), (1, 0), (1, 2, 8000)])
def test_batch_of_another_shape_is_refused(model, shape):
    with pytest.raises(ValueError, match=r"takes \[batch, time\]"):
        model.separate_batch(torch.zeros(shape))


# --- streaming ---------------------------------------------------------------


@pytest.fixture(scope="module")
def causal_model(packed_causal):
    return FlashFormerSeparation.from_hparams(packed_causal)


def test_a_causal_norm_is_not_that_of_the_recording(causal_model):
    with pytest.raises(ValueError, match="over the past: take 'chunk'"):
        causal_model.separate_audio(
            torch.randn(1, 8000), 8000, norm="recording"
        )


def test_streaming_gives_what_the_stream_gives(causal_model, noise, tmp_path):
    path = save(tmp_path / "a.wav", noise, 8000, "FLOAT")
    stream = causal_model.make_stream()
    parts = [stream.feed(block) for block in noise.split(100, 1)]
    expected = torch.cat([*parts, stream.flush()], 1)
    out = causal_model.separate_file(path, streaming=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    (first, _) = causal_model.separate_to_files(path, tmp_path, streaming=True)
    written, _ = soundfile.read(first)
    np.testing.assert_allclose(written, expected[0, :, 0].numpy(), atol=1e-6)


@pytest.mark.parametrize("rate", [16000, 44100])
def test_streaming_at_another_rate_is_aligned(causal_model, noise, rate):
    stereo = torch.cat([noise, noise.flip(1)])
    out = causal_model.separate_audio(
        stereo,
        rate,
        streaming=True,
        channels="each",
        mixture_consistency=True,
    )
    assert out.shape == (2, noise.shape[1], 2)
    torch.testing.assert_close(out.sum(2), stereo, rtol=0, atol=1e-5)
    heard = resample(stereo, rate, 8000)
    whole = causal_model.separate_batch(heard)
    expected = resample(whole.transpose(1, 2).flatten(0, 1), 8000, rate)
    plain = causal_model.separate_audio(
        stereo, rate, streaming=True, channels="each"
    )
    torch.testing.assert_close(
        plain.transpose(1, 2).flatten(0, 1),
        expected[:, : noise.shape[1]],
        rtol=0,
        atol=1e-5,
    )


def test_a_model_that_is_not_causal_cannot_stream(model, noise):
    with pytest.raises(ValueError, match="not causal and cannot stream: give"):
        model.separate_audio(noise, streaming=True)
    with pytest.raises(ValueError, match="not causal and cannot stream: give"):
        list(model.separate_stream([noise]))
    assert "not causal" in model.describe()["streaming"]


def test_a_causal_model_without_a_window_says_why_it_cannot_stream(
    causal_model, monkeypatch
):
    monkeypatch.setattr(causal_model.mods.masknet.place, "left", -1)
    assert "window is unbounded" in causal_model.describe()["streaming"]


def test_streaming_leaves_nothing_to_choose():
    with pytest.raises(ValueError, match="chunk and norm cannot be set"):
        SeparationOptions(streaming=True, norm="recording", chunk=20.0)


# --- inputs ------------------------------------------------------------------


def test_str_path_array_and_tensor_give_the_same(model, noise, tmp_path):
    path = save(tmp_path / "a.wav", noise, 8000, "FLOAT")
    expected = model.separate_batch(noise)
    for out in (
        model.separate_file(path),
        model.separate_file(str(path)),
        model.separate_audio(noise),
        model.separate_audio(noise[0], 8000),
        model.separate_audio(noise.numpy(), 8000),
    ):
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    "kind, full", [(torch.int16, 2**15), (torch.int32, 2**31)]
)
def test_integers_are_pcm(model, noise, kind, full):
    pcm = (noise * (full / 10)).to(kind)
    torch.testing.assert_close(
        model.separate_audio(pcm), model.separate_audio(pcm / full)
    )
    with pytest.raises(ValueError, match="float, int16 or int32"):
        model.separate_audio(pcm.to(torch.uint8))


@pytest.mark.parametrize("shape", [(0,), (1, 2, 3), ()])
def test_audio_of_another_shape_is_refused(model, shape):
    with pytest.raises(ValueError, match="audio must be"):
        model.separate_audio(torch.zeros(shape))


def test_audio_with_time_first_is_refused(model):
    for channels in (1, 2):
        with pytest.raises(ValueError, match="transpose"):
            model.separate_audio(torch.zeros(8000, channels))


def test_nan_in_memory_is_refused(model, noise):
    noise[0, 7] = torch.nan
    with pytest.raises(ValueError, match="not finite numbers"):
        model.separate_audio(noise)


def test_channels_are_mixed_down_or_kept_apart(model, noise, tmp_path):
    stereo = torch.cat([noise, noise.flip(1)])
    path = save(tmp_path / "stereo.wav", stereo, 8000, "FLOAT")
    torch.testing.assert_close(
        model.separate_file(path), model.separate_audio(stereo.mean(0))
    )
    each = model.separate_file(path, channels="each")
    assert each.shape == (2, 24003, 2)
    for row, channel in zip(each, stereo):
        alone = model.separate_audio(channel)[0]
        if channel is not stereo[0] and (row - alone).abs().max() > 1e-5:
            row = row.flip(1)  # in the order of the first channel
        torch.testing.assert_close(row, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_channels_that_cancel_are_told_and_the_loudest_is_taken(
    model, noise, offset, tmp_path
):
    stereo = torch.cat([0.09 * noise, -0.1 * noise + offset])
    path = save(tmp_path / "stereo.wav", stereo, 8000, "FLOAT")
    with pytest.warns(UserWarning, match=r"stereo\.wav cancel .*channel 2"):
        out = model.separate_file(path)
    expected = model.separate_audio(-0.1 * noise)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("channels", [1, 2, 8])
def test_channels_that_do_not_cancel_are_no_warning(model, channels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.separate_audio(torch.randn(channels, 8000))
        one = torch.zeros(channels, 8000)
        model.separate_audio(one)
        one[0] = torch.randn(8000)
        model.separate_audio(one)


def test_an_offset_changes_nothing(model, noise):
    noise = noise - noise.mean()
    expected = model.separate_audio(noise)
    stereo = torch.cat([noise, noise])
    for offset in (0.5, torch.tensor([[0.5], [-2.0]])):
        out = model.separate_audio(stereo + offset)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
    assert not model.separate_audio(torch.full((1, 8000), 0.25)).any()


@pytest.mark.parametrize("rate", [44100, 16000, 11025])
def test_other_rates_come_back_at_their_rate(model, rate, tmp_path):
    signal = torch.randn(1, 2 * rate + 17)
    path = save(tmp_path / "a.flac", 0.1 * signal, rate, "PCM_24")
    heard = torch.from_numpy(soundfile.read(path, dtype="float32")[0])[None]
    out = model.separate_file(path)
    sources = model.separate_batch(resample(heard, rate, 8000))
    expected = resample(sources[0].T, 8000, rate)[:, : heard.shape[1]]
    assert out.shape == (1, 2 * rate + 17, 2)
    torch.testing.assert_close(out[0].T, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 2, 15, 16, 17])
def test_files_shorter_than_the_kernel(model, samples, tmp_path):
    path = save(tmp_path / "short.wav", torch.full((1, samples), 0.1), 8000)
    out = model.separate_file(path)
    assert out.shape == (1, samples, 2) and out.isfinite().all()


def test_silence_stays_silent(model, tmp_path):
    path = save(tmp_path / "silent.wav", torch.zeros(1, 50000), 16000)
    assert not model.separate_file(path).any()
    (loud, _) = model.separate_to_files(path, tmp_path / "out", normalize=True)
    assert not soundfile.read(loud)[0].any()


# --- level -------------------------------------------------------------------


@pytest.mark.parametrize("gain", [1e-3, 30.0])
def test_level_of_the_input_is_that_of_the_output(model, noise, gain):
    torch.testing.assert_close(
        model.separate_audio(gain * noise),
        gain * model.separate_audio(noise),
        rtol=1e-3,
        atol=1e-4 * gain,
    )


@pytest.mark.parametrize("chunk", [1.0, 10.0])
def test_consistent_sources_sum_to_the_mixture(model, noise, chunk):
    out = model.separate_audio(
        noise, mixture_consistency=True, chunk=chunk, overlap=0.3
    )
    torch.testing.assert_close(out.sum(2), noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", ["mix", "each"])
def test_consistent_sources_sum_to_the_mixture_at_any_rate(model, channels):
    stereo = torch.randn(2, 44100 * 5 + 3)
    out = model.separate_audio(
        stereo,
        44100,
        channels=channels,
        mixture_consistency=True,
        chunk=2.0,
        overlap=0.5,
    )
    mixture = stereo if channels == "each" else stereo.mean(0, keepdim=True)
    torch.testing.assert_close(out.sum(2), mixture, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["chunk", "recording"])
def test_chunks_keep_loudness(model, norm):
    mixture = torch.randn(1, 80000)
    whole = model.separate_audio(mixture)
    out = model.separate_audio(mixture, chunk=2.0, overlap=0.5, norm=norm)
    loudness = 10 * torch.log10(
        out.square().mean((0, 1)) / whole.square().mean((0, 1))
    )
    assert loudness.abs().max() < 0.1


def test_chunks_with_the_norm_of_the_recording_equal_the_whole(model):
    mixture = torch.randn(1, 120000) * torch.linspace(0.05, 1, 120000)
    reach = 8 * max(model.mods.masknet.receptive_field) / 8000
    whole = model.separate_batch(mixture)
    out = model.separate_audio(
        mixture,
        chunk=6 * reach,
        overlap=2 * reach + 0.1,
        norm="recording",
        turns="network",
    )
    assert 6 * reach < 15 / 3
    scale = whole.abs().max().item()
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-5 * scale)


# --- options -----------------------------------------------------------------


@pytest.mark.parametrize(
    "chunk, overlap", [(10, 5), (10, 0), (1, 3), (np.inf, 2)]
)
def test_chunks_that_do_not_fit_are_refused(chunk, overlap):
    with pytest.raises(ValueError, match="less than half of chunk"):
        SeparationOptions(chunk=chunk, overlap=overlap)


@pytest.mark.parametrize("name", ["channels", "norm", "precision"])
def test_unknown_choices_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is one of .*, not 'loud'"):
        SeparationOptions(**{name: "loud"})


def test_half_precision_is_close(model, noise):
    full = model.separate_audio(noise)
    half = model.separate_audio(noise, precision="bf16")
    assert half.dtype == torch.float32
    assert (half - full).norm() < 0.05 * full.norm()
    assert not torch.equal(half, full)


def test_callback_counts_the_seconds(model):
    heard = []
    model.separate_audio(
        torch.randn(1, 80000),
        chunk=2.0,
        overlap=0.5,
        callback=lambda done, total: heard.append((done, total)),
    )
    done = [seconds for seconds, _ in heard]
    assert len(done) > 3 and done == sorted(set(done)) and done[-1] == 10.0
    assert {total for _, total in heard} == {10.0}


# --- files -------------------------------------------------------------------


def test_files_hold_what_memory_gets(model, noise, tmp_path):
    stereo = torch.cat([noise, noise.flip(1)])
    path = save(tmp_path / "a.wav", stereo, 11025, "FLOAT")
    options = {"channels": "each", "chunk": 1.0, "overlap": 0.2}
    written = model.separate_to_files(path, tmp_path / "out", **options)
    assert [file.name for file in written] == [
        "a_c1_s1.wav",
        "a_c1_s2.wav",
        "a_c2_s1.wav",
        "a_c2_s2.wav",
    ]
    signals = [soundfile.read(file, dtype="float32") for file in written]
    assert {rate for _, rate in signals} == {11025}
    expected = model.separate_file(path, **options).transpose(1, 2)
    torch.testing.assert_close(
        torch.from_numpy(np.stack([signal for signal, _ in signals])),
        expected.flatten(0, 1),
    )


def test_a_bad_file_leaves_no_output(model, noise, tmp_path):
    noise[0, 20000] = torch.inf
    path = save(tmp_path / "bad.wav", noise, 1000, "FLOAT")
    with pytest.raises(ValueError, match=r"bad\.wav .* not finite"):
        model.separate_to_files(path, tmp_path / "out", chunk=2.0, overlap=0.5)
    assert list((tmp_path / "out").iterdir()) == []


def test_outputs_that_are_no_numbers_are_never_written(model, tmp_path):
    path = save(tmp_path / "a.wav", 1e25 * torch.randn(1, 8000), 8000, "FLOAT")
    with pytest.raises(ValueError, match="gives no finite numbers"):
        model.separate_to_files(path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("rate", [-1, 0, 0.5, 44100.5])
def test_a_rate_that_is_none_is_refused(model, noise, rate):
    with pytest.raises(ValueError, match="sample_rate must be a whole number"):
        model.separate_audio(noise, rate)


def test_arrays_of_any_order_are_read(model, noise):
    expected = model.separate_audio(noise.flip(1))
    for array in (
        noise.numpy()[:, ::-1],
        noise.flip(1).numpy().astype(">f4"),
    ):
        torch.testing.assert_close(model.separate_audio(array), expected)


def test_one_sample_of_stereo_is_a_recording(model):
    assert model.separate_audio(torch.ones(2, 1)).shape == (1, 1, 2)


def test_a_url_needs_a_place(model):
    with pytest.raises(ValueError, match="give a savedir for"):
        model.separate_file("https://localhost/a.wav")


# --- what it is -------------------------------------------------------------


def test_description_names_what_counts(model):
    described = model.describe()
    assert described["speakers"] == 2
    assert described["sampling rate"] == "8000 Hz"
    assert described["attention"] == "sdpa"
    reach = 8 * model.mods.masknet.receptive_field[0] / 8000
    assert described["context"].startswith(f"{reach:.1f} s before")
