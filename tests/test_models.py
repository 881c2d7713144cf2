"""Model folders: no code runs, nothing is lost, what is broken is named."""

import filecmp
import shutil
import warnings

import pytest
import torch
from ruamel.yaml import YAML
from speechbrain.inference.separation import SepformerSeparation
from speechbrain.utils.fetching import FetchConfig, LocalStrategy

from speechbrain_flashformer import cli
from speechbrain_flashformer.inference import FlashFormerSeparation
from speechbrain_flashformer.inference.models import (
    RecordingSeparator,
    read_yaml,
)
from speechbrain_flashformer.inference.pack import pack
from speechbrain_flashformer.inference.trust import untrusted
from speechbrain_flashformer.inference.weights import load_weights
from speechbrain_flashformer.nnet import pieces

NAMES = ("hyperparams.yaml", "encoder.ckpt", "masknet.ckpt", "decoder.ckpt")


def load(folder, **kwargs):
    return FlashFormerSeparation.from_hparams(folder, **kwargs)


def change_yaml(folder, old, new):
    path = folder / "hyperparams.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def weights(model):
    return model.mods.state_dict()


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) for key in one
    )


@pytest.fixture(scope="module")
def model(packed_once):
    return load(packed_once)


# --- trust -------------------------------------------------------------------

# Each touches OWNED when it is loaded by SpeechBrain, or would fetch.
TOUCH = "pathlib.Path.touch [!new:pathlib.Path [OWNED]]"
ATTACKS = {
    "apply": f"more: !apply:{TOUCH}",
    "applyref": "more: !applyref:os.mkdir [OWNED]",
    "python": "more: !!python/object/apply:os.mkdir [OWNED]",
    "other handle": "more: !<tag:yaml.org,2002:python/object/apply:os.mkdir> "
    "[OWNED]",
    "tuple": "more: (!!python/object/apply:os.mkdir [OWNED])",
    # HyperPyYAML drops quotes before it looks for tuples.
    "quoted tuple": 'more: "(!!python/object/apply:os.mkdir [OWNED])"',
    "key": "(!!python/object/apply:os.mkdir [OWNED]): 1",
    "class": "more: !new:subprocess.Popen [[touch, OWNED]]",
    "name": "more: !name:os.mkdir",
    "module": "more: !module:antigravity",
    "include": "more: !include:/etc/hostname",
    "copy": "more: !copy <num_spks>",
    "attribute": "more: !ref <num_spks.numerator>",
    "arithmetic": "more: !ref 9 ** 9 ** <num_spks>",
    "placeholder": "more: !PLACEHOLDER",
    "anchor": "more: &a [1]\nrest: *a",
    "endless": "more: &a [*a]",
    "merge": "more: {<<: {num_spks: 3}}",
    "date": "more: 2001-01-01",
    "paths": "pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer"
    "\n    loadables: !ref <modules>\n    paths: {masknet: someone/model}",
    "list": "pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer"
    "\n    [OWNED, !ref <modules>]",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_model_runs_no_code(packed, tmp_path, attack):
    path, owned = packed / "hyperparams.yaml", tmp_path / "owned"
    text = path.read_text()
    if ATTACKS[attack].startswith("pretrainer"):
        text = text.split("pretrainer:")[0]
    path.write_text(text + ATTACKS[attack].replace("OWNED", str(owned)) + "\n")
    with pytest.raises(ValueError, match=r"yaml asks for [\s\S]*--trust"):
        load(packed)
    assert not owned.exists()


def test_line_ends_that_parsers_differ_in_are_refused(packed, tmp_path):
    # HyperPyYAML writes the yaml anew and parses that: a comment here could
    # be a tag there.
    owned = tmp_path / "owned"
    for end in "\x85", "\u2028", "\u2029":
        shutil.copy(packed / "hyperparams.yaml", tmp_path)
        with (packed / "hyperparams.yaml").open("a", encoding="utf-8") as file:
            file.write(f"more: 1 # {end}x: !apply:os.mkdir [{owned}]\n")
        with pytest.raises(
            ValueError, match="hyperparams.yaml is not valid yaml"
        ):
            load(packed)
        assert not owned.exists()
        shutil.copy(tmp_path / "hyperparams.yaml", packed)


def test_overrides_run_no_code_unless_trusted(packed, tmp_path):
    owned = tmp_path / "owned"
    overrides = f"num_spks: !apply:os.mkdir [{owned}]"
    with pytest.raises(ValueError, match="it asks for '!apply:os.mkdir'"):
        load(packed, overrides=overrides)
    assert not owned.exists()


def test_trust_lifts_it(packed, model, tmp_path):
    owned = tmp_path / "owned"
    with (packed / "hyperparams.yaml").open("a") as file:
        file.write(f"more: !apply:os.mkdir [{owned}]\n")
    assert same_weights(load(packed, trust=True), model)
    assert owned.is_dir()


def test_a_trusted_yaml_may_say_where_weights_are(packed, model, tmp_path):
    (packed / "masknet.ckpt").rename(tmp_path / "elsewhere.ckpt")
    with (packed / "hyperparams.yaml").open("a") as file:
        file.write(f"    paths: {{masknet: {tmp_path}/elsewhere.ckpt}}\n")
    assert same_weights(load(packed, trust=True), model)


def test_trust_on_the_command_line(packed, capsys):
    change_yaml(packed, "rate: 8000", "rate: !ref <num_spks> * 4000")
    assert cli.main(["info", str(packed)]) == 1
    assert "say --trust" in capsys.readouterr().err
    assert cli.main(["info", str(packed), "--trust"]) == 0


def test_checkpoints_run_no_code(packed, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"norm_out.bias": Attack()}, packed / "masknet.ckpt")
    for trust in False, True:
        with pytest.raises(
            ValueError, match="masknet.ckpt is incomplete, or not"
        ):
            load(packed, trust=trust)
    assert not (tmp_path / "owned").exists()


