"""onnxruntime runs a stream as torch does, and never an old or broken graph."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn as nn
from torch.ao.quantization import quantize_dynamic

from speechbrain_flashformer import cli
from speechbrain_flashformer.inference import export, runtime
from speechbrain_flashformer.inference.models import RecordingSeparator
from speechbrain_flashformer.nnet.streaming import MOST_TOKENS

BLOCK = 0.016  # two tokens of the small model


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that has a step of the small model."""
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def empty(tmp_path, monkeypatch):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "empty"))
    return tmp_path / "empty/flashformer"


@pytest.fixture
def filled(cache, monkeypatch):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(cache))
    return cache / "flashformer"


@pytest.fixture
def model(packed_causal):
    """Its own for each test, which may change it."""
    return RecordingSeparator(packed_causal)


@pytest.fixture
def steps(filled, model):
    return runtime.choose_steps(model, "onnx", BLOCK, lambda text: None)


@pytest.fixture
def no_export(monkeypatch):
    def export(*_):
        raise AssertionError("exported again")

    monkeypatch.setattr(runtime, "export_streaming_onnx", export)


def feed(stream, blocks):
    return torch.cat([*map(stream.feed, blocks), stream.flush()], 1)


def count(session):
    """A session that counts its runs."""

    class Counting:
        runs, get_inputs = 0, session.get_inputs

        def run(self, *arguments):
            self.runs += 1
            return session.run(*arguments)

    return Counting()


# --- what comes out ----------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [1, 37, 64, 128, 301, 10**6])
def test_any_cutting_gives_what_torch_gives(model, steps, batch, size):
    steps.session = count(steps.session)
    heard = 0.1 * torch.randn(batch, 8000)
    heard[:, 3000] = torch.nan
    out = feed(model.make_stream(batch, steps), heard.split(size, 1))
    expected = feed(model.make_stream(batch), [heard])
    assert out.shape == expected.shape
    scale = expected.abs().max().item()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4 * scale)
    # Blocks of two tokens run in onnxruntime, others do not.
    assert (steps.session.runs > 40) == (size == 128)


def test_blocks_that_are_not_in_step_are_those_of_torch(model, steps):
    """A state goes from one runtime to the other and back."""
    steps.session = count(steps.session)
    heard = 0.1 * torch.randn(1, 9000)
    sizes = [136, *[128, 192] * 20]
    blocks = heard.split([*sizes, 9000 - sum(sizes)], 1)
    out = feed(model.make_stream(1, steps), blocks)
    expected = feed(model.make_stream(), [heard])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert steps.session.runs == 21


def test_a_model_that_changes_its_type_goes_on_in_torch(model, steps):
    model.mods.double()
    heard = torch.randn(1, 800, dtype=torch.double)
    out = feed(model.make_stream(1, steps), heard.split(128, 1))
    torch.testing.assert_close(out, feed(model.make_stream(), [heard]))


def test_sound_at_another_rate_is_that_of_torch(model, steps):
    blocks = (0.1 * torch.randn(2, 9000)).split(441, 1)
    one, other = (
        torch.cat([*model.separate_stream(blocks, 44100, run)], 1)
        for run in (steps, None)
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# --- the cache ---------------------------------------------------------------


def test_what_is_there_is_taken(steps, model, no_export):
    told = []
    for asked in ("onnx", "auto"):
        taken = runtime.choose_steps(model, asked, BLOCK, told.append)
        assert taken.size == 128
    assert told == []


@pytest.mark.parametrize("block", [None, 0.008, 0.032])
def test_another_size_is_another_graph(steps, model, no_export, block):
    assert runtime.choose_steps(model, "auto", block) is None
    # As many tokens as fit: a block of 17 ms is two of them, at times three.
    assert runtime.choose_steps(model, "auto", 0.017).size == 128


def _other_weights(model):
    model.mods.decoder.weight.data[0, 0, 0] += 1e-6


def _other_version(model):
    runtime.__version__ += "1"


def _other_norm(model):
    model.mods.masknet.norm_in.eps = 0.1


@pytest.mark.parametrize(
    "change", [_other_weights, _other_version, _other_norm]
)
def test_a_changed_model_is_another_graph(steps, model, monkeypatch, change):
    monkeypatch.setattr(runtime, "__version__", runtime.__version__)
    assert runtime.choose_steps(model, "auto", BLOCK)
    change(model)
    assert runtime.choose_steps(model, "auto", BLOCK) is None


@pytest.mark.parametrize("broken", ["cut", "empty", "another's"])
def test_a_broken_file_is_made_again(
    filled, steps, model, monkeypatch, tmp_path, broken
):
    good = filled / f"step-{runtime._key(model, 2)}.onnx"
    if broken == "another's":
        model.mods.decoder.weight.data *= 1.001
    path = tmp_path / f"flashformer/step-{runtime._key(model, 2)}.onnx"
    size = {"cut": 9000, "empty": 0}.get(broken, good.stat().st_size)
    path.parent.mkdir(parents=True)
    path.write_bytes(good.read_bytes()[:size])
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path))

    def export(_, out, overwrite, block):
        assert (out, overwrite, block) == (path, True, 16)
        shutil.copy(good, out)

    monkeypatch.setattr(runtime, "export_streaming_onnx", export)
    before = torch.get_rng_state()
    assert runtime.choose_steps(model, "auto", BLOCK) is None
    assert torch.equal(before, torch.get_rng_state())
    told = []
    assert runtime.choose_steps(model, "onnx", BLOCK, told.append)
    assert len(told) == 1 and str(path) in told[0]


