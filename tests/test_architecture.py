"""The house: imports go one way, and the network needs torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "speechbrain_flashformer"

# Module -> the modules it may import; a wing stands for all that is in it.
MAY_IMPORT = {
    "__init__": {"nnet"},
    "nnet.__init__": set(),
    "nnet.attention": set(),
    "nnet.rotary": set(),
    "nnet.fsmn": set(),
    "nnet.norm": set(),
    "nnet.filterbank": set(),
    "nnet.layers": {"nnet.attention", "nnet.fsmn", "nnet.rotary"},
    "nnet.flashformer": {
        "nnet.attention",
        "nnet.fsmn",
        "nnet.layers",
        "nnet.norm",
        "nnet.rotary",
    },
    "nnet.separator": {"nnet.norm"},
    "nnet.streaming": {"nnet.flashformer", "nnet.separator"},
    "metrics": set(),
    "losses": {"metrics"},
    "optim": set(),
    "data": set(),
    "mixing": {"data"},
    "augment": set(),
    "checkpoints": set(),
    "scores": {"metrics"},
    "brain": {
        "augment",
        "checkpoints",
        "losses",
        "nnet",
        "optim",
        "scores",
    },
    "voices": set(),
    "speakers": set(),
    "chunks": {"speakers"},
    "trust": {"nnet"},
    "weights": {"checkpoints"},
    "models": {"nnet", "trust", "weights"},
    "mpeg": set(),
    "containers": {"mpeg"},
    "audio": {"containers"},
    "files": {"containers"},
    "inputs": {"files"},
    "inference": {"audio", "chunks", "files", "metrics", "models", "nnet"},
    "live": {"containers", "nnet"},
    "pack": {"checkpoints", "models", "nnet", "scores", "trust", "weights"},
    "jobs": set(),
    "export": {"nnet"},
    "app": {"audio"},
    "cli": {
        "app",
        "audio",
        "export",
        "files",
        "inference",
        "inputs",
        "jobs",
        "live",
        "pack",
    },
}
# Imported where they are needed, if they are there.
LAZY = {"flash_attn", "pesq", "pystoi"}
# Encoder and decoder are SpeechBrain's, with another start.
TORCH_ONLY = [
    name
    for name in MAY_IMPORT
    if name.startswith("nnet.") and name != "nnet.filterbank"
] + ["metrics", "optim"]


def path_of(module):
    return ROOT / PACKAGE / f"{module.replace('.', '/')}.py"


def modules():
    """Names of all modules below the package, with their wing."""
    folder = ROOT / PACKAGE
    paths = [*folder.glob("*.py"), *folder.glob("nnet/*.py")]
    return {
        path.relative_to(folder).with_suffix("").as_posix().replace("/", ".")
        for path in paths
    }


def imports(path):
    """Full names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in {path}"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_is_listed():
    assert modules() == set(MAY_IMPORT)


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_imports_go_one_way(module):
    own = {
        name.removeprefix(PACKAGE + ".")
        for name in imports(path_of(module))
        if name.startswith(PACKAGE + ".")
    }
    found = own & modules()
    allowed = MAY_IMPORT[module]
    assert {x for x in found if x.split(".")[0] not in allowed} <= allowed


@pytest.mark.parametrize("module", TORCH_ONLY)
def test_the_network_needs_torch_alone(module):
    tops = {name.split(".")[0] for name in imports(path_of(module))}
    outside = tops - set(sys.stdlib_module_names) - {PACKAGE}
    allowed = {"torch", "flash_attn"}
    if module == "metrics":
        allowed = {"torch", "scipy", *LAZY}
    assert outside <= allowed


def test_importing_the_masknet_does_not_import_speechbrain():
    code = (
        f"import sys, {PACKAGE}; {PACKAGE}.FlashFormer; "
        "sys.exit('speechbrain' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_module_named_for_nothing():
    folders = (PACKAGE, "recipes", "benchmarks", "tests")
    names = {
        path.stem
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if "scratch" not in path.parts  # of the benches, not of the project
    }
    assert PACKAGE not in names and "flashformer" in names
    assert not names & {"utils", "util", "helpers", "common", "misc"}