PEERS = """\
num_spks: 2
sample_rate: 8000
encoder: !new:speechbrain.lobes.models.dual_path.Encoder
    kernel_size: 16
    out_channels: 16
masknet: !new:speechbrain.lobes.models.dual_path.Dual_Path_Model
    in_channels: 16
    out_channels: 16
    num_layers: 1
    norm: ln
    K: 20
    num_spks: 2
    intra_model: !new:speechbrain.lobes.models.dual_path.SBTransformerBlock
        {num_layers: 1, d_model: 16, nhead: 2, d_ffn: 16}
    inter_model: !new:speechbrain.lobes.models.dual_path.SBRNNBlock
        {input_size: 16, hidden_channels: 8, num_layers: 1}
decoder: !new:speechbrain.lobes.models.dual_path.Decoder
    {in_channels: 16, out_channels: 1, kernel_size: 16, stride: 8, bias: false}
"""


def test_masknets_of_speechbrain_need_no_trust():
    assert untrusted(YAML().compose(PEERS)) == []


def test_a_model_of_before_the_network_moved_loads(packed, model):
    ours, old = "speechbrain_flashformer", "speechbrain.lobes.models.dual_path"
    change_yaml(packed, f"new:{ours}.FlashF", f"new:{ours}.masknet.FlashF")
    assert same_weights(load(packed), model)
    change_yaml(packed, old, f"{ours}.filterbank")
    text = read_yaml(packed / "hyperparams.yaml")
    assert f"!new:{ours}.nnet.filterbank.Encoder" in text
    assert untrusted(YAML().compose(text)) == []


# --- what is broken ----------------------------------------------------------


def edit(old, new):
    return lambda folder: change_yaml(folder, old, new)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut_yaml(key):
    def change(folder):
        path = folder / "hyperparams.yaml"
        path.write_text(path.read_text().split(key)[0])

    return change


def save(thing):
    return lambda folder: torch.save(thing, folder / "masknet.ckpt")


def cut_checkpoint(folder):
    path = folder / "masknet.ckpt"
    path.write_bytes(path.read_bytes()[:5000])


def to_folder(folder):
    (folder / "masknet.ckpt").unlink()
    (folder / "masknet.ckpt").mkdir()


def with_weight(change):
    def edited(folder):
        path = folder / "masknet.ckpt"
        state = torch.load(path, weights_only=True)
        state |= change(state.pop("norm_out.bias"))
        torch.save(state, path)

    return edited