def test_a_failed_export_leaves_nothing(empty, model, monkeypatch):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")

    def fail(*_, **__):
        raise RuntimeError("no graph")

    monkeypatch.setattr(export.torch.onnx, "export", fail)
    with pytest.raises(RuntimeError, match="no graph"):
        runtime.choose_steps(model, "onnx", BLOCK)
    assert not list(empty.glob("*"))


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime.os, "name", "posix")
    for value in ("", "somewhere"):  # a relative one does not count
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        home = Path.home() / ".cache/flashformer"
        assert runtime.cache_folder() == home
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runtime.cache_folder() == tmp_path / "flashformer"


# --- which one ---------------------------------------------------------------


def test_unasked_nothing_is_exported(empty, model, no_export):
    assert runtime.choose_steps(model, "auto", BLOCK) is None
    assert not empty.exists()


def test_torch_is_torch(steps, model):
    assert runtime.choose_steps(model, "torch", BLOCK) is None


def test_without_onnxruntime_torch_runs(filled, model, without_onnxruntime):
    assert runtime.choose_steps(model, "auto", BLOCK) is None
    line = r"onnx needs onnxruntime: pip install .*flashformer\[onnx\]"
    with pytest.raises(ImportError, match=line):
        runtime.choose_steps(model, "onnx", BLOCK)


def test_without_a_home_torch_runs(model, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(runtime, "cache_folder", homeless)
    assert runtime.choose_steps(model, "auto", BLOCK) is None


def test_only_float32_on_the_cpu_runs(filled, model):
    model.mods.double()
    assert runtime.choose_steps(model, "auto", BLOCK) is None
    with pytest.raises(ValueError, match="is torch.float64 on cpu: give"):
        runtime.choose_steps(model, "onnx", BLOCK)


def test_a_quantized_model_runs_in_torch(filled, model):
    model.mods["masknet"] = quantize_dynamic(model.mods.masknet, {nn.Linear})
    assert runtime.choose_steps(model, "auto", BLOCK) is None
    with pytest.raises(ValueError, match="no quantized model"):
        runtime.choose_steps(model, "onnx", BLOCK)


def test_hooks_are_called_in_torch(filled, model):
    model.mods.masknet.register_forward_hook(lambda *_: None)
    assert runtime.choose_steps(model, "auto", BLOCK) is None
    with pytest.raises(ValueError, match="would call no hooks"):
        runtime.choose_steps(model, "onnx", BLOCK)


def test_a_recording_runs_in_torch_unasked(filled, steps, model):
    assert runtime.choose_steps(model, "auto") is None


def test_a_cache_that_cannot_be_written_is_told_first(empty, model, no_export):
    empty.parent.mkdir()
    empty.touch()
    with pytest.raises(OSError, match="set XDG_CACHE_HOME .* or give --runtim"):
        runtime.choose_steps(model, "onnx", BLOCK)


@pytest.mark.parametrize("asked", ["auto", "torch", "onnx"])
def test_a_model_that_cannot_stream_says_so(packed_once, empty, asked):
    model = RecordingSeparator(packed_once)
    with pytest.raises(ValueError, match="not causal and cannot stream"):
        runtime.choose_steps(model, asked, BLOCK)


# --- the commands ------------------------------------------------------------


@pytest.fixture
def run(tmp_path, packed_causal, monkeypatch):
    """A command on a second of noise; what it writes."""
    noise = 0.1 * np.random.default_rng(0).normal(size=8000)
    soundfile.write(tmp_path / "a.wav", noise, 8000)

    def run(*words):
        words = [*words, "--model", packed_causal, "--overwrite"]
        words += ["-o", tmp_path / "out"]
        with open(tmp_path / "a.wav") as file:
            monkeypatch.setattr("sys.stdin", file)
            assert cli.main([*map(str, words)]) == 0
        paths = sorted((tmp_path / "out").iterdir())
        return np.stack([soundfile.read(path)[0] for path in paths])

    return run


def test_stream_says_what_runs_it(steps, run, capsys):
    out = {}
    for asked, found in (
        ("onnx", "onnx"),
        ("torch", "torch"),
        ("auto", "onnx"),
    ):
        out[asked] = run("stream", "--runtime", asked)
        first = capsys.readouterr().err.splitlines()[0]
        assert "latency" in first and first.endswith(f"runtime {found}")
    np.testing.assert_allclose(out["onnx"], out["torch"], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(out["onnx"], out["auto"])


def test_stream_runs_torch_unless_told(empty, run, capsys):
    run("stream")
    assert "runtime torch" in capsys.readouterr().err.splitlines()[0]


def test_separate_exports_once(filled, run, tmp_path, capsys):
    words = ["separate", tmp_path / "a.wav", "--streaming", "--runtime"]
    expected, before = run(*words, "torch"), set(filled.glob("*.onnx"))
    for told in (True, False):
        out = run(*words, "onnx")
        assert ("exporting the model" in capsys.readouterr().err) == told
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    (path,) = set(filled.glob("*.onnx")) - before
    session = export.onnx_session(path)
    assert session.get_inputs()[0].shape[1] == 64 * MOST_TOKENS


def test_a_runtime_is_one_of_streaming(tmp_path, capsys):
    words = ["separate", "a.wav", "-o", "out", "--runtime", "onnx"]
    assert cli.main(words) == 2
    assert "only with streaming" in capsys.readouterr().err


def test_the_commands_name_what_is_missing(
    packed_causal, tmp_path, capsys, without_onnxruntime
):
    soundfile.write(tmp_path / "a.wav", np.zeros(800), 8000)
    words = ["separate", tmp_path / "a.wav", "-o", tmp_path / "out"]
    words += ["--model", packed_causal, "--streaming", "--runtime", "onnx"]
    assert cli.main([*map(str, words)]) == 1
    assert "pip install 'speechbrain-flash" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
