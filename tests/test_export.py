"""ONNX gives what torch gives, at every length and batch."""

import gc
import logging
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from speechbrain.lobes.models.dual_path import Decoder, Encoder

from speechbrain_flashformer import FlashFormer
from speechbrain_flashformer.inference import FlashFormerSeparation, export

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")


@pytest.fixture(scope="module")
def model(packed_once):
    return FlashFormerSeparation.from_hparams(packed_once)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """A graph, and what was logged and warned of while it was made."""
    path, told = tmp_path_factory.mktemp("onnx") / "model.onnx", []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    gc.collect()  # what other tests left open is theirs to warn of
    with pytest.MonkeyPatch.context() as patch, pytest.warns() as warned:
        # torch keeps its records from the root.
        for name in ("torch", "torch.onnx"):
            patch.setattr(logging.getLogger(name), "propagate", True)
        logging.getLogger().addHandler(handler)
        export.export_onnx(model, path)
        logging.getLogger().removeHandler(handler)
        warnings.warn("the last one", stacklevel=1)
    return path, told, [str(warning.message) for warning in warned]


@pytest.fixture(scope="module")
def graph(exported):
    return exported[0]


@pytest.mark.parametrize(
    "batch, samples",
    # 8200 and 4104 are whole blocks of attention.
    [(1, 16), (1, 3001), (4, 8000), (2, 40007), (1, 8200), (1, 4104)],
)
def test_onnxruntime_equals_torch(model, graph, batch, samples):
    session = onnxruntime.InferenceSession(str(graph))
    mixture = torch.randn(batch, samples)
    (out,) = session.run(None, {"mixture": mixture.numpy()})
    expected = model.separate_batch(mixture)
    scale = expected.abs().max().item()
    torch.testing.assert_close(
        torch.from_numpy(out), expected, rtol=0, atol=1e-4 * scale
    )