def with_bias(change):
    return with_weight(lambda value: {"norm_out.bias": change(value)})


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
BROKEN = {
    "yaml syntax": (
        write("hyperparams.yaml", b"a: [\n"),
        "not valid yaml from line",
    ),
    "endless yaml": (
        write("hyperparams.yaml", b"a: " + b"[" * 9999),
        "yaml is not valid yaml",
    ),
    "binary yaml": (
        write("hyperparams.yaml", b"\xff\xfe\x00"),
        "not UTF-8 text",
    ),
    "empty yaml": (write("hyperparams.yaml", b""), "yaml is empty"),
    "comment alone": (write("hyperparams.yaml", b"# x\n"), "has no keys"),
    "list": (write("hyperparams.yaml", b"- 1\n"), "has no keys"),
    "yaml pointer": (write("hyperparams.yaml", POINTER), "git lfs pull"),
    "no modules": (cut_yaml("modules:"), "has no modules, pretrainer"),
    "no pretrainer": (cut_yaml("pretrainer:"), "has no pretrainer"),
    "no num_spks": (
        edit("num_spks: 2\nsample", "sample"),
        "has no num_spks",
    ),
    "no rate": (edit("sample_rate: 8000\n", ""), "has no sample_rate"),
    "text rate": (edit("8000", "fast"), "sample_rate must be a whole number"),
    "no decoder": (
        edit("    decoder: !ref <decoder>\n", ""),
        "modules have no decoder",
    ),
    "module is text": (
        edit("decoder: !ref <decoder>", "decoder: text"),
        "modules have no decoder",
    ),
    "module more": (
        edit(
            "    decoder: !ref <decoder>\n",
            "    decoder: !ref <decoder>\n    extra: 5\n",
        ),
        "extra is not a module",
    ),
    "loads less": (
        edit("loadables: !ref <modules>", "loadables: {}"),
        "pretrainer loads no encoder",
    ),
    "argument": (edit("lookback", "lookbak"), "unexpected keyword .*lookbak"),
    "value": (edit("nhead: 2", "nhead: 3"), "cannot build the model of"),
    "class": (edit("FlashFormer", "FlashFormr"), "asks for .*FlashFormr"),
    "channels": (
        edit("out_channels: 16", "out_channels: 32"),
        "channels of encoder and decoder are 32 and 16",
    ),
    "kernel": (edit("stride: 8", "stride: 4"), r"\(16, 8\) and \(16, 4\)"),
    "speakers": (
        edit("num_spks: 2\nsample", "num_spks: 3\nsample"),
        "num_spks of model and masknet are 3 and 2",
    ),
    "pointer": (write("masknet.ckpt", POINTER), "masknet.*git lfs pull"),
    "text": (
        write("masknet.ckpt", b"text"),
        "masknet.ckpt is incomplete, or not",
    ),
    "empty": (write("masknet.ckpt", b""), "masknet.ckpt is empty"),
    "cut": (cut_checkpoint, "masknet.ckpt is incomplete, or not"),
    "module": (
        save(torch.nn.Linear(1, 1)),
        "masknet.ckpt is incomplete, or not",
    ),
    "tensors": (save([torch.ones(1)]), "masknet.ckpt has no weights"),
    "numbers": (save({"a": 1}), "masknet.ckpt has no weights"),
    "missing": (with_weight(lambda value: {}), "in 1 .* norm_out.bias"),
    "unknown": (
        with_weight(lambda value: {"norm_out.bias": value, "another": value}),
        "does not fit the masknet .* in 1 weights, such as another",
    ),
    "shape": (with_bias(lambda value: value[1:]), "in 1 .* norm_out.bias"),
    "integers": (with_bias(lambda value: value.int()), "in 1 .* norm_out.bias"),
    "complex": (with_bias(lambda value: value + 0j), "in 1 .* norm_out.bias"),
    "sparse": (with_bias(lambda value: value.to_sparse()), "masknet.ckpt"),
    "nan": (with_bias(lambda value: value / 0), "not finite, .*norm_out.bias"),
    "folder": (to_folder, "no masknet.ckpt in"),
    "gone": (lambda folder: shutil.rmtree(folder), "no model folder"),
    "no checkpoint": (
        lambda folder: (folder / "masknet.ckpt").unlink(),
        "no masknet.ckpt in",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_one_error_with_its_file(packed, capsys, case):
    change, message = BROKEN[case]
    change(packed)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as told:
        load(packed)
    assert str(packed) in str(told.value)
    assert cli.main(["info", str(packed)]) == 1
    assert capsys.readouterr().err == f"flashformer: {told.value}\n"
    assert "\n" not in str(told.value)


def test_a_trusted_model_is_told_as_well(packed):
    write("hyperparams.yaml", b"a: [\n")(packed)
    with pytest.raises(ValueError, match="cannot build the model of .*yaml"):
        load(packed, trust=True)


@pytest.mark.parametrize("command", ["separate", "export", "app", "stream"])
def test_every_command_tells_it(packed, tmp_path, capsys, monkeypatch, command):
    write("masknet.ckpt", POINTER)(packed)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    more = {
        "separate": ["a.wav", "-o", tmp_path / "out", "--model", packed],
        "export": [packed, tmp_path / "out"],
        "app": ["--model", packed],
        "stream": ["--model", packed, "-o", tmp_path / "out"],
    }[command]
    assert cli.main([command, *map(str, more)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_that_may_not_be_read_is_named(packed, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError, match=r"cannot read it .*encoder.ckpt"):
        load_weights(torch.nn.Linear(1, 1), packed / "encoder.ckpt")


def test_a_file_in_place_of_a_folder_is_refused(packed):
    with pytest.raises(NotADirectoryError, match="is a file: give the model"):
        load(packed / "hyperparams.yaml")


def test_an_override_must_match(packed):
    assert load(packed, overrides={"num_spks": 2}).hparams.num_spks == 2
    with pytest.raises(ValueError, match="Override 'speakers' not found"):
        load(packed, overrides={"speakers": 3})


@pytest.mark.parametrize("wrong", [torch.nan, 1e6])
def test_refused_weights_leave_the_module_as_it_was(tmp_path, wrong):
    module = torch.nn.Linear(2, 3).half()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = torch.nn.Linear(2, 3).state_dict()
    state["bias"][1] = wrong  # the second is no number in half precision
    torch.save(state, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="not finite, such as bias"):
        load_weights(module, tmp_path / "a.ckpt")
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("kind", ["packed_once", "packed_causal"])
def test_a_model_without_speechbrain_gives_the_same(kind, request):
    folder = request.getfixturevalue(kind)
    theirs, ours = load(folder), RecordingSeparator(folder)
    assert same_weights(ours, theirs)
    kinds = {type(ours.mods[n]).__module__ for n in ("encoder", "decoder")}
    assert kinds == {"speechbrain_flashformer.nnet.plain"}
    mixture = torch.randn(2, 20000)
    for options in (
        {},
        {"channels": "each", "chunk": 1.0, "overlap": 0.2},
        {"mixture_consistency": True},
        {"precision": "bf16"},
    ):
        torch.testing.assert_close(
            ours.separate_audio(mixture, 11025, **options),
            theirs.separate_audio(mixture, 11025, **options),
            rtol=0,
            atol=0,
        )
    assert ours.describe() == theirs.describe()


def test_a_trusted_model_is_built_as_its_yaml_says(packed, model):
    separator = RecordingSeparator(packed, trust=True)
    assert type(separator.mods.encoder).__module__.startswith("speechbrain.")
    assert same_weights(separator, model)


def test_weights_are_read_once(packed, monkeypatch):
    reads, torch_load = [], torch.load
    monkeypatch.setattr(
        "torch.load",
        lambda path, **kwargs: reads.append(path) or torch_load(path, **kwargs),
    )
    load(packed)
    assert len(reads) == 3


# --- hubs and savedir --------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, packed):
    """A model hub with one model; what is asked of it."""
    asked = []

    def download(repo_id, filename, **kwargs):
        asked.append((repo_id, filename, kwargs["revision"]))
        if repo_id != "me/small":
            raise OSError("404 Client Error\nnothing there")
        return str(packed / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


@pytest.mark.parametrize(
    "name", ["me/small", "results/nope", "nope", "https://hub/me/small"]
)
def test_what_is_no_folder_is_never_fetched(hub, capsys, name):
    with pytest.raises(FileNotFoundError, match="no model folder .*hf:OWNER"):
        load(name)
    assert cli.main(["info", name]) == 1
    assert "no model folder" in capsys.readouterr().err
    assert not hub


def test_a_model_on_a_hub_is_asked_for_by_name(hub, model):
    fetch_config = FetchConfig(revision="v1")
    fetched = load("hf:me/small", fetch_config=fetch_config)
    assert same_weights(fetched, model)
    assert set(hub) == {("me/small", name, "v1") for name in NAMES}
    assert load("hf:me/small", download_only=True) is None
    assert cli.main(["info", "hf:me/small"]) == 0


def test_a_model_on_a_hub_is_not_trusted(hub, packed):
    change_yaml(packed, "rate: 8000", "rate: !ref <num_spks> * 4000")
    with pytest.raises(ValueError, match="--trust"):
        load("hf:me/small")
    assert load("hf:me/small", trust=True).hparams.sample_rate == 8000


@pytest.mark.parametrize(
    "name, message",
    [
        ("hf:me/gone", "cannot fetch hyperparams.yaml of hf:me/gone: 404 Cl"),
        (
            "hf:small",
            "hf:small is not the name of a model on a hub: give it as hf:OWNER",
        ),
        ("hf:a/b/c", "is not the name of a model on a hub"),
    ],
)
def test_a_model_that_is_on_no_hub_is_one_error(hub, name, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(name)


@pytest.mark.parametrize(
    "strategy", [LocalStrategy.SYMLINK, LocalStrategy.COPY]
)
def test_savedir_gets_the_files_of_a_hub(hub, packed, tmp_path, strategy):
    savedir = tmp_path / "kept/here"
    for _ in range(2):
        load("hf:me/small", savedir=savedir, local_strategy=strategy)
        assert sorted(f.name for f in savedir.iterdir()) == sorted(NAMES)
        for name in NAMES:
            assert filecmp.cmp(savedir / name, packed / name, shallow=False)
    linked = (savedir / "masknet.ckpt").is_symlink()
    assert linked == (strategy == LocalStrategy.SYMLINK)


def test_links_of_another_model_in_savedir_are_replaced(
    hub, make_run, model, tmp_path
):
    other = pack(make_run(tmp_path / "run", seed=1), tmp_path / "other")
    savedir = tmp_path / "savedir"
    savedir.mkdir()
    for name in NAMES:
        (savedir / name).symlink_to(other / name)
    assert same_weights(load("hf:me/small", savedir=savedir), model)


def test_files_in_savedir_are_never_replaced(hub, make_run, tmp_path):
    mine = pack(make_run(tmp_path / "run", seed=1), tmp_path / "mine")
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    for config in None, FetchConfig(overwrite=True):
        with pytest.raises(FileExistsError, match="encoder.ckpt is another"):
            load("hf:me/small", savedir=mine, fetch_config=config)
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == before
    assert not any(path.is_symlink() for path in mine.iterdir())


def test_savedir_means_nothing_for_a_folder(packed, model, tmp_path):
    (tmp_path / "link").symlink_to(packed)
    before = {path: path.read_bytes() for path in packed.iterdir()}
    for savedir in packed, f"{packed}/../model", tmp_path / "link":
        assert same_weights(load(packed, savedir=savedir), model)
    load(packed, savedir=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert {path: path.read_bytes() for path in packed.iterdir()} == before
    assert not any(path.is_symlink() for path in packed.iterdir())


def test_speechbrain_itself_loads_a_packed_folder(packed, model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = SepformerSeparation.from_hparams(str(packed))
    assert same_weights(theirs, model)
    noise = torch.randn(1, 24000)
    torch.testing.assert_close(
        theirs.separate_batch(noise), model.separate_batch(noise)
    )


# --- run_opts ----------------------------------------------------------------

RUN_OPTS = {
    "compile": {"compile": True},
    "one": {"compile": True, "compile_module_keys": ["masknet"]},
    "parallel": {"data_parallel_backend": True},
    "both": {"compile": True, "data_parallel_backend": True},
    "jit": {"jit": True, "jit_module_keys": ["encoder"]},
}


@pytest.mark.parametrize("options", RUN_OPTS)
def test_run_opts_change_no_result(packed_causal, monkeypatch, options):
    compile = torch.compile
    # Compiling for real takes minutes.
    monkeypatch.setattr(
        "torch.compile", lambda module, **_: compile(module, backend="eager")
    )
    plain = load(packed_causal, run_opts={"device": "cpu"})
    run_opts = {"device": "cpu", **RUN_OPTS[options]}
    model = load(packed_causal, run_opts=run_opts)
    mixture = torch.randn(1, 1600)
    torch.testing.assert_close(
        model.separate_batch(mixture), plain.separate_batch(mixture)
    )
    options = {"chunk": 0.1, "overlap": 0.02}
    torch.testing.assert_close(
        model.separate_audio(mixture, **options),
        plain.separate_audio(mixture, **options),
    )
    torch.testing.assert_close(
        model.separate_audio(mixture, streaming=True),
        plain.separate_audio(mixture, streaming=True),
    )
    assert model.describe() == plain.describe()
    # Long recordings, whose masks come in pieces where nothing is around them.
    monkeypatch.setattr(pieces, "PIECE", 20)
    torch.testing.assert_close(
        model.separate_batch(mixture), plain.separate_batch(mixture)
    )


def test_run_opts_choose_the_precision(packed, model):
    mixture = torch.randn(1, 1600)
    half = load(packed, run_opts={"device": "cpu", "precision": "bf16"})
    torch.testing.assert_close(
        half.separate_audio(mixture),
        model.separate_audio(mixture, precision="bf16"),
    )
    out, full = half.separate_batch(mixture), model.separate_batch(mixture)
    assert out.dtype == torch.float32 and not torch.equal(out, full)
    assert (out - full).norm() < 0.05 * full.norm()


def test_modules_that_cannot_be_scripted_are_told(packed):
    with pytest.raises(ValueError, match="take compile, or name those"):
        load(packed, run_opts={"device": "cpu", "jit": True})
