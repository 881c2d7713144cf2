"""The house: imports go one way, and every room can be entered alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "speechbrain_flashformer"

# Room -> the rooms it may import. No room imports a sibling not named here.
MAY_IMPORT = {
    "__init__": {"masknet", "streaming"},
    "attention": set(),
    "fsmn": set(),
    "norm": set(),
    "filterbank": set(),
    "rotary": set(),
    "masknet": {"attention", "fsmn", "norm", "rotary"},
    "separate": {"norm"},
    "streaming": {"masknet", "separate"},
    "metrics": set(),
    "losses": {"metrics"},
    "optim": set(),
    "data": set(),
    "mixing": set(),
    "augment": set(),
    "checkpoints": set(),
    "scores": {"metrics"},
    "brain": {"augment", "checkpoints", "optim", "scores", "separate"},
    "voices": set(),
    "speakers": set(),
    "chunks": {"speakers"},
    "trust": {"separate"},
    "weights": {"checkpoints"},
    "models": {"separate", "trust", "weights"},
    "mpeg": set(),
    "containers": {"mpeg"},
    "audio": {"containers"},
    "files": {"containers"},
    "inputs": {"files"},
    "inference": {
        "attention",
        "audio",
        "chunks",
        "files",
        "metrics",
        "models",
        "separate",
        "streaming",
    },
    "live": {"containers", "streaming"},
    "pack": {
        "checkpoints",
        "models",
        "scores",
        "separate",
        "streaming",
        "trust",
        "weights",
    },
    "jobs": set(),
    "export": {"separate", "streaming"},
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
TORCH_ONLY = (
    "attention",
    "fsmn",
    "norm",
    "masknet",
    "separate",
    "streaming",
    "metrics",
)


def imports(path):
    """Full names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in {path}"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_is_listed():
    rooms = {path.stem for path in (ROOT / PACKAGE).glob("*.py")}
    assert rooms == set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room):
    found = {
        name.split(".")[1]
        for name in imports(ROOT / PACKAGE / f"{room}.py")
        if name.startswith(PACKAGE + ".")
    }
    rooms = {path.stem for path in (ROOT / PACKAGE).glob("*.py")}
    found &= rooms
    assert found <= MAY_IMPORT[room]


@pytest.mark.parametrize("room", TORCH_ONLY)
def test_the_network_needs_torch_alone(room):
    tops = {
        name.split(".")[0] for name in imports(ROOT / PACKAGE / f"{room}.py")
    }
    outside = tops - set(sys.stdlib_module_names) - {PACKAGE}
    assert outside <= {"torch", "scipy", *LAZY}


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
    assert PACKAGE not in names and "masknet" in names
    assert not names & {"utils", "util", "helpers", "common", "misc"}