def test_weights_that_no_file_can_hold_are_refused(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr(export, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="GB of weights, more than one ONNX"):
        export.export_onnx(model, tmp_path / "a.onnx")


@pytest.mark.parametrize("future_tokens", [0, 2])
def test_a_causal_network_is_exported_whole_too(tmp_path, future_tokens):
    modules = {
        "encoder": Encoder(kernel_size=16, out_channels=16),
        "masknet": FlashFormer(
            16,
            d_model=16,
            num_layers=1,
            nhead=2,
            d_ffn=16,
            d_frame=16,
            token_stride=4,
            causal=True,
            future_tokens=future_tokens,
        ),
        "decoder": Decoder(16, 1, kernel_size=16, stride=8, bias=False),
    }
    model = FlashFormerSeparation(modules, {"num_spks": 2, "sample_rate": 8000})
    path = export.export_onnx(model, tmp_path / "causal.onnx")
    session = onnxruntime.InferenceSession(str(path))
    for samples in (900, 37_003):
        mixture = torch.randn(1, samples)
        (out,) = session.run(None, {"mixture": mixture.numpy()})
        expected = model.separate_batch(mixture)
        torch.testing.assert_close(
            torch.from_numpy(out), expected, rtol=0, atol=1e-5
        )


def test_graph_says_what_it_is(graph):
    props = {p.key: p.value for p in onnx.load(graph).metadata_props}
    assert props["sample_rate"] == "8000" and props["num_spks"] == "2"


def test_an_existing_file_stays(model, graph):
    before = graph.read_bytes()
    with pytest.raises(FileExistsError, match="exists: remove it"):
        export.export_onnx(model, graph)
    assert graph.read_bytes() == before


def test_a_folder_is_not_overwritten_by_a_graph(model, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(IsADirectoryError, match="is a folder: name a file"):
        export.export_onnx(model, tmp_path, overwrite=True)
    assert (tmp_path / "kept.txt").read_text() == "mine"


@pytest.mark.parametrize("gain", [1.001, np.float32("nan")])
def test_a_graph_that_differs_is_refused(gain):
    class Session:
        def run(self, _, inputs):
            return [gain * inputs["mixture"]]

    with pytest.raises(RuntimeError, match="differs from torch"):
        export._check(torch.nn.Identity(), Session(), rate=8000)


def decibels(error, expected):
    return 10 * (expected.square().sum() / error.square().sum()).log10()


@pytest.fixture(scope="module")
def small_graph(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "int8.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return export.export_onnx(model, path, int8=True)


@pytest.mark.parametrize("batch, samples", [(1, 3001), (4, 8000)])
def test_int8_is_near_torch(model, small_graph, batch, samples):
    session = onnxruntime.InferenceSession(str(small_graph))
    mixture = 0.1 * torch.randn(batch, samples)
    (out,) = session.run(None, {"mixture": mixture.numpy()})
    expected = model.separate_batch(mixture)
    # Exact it cannot be.
    assert 20 < decibels(torch.from_numpy(out) - expected, expected) < 60


def test_int8_is_smaller_and_says_what_it_is(graph, small_graph):
    weights = [
        {w.data_type for w in onnx.load(path).graph.initializer}
        for path in (graph, small_graph)
    ]
    int8 = onnx.TensorProto.INT8
    assert int8 not in weights[0] and int8 in weights[1]
    assert small_graph.stat().st_size < graph.stat().st_size
    props = {p.key: p.value for p in onnx.load(small_graph).metadata_props}
    assert props["sample_rate"] == "8000" and props["num_spks"] == "2"


@pytest.mark.parametrize("gain, near", [(1.05, True), (1.2, False)])
def test_int8_may_differ_by_a_tenth(gain, near):
    class Session:
        def run(self, _, inputs):
            return [np.float32(gain) * inputs["mixture"]]

    arguments = torch.nn.Identity(), Session(), 8000
    if near:
        export._check(*arguments, int8=True)
        return
    with pytest.raises(RuntimeError, match="differs from torch"):
        export._check(*arguments, int8=True)


def test_int8_that_is_far_off_is_not_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "INT8_DISTANCE", 90)
    with pytest.raises(RuntimeError, match="nothing was written"):
        export.export_onnx(model, tmp_path / "a.onnx", int8=True)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def streaming_model():
    torch.manual_seed(0)
    modules = {
        "encoder": Encoder(kernel_size=16, out_channels=16),
        "masknet": FlashFormer(
            16,
            d_model=32,
            num_layers=2,
            nhead=2,
            d_ffn=32,
            d_frame=16,
            token_stride=2,
            window=(10, 0),
            lookback=4,
            causal=True,
            future_tokens=3,
        ),
        "decoder": Decoder(16, 1, kernel_size=16, stride=8, bias=False),
    }
    hparams = {"num_spks": 2, "sample_rate": 8000}
    return FlashFormerSeparation(modules, hparams)


@pytest.fixture(scope="module")
def streaming_graph(streaming_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "stream.onnx"
    return export.export_streaming_onnx(streaming_model, path, block=4)


def test_a_stream_in_int8_is_near_torch(streaming_model, tmp_path):
    path = tmp_path / "int8.onnx"
    export.export_streaming_onnx(streaming_model, path, block=4, int8=True)
    networks = export.networks_on_cpu(streaming_model)
    session = export.onnx_session(path, 1)
    # Its error does not grow: 600 blocks are past the span of every memory.
    export.check_streaming(networks, session, 2, blocks=600, int8=True)
    with pytest.raises(RuntimeError, match="differs from torch"):
        export.check_streaming(networks, session, 2)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_stream_in_onnxruntime_equals_torch(
    streaming_model, streaming_graph, batch
):
    """From the first sample on, past the span of every memory."""
    session = onnxruntime.InferenceSession(str(streaming_graph))
    told = session.get_modelmeta().custom_metadata_map
    mixture = torch.randn(batch, 8 + 600 * 32)
    mixture[:, 5000:5010] = torch.tensor([torch.nan, torch.inf] * 5)
    stream = streaming_model.make_stream(batch)
    expected = stream.feed(mixture).numpy()

    block, *others = session.get_inputs()
    names = [f"new_{each.name}" for each in others]
    assert [out.name for out in session.get_outputs()] == ["sources", *names]
    assert block.shape[1] == 32
    kinds = {"tensor(float)": "f4", "tensor(double)": "f8"}
    state = {
        each.name: np.zeros(
            [batch if size == "batch" else size for size in each.shape],
            kinds.get(each.type, "i8"),
        )
        for each in others
    }
    sizes = {name: part.nbytes for name, part in state.items()}
    heard = mixture.numpy()
    state["samples"], out = heard[:, :8], []
    for start in range(8, heard.shape[1], 32):
        feeds = {"mixture": heard[:, start : start + 32], **state}
        sources, *new = session.run(None, feeds)
        state = dict(zip(state, new))
        out.append(sources)
    assert {name: part.nbytes for name, part in state.items()} == sizes
    out = np.concatenate(out, 1)[:, int(told["delay"]) :]
    np.testing.assert_allclose(
        out, expected, rtol=0, atol=1e-4 * abs(expected).max()
    )
    assert out.shape == expected.shape
    assert int(told["latency"]) == stream.latency + 32 - 16


def test_the_example_of_the_documents_runs(streaming_graph, monkeypatch):
    page = Path(__file__).parent.parent / "docs" / "export.md"
    codes = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    (code,) = [code for code in codes if "stream.onnx" in code]
    monkeypatch.chdir(streaming_graph.parent)
    names = {}
    exec(code, names)
    assert names["sources"].shape == (1, 32, 2)
    assert names["start"] == 8 + 7992 // 32 * 32
    assert not {"torch", "speechbrain_flashformer"} & set(names)


def test_an_export_is_silent(exported):
    _, told, warned = exported
    assert told == [] and warned == ["the last one"]


@pytest.mark.parametrize("block, mend", [(5, "take 4 or 6"), (0, "take 2")])
def test_a_step_is_of_whole_tokens(streaming_model, tmp_path, block, mend):
    with pytest.raises(ValueError, match=f"a token is 2 ms: {mend}"):
        export.export_streaming_onnx(
            streaming_model, tmp_path / "a.onnx", block=block
        )


def test_an_offline_model_has_no_step(model, tmp_path):
    with pytest.raises(ValueError, match="not causal and cannot stream"):
        export.export_streaming_onnx(model, tmp_path / "a.onnx")


def test_a_failure_leaves_nothing(model, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("differs")

    monkeypatch.setattr(export, "_check", refuse)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Program())
    with pytest.raises(RuntimeError, match="differs"):
        export.export_onnx(model, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


class Program:
    """What torch.onnx gives, for a graph that does nothing."""

    x = onnx.helper.make_tensor_value_info("mixture", 1, ["B", "T"])
    y = onnx.helper.make_tensor_value_info("sources", 1, ["B", "T"])
    node = onnx.helper.make_node("Identity", ["mixture"], ["sources"])
    model_proto = onnx.helper.make_model(
        onnx.helper.make_graph([node], "nothing", [x], [y]),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=10,
    )


def test_a_missing_extra_is_named(model, tmp_path, without_onnxruntime):
    with pytest.raises(ImportError, match=r"needs onnxruntime.*\[onnx\]"):
        export.export_onnx(model, tmp_path / "a.onnx")
