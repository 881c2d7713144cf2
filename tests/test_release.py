"""What a release is made of: one version, a whole wheel, one CI."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import speechbrain_flashformer

ROOT = Path(__file__).parent.parent
PACKAGE = "speechbrain_flashformer"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: building leaves things behind."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    for name in (PACKAGE, "hparams"):
        shutil.copytree(
            ROOT / name,
            copy / name,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    code = (
        "import sys; from setuptools import build_meta;"
        "build_meta.build_wheel(sys.argv[1])"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=copy,
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_has_all_that_a_user_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry,) = (name for name in names if name.endswith("entry_points.txt"))
        scripts = archive.read(entry).decode()
    files = [
        *(ROOT / PACKAGE).glob("*.py"),
        *(path for path in (ROOT / PACKAGE / "pretrained").iterdir()),
    ]
    wanted = {path.relative_to(ROOT).as_posix() for path in files}
    wanted |= {
        f"{PACKAGE}/hparams/{path.name}"
        for path in (ROOT / "hparams").glob("*.yaml")
    }
    assert wanted <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert f"flashformer = {PACKAGE}.cli:main" in scripts
    # And nothing that is none of theirs.
    tops = {name.split("/")[0] for name in names}
    assert tops == {PACKAGE, entry.split("/")[0]}


def test_the_wheel_separates_where_nothing_else_is(wheel, tmp_path):
    """From the wheel alone, and in another folder than the repository's."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import numpy, soundfile, speechbrain_flashformer\n"
        "from speechbrain_flashformer import cli\n"
        "assert 'site' in speechbrain_flashformer.__file__\n"
        "soundfile.write('mix.wav', numpy.random.randn(8000) / 10, 8000)\n"
        "sys.exit(cli.main(['separate', 'mix.wav', '-o', 'out']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_the_forms_for_issues_can_be_read():
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = [YAML().load(folder / f"{name}.yml") for name in ("bug", "idea")]
    assert all(form["name"] and form["body"] for form in forms)


def test_there_is_one_version():
    version = speechbrain_flashformer.__version__
    citation = YAML().load(ROOT / "CITATION.cff")
    assert citation["version"] == version
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert first[1] == version


def test_the_workflow_does_what_ci_does():
    path = ROOT / ".github" / "workflows" / "ci.yml"
    (job,) = YAML().load(path)["jobs"].values()
    steps = [step["run"] for step in job["steps"] if "run" in step]
    assert steps == ["bash .ci/run"]
    supported = re.search(
        r'python_requires="(.+)"', (ROOT / "setup.py").read_text()
    )
    lowest, beyond = re.findall(r"3\.(\d+)", supported[1])
    assert job["strategy"]["matrix"]["python"] == [
        f"3.{lowest}",
        f"3.{int(beyond) - 1}",
    ]
