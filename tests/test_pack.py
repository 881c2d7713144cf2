"""A run becomes a folder that needs nothing else."""

import math
import os
import re
import shutil

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_flashformer import cli
from speechbrain_flashformer.inference import FlashFormerSeparation
from speechbrain_flashformer.inference.pack import pack, start_from


def test_packed_folder_is_whole_and_flat(packed_once):
    assert sorted(path.name for path in packed_once.iterdir()) == [
        "README.md",
        "decoder.ckpt",
        "encoder.ckpt",
        "hyperparams.yaml",
        "masknet.ckpt",
    ]
    text = (packed_once / "hyperparams.yaml").read_text()
    assert "!include" not in text and "save" not in text
    assert load_hyperpyyaml(text)["sample_rate"] == 8000


def test_example_of_the_model_card_runs(packed, tmp_path, monkeypatch):
    import soundfile

    soundfile.write(tmp_path / "mixture.wav", torch.randn(8000) * 0.1, 8000)
    card = (packed / "README.md").read_text()
    assert "SI-SNR 9.50 dB at epoch 7" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    # The card names the folder as it was packed.
    packed.rename(tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["sources"].shape == (1, 8000, 2)


def test_the_decoder_brings_level_and_polarity_of_the_sources(
    make_run, tmp_path
):
    mixture = torch.randn(1, 8000)
    out = []
    for level_db, polarity in ((0.0, 1), (20.0, -1)):
        run = make_run(
            tmp_path / f"run{level_db}", 0, level_db, polarity=polarity
        )
        folder = pack(run, tmp_path / f"model{level_db}")
        model = FlashFormerSeparation.from_hparams(folder)
        out.append(model.separate_batch(mixture))
    torch.testing.assert_close(out[1], out[0] / -10)


def test_averaged_weights_have_the_level_of_all_that_are_averaged(
    make_run, tmp_path
):
    mixture = torch.randn(1, 8000)
    out = []
    for name, levels in (("plain", [0.0]), ("averaged", [4.0, 16.0, 10.0])):
        run = make_run(tmp_path / name, 0)
        hparams = run / "hyperparams.yaml"
        with hparams.open("a") as file:
            file.write("avg_checkpoints: 3\n")
        modules = load_hyperpyyaml(hparams.read_text())["modules"]
        checkpointer = Checkpointer(run / "save", modules)
        checkpointer.recover_if_possible()
        checkpointer.delete_checkpoints(num_to_keep=0)
        for level in levels:
            meta = {"si-snr": -level, "level_db": level, "polarity": -1}
            checkpointer.save_checkpoint(meta=meta)
        model = FlashFormerSeparation.from_hparams(
            pack(run, tmp_path / f"{name} model")
        )
        out.append(model.separate_batch(mixture))
    # 10 dB louder than their sources, on average.
    torch.testing.assert_close(out[1], out[0] / 10**0.5)


@pytest.mark.parametrize(
    "count, last, expected",
    [(None, False, 1.0), (2, False, 1.5), (None, True, 6.0), (2, True, 3.5)],
)
def test_the_best_checkpoints_are_packed_or_the_last(
    make_run, tmp_path, count, last, expected
):
    run = make_run(tmp_path / "run", seed=0)
    yaml = run / "hyperparams.yaml"
    modules = load_hyperpyyaml(yaml.read_text())["modules"]
    checkpointer = Checkpointer(run / "save", modules)
    for value, loss in ((2.0, -19.0), (1.0, -20.0), (6.0, -18.0)):
        torch.nn.init.constant_(modules["masknet"].masks.weight, value)
        checkpointer.save_checkpoint(meta={"si-snr": loss})
    # One from the middle of an epoch does not count.
    torch.nn.init.constant_(modules["masknet"].masks.weight, 9.0)
    checkpointer.save_checkpoint(end_of_epoch=False)
    if count:
        yaml.write_text(yaml.read_text() + f"avg_checkpoints: {count}\n")
    packed = pack(run, tmp_path / "model", last=last)
    state = torch.load(packed / "masknet.ckpt", weights_only=True)
    assert state["masks.weight"].unique().tolist() == [expected]


@pytest.mark.parametrize("last", [False, True])
def test_a_checkpoint_without_a_finite_loss_is_named(make_run, tmp_path, last):
    run = make_run(tmp_path / "run", seed=0)
    yaml = run / "hyperparams.yaml"
    yaml.write_text(yaml.read_text() + "avg_checkpoints: 2\n")
    modules = load_hyperpyyaml(yaml.read_text())["modules"]
    checkpointer = Checkpointer(run / "save", modules)
    broken = checkpointer.save_checkpoint(meta={"si-snr": math.inf})
    name = re.escape(broken.path.name)
    with pytest.raises(ValueError, match=f"{name} is not finite: move"):
        pack(run, tmp_path / "model", last=last)
    assert not (tmp_path / "model").exists()


def test_training_starts_from_a_packed_model(make_run, tmp_path):
    half = pack(make_run(tmp_path / "a", 0), tmp_path / "half", half=True)
    other = FlashFormerSeparation.from_hparams(
        pack(make_run(tmp_path / "b", seed=1), tmp_path / "other")
    )
    mixture = torch.randn(1, 4000)
    first = FlashFormerSeparation.from_hparams(half)
    expected = first.separate_batch(mixture)
    assert not torch.allclose(other.separate_batch(mixture), expected)
    start_from(half, other.mods)
    assert torch.equal(other.separate_batch(mixture), expected)
    # Trained in full precision, whatever it was stored in.
    weights = {p.dtype for p in other.mods.parameters()}
    assert weights == {torch.float32}


@pytest.mark.parametrize("change", ["shape", "key"])
def test_a_start_from_another_network_is_an_error(
    packed_once, tmp_path, change
):
    folder = tmp_path / "model"
    shutil.copytree(packed_once, folder)
    state = torch.load(folder / "masknet.ckpt", weights_only=True)
    weight = state.pop("project.bias")
    if change == "shape":
        state["project.bias"] = weight[1:]
    torch.save(state, folder / "masknet.ckpt")
    model = FlashFormerSeparation.from_hparams(packed_once)
    with pytest.raises(ValueError, match="masknet of the yaml in 1 weights"):
        start_from(folder, model.mods)


def test_half_precision_halves_the_files(make_run, packed_once, tmp_path):
    half = pack(
        make_run(tmp_path / "run", seed=0), tmp_path / "half", half=True
    )
    state = torch.load(half / "masknet.ckpt", weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.float16}
    mixture = torch.randn(1, 8000)
    full, short = (
        FlashFormerSeparation.from_hparams(folder).separate_batch(mixture)
        for folder in (packed_once, half)
    )
    assert short.dtype == torch.float32
    assert (full - short).norm() < 0.01 * full.norm()


def test_weights_from_several_gpus_lose_their_prefix(
    make_run, tmp_path, packed_once
):
    run = make_run(tmp_path / "run", seed=0)
    (path,) = (run / "save").glob("CKPT*/masknet.ckpt")
    state = torch.load(path, weights_only=True)
    torch.save({f"module.{k}": v for k, v in state.items()}, path)
    out = pack(run, tmp_path / "out") / "masknet.ckpt"
    expected = torch.load(packed_once / "masknet.ckpt", weights_only=True)
    assert torch.load(out, weights_only=True).keys() == expected.keys()


def test_an_existing_folder_stays_unless_told(make_run, packed, tmp_path):
    run = make_run(tmp_path / "run", seed=1)
    before = (packed / "masknet.ckpt").read_bytes()
    with pytest.raises(FileExistsError, match="exists: remove it"):
        pack(run, packed)
    assert (packed / "masknet.ckpt").read_bytes() == before
    pack(run, packed, overwrite=True)
    assert (packed / "masknet.ckpt").read_bytes() != before


@pytest.mark.parametrize("fails", [1, 2])
def test_what_is_replaced_is_not_lost(
    make_run, packed, tmp_path, monkeypatch, fails
):
    run = make_run(tmp_path / "run", seed=1)
    before = (packed / "masknet.ckpt").read_bytes()
    beside = set(packed.parent.iterdir())
    replace, calls = os.replace, []

    def fail(*paths):
        calls.append(paths)
        if len(calls) == fails:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        pack(run, packed, overwrite=True)
    assert len(calls) >= fails
    assert (packed / "masknet.ckpt").read_bytes() == before
    assert set(packed.parent.iterdir()) - {run} == beside - {run}


def test_only_a_packed_folder_is_replaced(make_run, tmp_path):
    run = make_run(tmp_path / "runs/run", seed=0)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/README.md").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for out in (run, *(tmp_path / name for name in ("runs", "file", "notes"))):
        with pytest.raises(FileExistsError, match="is not replaced"):
            pack(run, out, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_that_are_no_run_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no hyperparams.yaml in"):
        pack(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def edit(old, new):
    def change(run):
        text = (run / "hyperparams.yaml").read_text()
        assert old in text
        (run / "hyperparams.yaml").write_text(text.replace(old, new))

    return change


def write(name, content):
    def change(run):
        (path,) = run.glob(name)
        path.write_bytes(content)

    return change


def remove(name):
    def change(run):
        (path,) = run.glob(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def with_decoder(value):
    def change(run):
        (path,) = run.glob("save/*/decoder.ckpt")
        state = torch.load(path, weights_only=True)
        torch.save(
            {name: weight * value for name, weight in state.items()}, path
        )

    return change


BROKEN = {
    "syntax": (write("hyperparams.yaml", b"a: ["), "hyperparams.yaml is not v"),
    "empty": (write("hyperparams.yaml", b""), "hyperparams.yaml is empty"),
    "few": (write("hyperparams.yaml", b"a: 1"), "has no num_spks, sample_rate"),
    "modules": (
        write("hyperparams.yaml", b"num_spks: 2\nsample_rate: 8\nmodules: 1"),
        "modules have no encoder with its class",
    ),
    "unresolved": (
        write(
            "hyperparams.yaml",
            b"num_spks: 2\nsample_rate: 8\nmodules: {encoder: !ref <a>}",
        ),
        "modules have no encoder with its class",
    ),
    "argument": (edit("lookback", "lookbak"), "unexpected keyword .*lookbak"),
    "rate": (edit("8000", "fast"), "sample_rate must be a whole number"),
    "average": (
        edit("num_spks: 2\nsam", "num_spks: 2\navg_checkpoints: 0\nsam"),
        "avg_checkpoints of .* must be a whole number",
    ),
    "no checkpoint": (remove("save"), "no validated checkpoint in"),
    "meta": (write("save/*/CKPT.yaml", b"a: ["), "has a broken CKPT.yaml"),
    "cut": (write("save/*/decoder.ckpt", b"cut"), "decoder.ckpt is broken in"),
    "missing": (remove("save/*/decoder.ckpt"), "cannot read it .*decoder.ckpt"),
    "other": (edit("d_ffn: 32", "d_ffn: 64"), "does not fit the masknet"),
    "nan": (with_decoder(torch.nan), "decoder.ckpt has .* not finite"),
    "half": (with_decoder(1e9), "too large for half precision"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_run_is_one_error(make_run, tmp_path, capsys, case):
    run = make_run(tmp_path / "run", seed=0)
    change, message = BROKEN[case]
    change(run)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as told:
        pack(run, tmp_path / "out", half=True)
    assert str(run) in str(told.value)
    arguments = ["pack", str(run), str(tmp_path / "out"), "--half"]
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err == f"flashformer: {told.value}\n"
    assert list(tmp_path.iterdir()) == [run]


def test_a_model_without_level_and_polarity_is_packed_as_it_is(
    make_run, tmp_path
):
    run = make_run(tmp_path / "run", seed=0)
    (path,) = run.glob("save/*/CKPT.yaml")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(
        "".join(x for x in lines if not x.startswith(("level_db", "polarity")))
    )
    (trained,) = run.glob("save/*/decoder.ckpt")
    packed = pack(run, tmp_path / "out") / "decoder.ckpt"
    expected = torch.load(trained, weights_only=True)
    state = torch.load(packed, weights_only=True)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_network_of_ones_own_needs_trust(make_run, tmp_path):
    run = make_run(tmp_path / "run", seed=0)
    # Under a name that only who trusts the model may look up.
    edit("!new:speechbrain_flashformer.FlashFormer", "!new:conftest.Own")(run)
    folder = pack(run, tmp_path / "out")
    with pytest.raises(ValueError, match="asks for '!new:conftest.Own'"):
        FlashFormerSeparation.from_hparams(folder)
    card = (folder / "README.md").read_text()
    assert "--model out --trust\n" in card
    assert 'from_hparams("out", trust=True)' in card


# Where the parts of the network are, and where they were.
@pytest.mark.parametrize("wing", ["nnet.", ""])
def test_what_the_recipes_compute_is_packed_as_a_number(
    make_run, tmp_path, wing
):
    run = make_run(tmp_path / "run", seed=0, causal=True)
    computed = (
        "  causal: true\n  future_tokens: !apply:speechbrain_flashformer."
        f"{wing}streaming.lookahead_tokens\n"
        "    {lookahead_ms: 16, sample_rate: 8000, kernel_stride: 8, "
        "token_stride: 8}\n"
    )
    edit("  causal: true\n", computed)(run)
    folder = pack(run, tmp_path / "out")
    text = (folder / "hyperparams.yaml").read_text()
    assert "future_tokens: 2" in text and "!apply" not in text
    FlashFormerSeparation.from_hparams(folder)


def test_the_card_tells_a_hub_the_results_of_the_test(make_run, tmp_path):
    run = make_run(tmp_path / "run", seed=0)

    def _front(name):
        card = (pack(run, tmp_path / name) / "README.md").read_text()
        return YAML(typ="safe").load(card.split("---\n")[1])

    assert "model-index" not in _front("untested")
    rows = ("snt_id,sdr_i,si-snr_i", "a,8,7", "b,10,9", "avg,9,8")
    rows += ("median,9,8", "5th percentile,8.1,7.1")
    (run / "test_results.csv").write_text("\n".join(rows))
    # A name that YAML would read as a number.
    (model,) = _front("1234")["model-index"]
    assert model["name"] == "1234"
    (result,) = model["results"]
    assert result["dataset"]["name"].startswith("2 test mixtures")
    found = {x["type"]: x["value"] for x in result["metrics"]}
    assert found == {"si-snri": 8.0, "sdri": 9.0}
