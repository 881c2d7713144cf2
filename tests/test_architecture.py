"""The house: imports go one way, and the network needs torch alone."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "speechbrain_flashformer"

# Wing -> the wings it may import. A module outside the wings counts as one. Two
# modules read what a training wrote: its checkpoints and its scores.
MAY_IMPORT = {
    "__init__": {"nnet", "inference"},
    "nnet": set(),
    "training": {"nnet"},
    "inference": {"nnet"},
    "cli": {"nnet", "inference"},
}
TRAINED = {
    "inference.pack": {"training.checkpoints"},
    "inference.card": {"training.scores"},
}
# All write a file beside and rename it, and list a folder, in the same way.
FILES = {"inference.files", "inference.listing"}
# Imported where they are needed, if they are there.
LAZY = {"flash_attn", "hyperpyyaml", "pesq", "pystoi"}


def path_of(module):
    return ROOT / PACKAGE / f"{module.replace('.', '/')}.py"


def modules():
    """Names of all modules below the package, with their wing."""
    folder = ROOT / PACKAGE
    return {
        path.relative_to(folder).with_suffix("").as_posix().replace("/", ".")
        for path in folder.rglob("*.py")
    }


TORCH_ONLY = [
    name for name in sorted(modules()) if name.startswith("nnet.")
] + ["training.metrics", "training.optim"]


def own_imports(module):
    """Modules of the package that a module imports."""
    names = {
        name.removeprefix(PACKAGE + ".")
        for name in imports(path_of(module))
        if name.startswith(PACKAGE + ".")
    }
    return names & modules() | {
        f"{name}.__init__" for name in names if f"{name}.__init__" in modules()
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


def test_every_module_is_in_a_wing():
    assert {name.split(".")[0] for name in modules()} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_one_way(module):
    wing = module.split(".")[0]
    outside = {
        name for name in own_imports(module) if name.split(".")[0] != wing
    }
    outside -= TRAINED.get(module, set())
    if wing == "training":
        outside -= FILES
    assert {name.split(".")[0] for name in outside} <= MAY_IMPORT[wing]


def test_no_imports_in_circles():
    graph = {name: own_imports(name) - {name} for name in modules()}
    for name in graph:  # a wing's first page imports lazily what stands in it
        graph[name] -= {x for x in graph[name] if x.endswith(".__init__")}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) > 1


@pytest.mark.parametrize("module", sorted(modules()))
def test_files_are_short(module):
    lines = path_of(module).read_text(encoding="utf-8").count("\n")
    assert lines <= (300 if module == "nnet.flashformer" else 350)


@pytest.mark.parametrize("module", TORCH_ONLY)
def test_the_network_needs_torch_alone(module):
    tops = {name.split(".")[0] for name in imports(path_of(module))}
    outside = tops - set(sys.stdlib_module_names) - {PACKAGE}
    allowed = {"torch", *LAZY}
    if module == "training.metrics":
        allowed |= {"scipy"}
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
