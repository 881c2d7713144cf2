"""ONNX gives what torch gives, at every length and batch."""

import builtins

import pytest
import torch

from speechbrain_flashformer import export
from speechbrain_flashformer.inference import FlashFormerSeparation

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")


@pytest.fixture(scope="module")
def model(packed_once):
    return FlashFormerSeparation.from_hparams(packed_once)


@pytest.fixture(scope="module")
def graph(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return export.export_onnx(model, path)


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


def test_graph_says_what_it_is(graph):
    props = {p.key: p.value for p in onnx.load(graph).metadata_props}
    assert props["sample_rate"] == "8000" and props["num_spks"] == "2"


def test_an_existing_file_stays(model, graph):
    before = graph.read_bytes()
    with pytest.raises(FileExistsError, match="exists: remove it"):
        export.export_onnx(model, graph)
    assert graph.read_bytes() == before


def test_a_graph_that_differs_is_refused():
    class Session:
        def run(self, _, inputs):
            return [1.001 * inputs["mixture"]]

    with pytest.raises(RuntimeError, match="differs from torch"):
        export._check(torch.nn.Identity(), Session(), 8000)


def test_a_failure_leaves_nothing(model, tmp_path, monkeypatch):
    def refuse(*arguments):
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
        opset_imports=[onnx.helper.make_opsetid("", export.OPSET)],
        ir_version=10,
    )


def test_a_missing_extra_is_named(model, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments):
        if name == "onnxruntime":
            raise ImportError(name=name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs onnxruntime.*\[onnx\]"):
        export.export_onnx(model, tmp_path / "a.onnx")
