"""What the pages show is run: Python, yaml, and the commands.

The blocks of a page are run in order, in a folder that has the files they
name. Commands that install, train or serve are not run; that their files and
options exist is checked.
"""

import doctest
import io
import itertools
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain import parse_arguments

from speechbrain_flashformer import cli

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "WSJ0Mix" / "separation"
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    RECIPE / "README.md",
    ROOT / "recipes" / "Pretrained" / "README.md",
    *sorted((ROOT / "speechbrain_flashformer").glob("pretrained*/README.md")),
]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What a page leaves to the reader, and what stands for it here.
PLACES = {
    "MODEL": "model",
    "RUN_DIR": "results/flashformer-demo/1234",
}
# They go on until they are stopped.
SERVERS = ("app", "stream")
# What a recipe has besides the lines shown.
NUMBERS = {"num_spks": 2, "N_encoder_out": 64}


def commands(code):
    """The commands of a shell block, each as a list of words."""
    for line in code.replace("\\\n", " ").splitlines():
        for command in re.split(r"&&|\|", line):
            words = shlex.split(command, comments=True)
            if words:
                yield words


@pytest.fixture(scope="module")
def world(tmp_path_factory, packed_once, packed_causal, make_run):
    """A folder with what the pages name."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(packed_once, folder / "model")
    shutil.copytree(packed_causal, folder / "causal")
    shutil.copytree(ROOT / "hparams", folder / "hparams")
    run = make_run(folder / PLACES["RUN_DIR"], seed=0)
    shutil.copytree(run, folder / "results/mine/1234")
    (folder / "recordings").mkdir()
    (folder / "NOISE").mkdir()
    noise = 0.1 * np.random.default_rng(0).normal(size=12000)
    for name in ("meeting", "day", "mixture", "recordings/talk", "NOISE/a"):
        soundfile.write(folder / f"{name}.wav", noise, 8000)
    for part in ("train", "valid", "test"):
        for speaker in "ab":
            path = folder / "speech" / part / speaker / "1.wav"
            path.parent.mkdir(parents=True)
            soundfile.write(path, noise, 8000)
    return folder


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """The same for one page, which may write into it."""
    folder = shutil.copytree(world, tmp_path / "here")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    "page", PAGES, ids=[f"{page.parent.name}/{page.stem}" for page in PAGES]
)
def test_what_a_page_shows_runs(page, here, capsys):
    text = page.read_text(encoding="utf-8")
    # Of the samples that a page does not make itself.
    names = {"mixture": np.zeros((1, 800), np.float32)}
    blocks = BLOCK.findall(text)
    assert 2 * len(blocks) == len(re.findall("^```", text, re.M))
    for language, code in blocks:
        run_block(page, language, code, names)


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.name))
def test_links_lead_somewhere(page):
    """To a file of the project, and to a heading that it has."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)|^\[[^]]+\]: (\S+)$", text, re.M)
    for link in filter(None, itertools.chain(*links)):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            assert heading in anchors(target), link


def anchors(page):
    """Names of the headings of a page, as GitHub makes them."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


def run_block(page, language, code, names):
    if language == "python" and code.startswith(">>>"):
        _session(page, code, names)
    elif language == "python":
        exec(compile(code, str(page), "exec"), names)
    elif language == "sh":
        for words in commands(code):
            if words[0] == "flashformer":
                _flashformer(words[1:])
            elif words[0] in ("python", "torchrun") and "train.py" in words:
                _train(words[words.index("train.py") + 1 :])
            elif words[0] == "python" and words[1] != "-m":
                _exists(page, words[1])
    elif language == "yaml":
        _yaml(code)
    else:
        # Files drawn in letters; changes, which test_upstream.py makes.
        assert language in ("", "diff")


def _session(page, code, names):
    """Run what was typed, compare what was answered."""
    test = doctest.DocTestParser().get_doctest(code, names, page.name, None, 0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    said = io.StringIO()
    result = runner.run(test, out=said.write, clear_globs=False)
    names.update(test.globs)
    assert not result.failed, said.getvalue()


def _flashformer(words):
    words = [PLACES.get(word, word) for word in words]
    if "--streaming" in words:
        words = ["causal" if word == "model" else word for word in words]
    # Wrong words end the test here, of any command.
    cli._parser().parse_args(words)
    if words[0] in SERVERS or "-" in words:
        return
    if words[0] in ("separate", "pack", "export"):
        words.append("--overwrite")
    assert cli.main(words) == 0


def _train(words):
    """Build what the command would train."""
    path, run_opts, overrides = parse_arguments(
        [str(RECIPE / words[0]), *words[1:]]
    )
    with open(path, encoding="utf-8") as file:
        hparams = load_hyperpyyaml(file, overrides)
    assert hparams["modules"]


def _exists(page, path):
    folders = (ROOT, RECIPE, page.parent)
    assert any((folder / path).is_file() for folder in folders), path


def _yaml(code):
    numbers = "".join(f"{name}: {n}\n" for name, n in NUMBERS.items())
    file = io.StringIO(numbers + code)
    file.name = "hparams/snippet.yaml"
    masknet = load_hyperpyyaml(file)["MaskNet"]
    assert masknet(torch.rand(1, NUMBERS["N_encoder_out"], 50)).shape[0] == 2


@pytest.mark.parametrize(
    "language, code, error, message",
    [
        ("python", "import torch\nassert 1 > 2, 'no'\n", AssertionError, "no"),
        ("python", ">>> 1 + 1\n3\n", AssertionError, r"Expected:\s+3"),
        (
            "sh",
            "flashformer separate meeting.wav -o x --loudness 3\n",
            SystemExit,
            "2",
        ),
        (
            "sh",
            "cd x && flashformer separate no.wav -o separated\n",
            AssertionError,
            "1 == 0",
        ),
        (
            "sh",
            "python train.py hparams/flashformer.yaml --no_key 1\n",
            KeyError,
            "no_key",
        ),
        (
            "sh",
            "python train.py hparams/none.yaml\n",
            FileNotFoundError,
            "none.yaml",
        ),
        ("sh", "python benchmarks/none.py\n", AssertionError, "none.py"),
        (
            "yaml",
            "MaskNet: !new:speechbrain_flashformer.FlashFormer\n",
            ValueError,
            r"takes \[batch, 256, frames\]",
        ),
        ("pascal", "", AssertionError, "pascal"),
    ],
)
def test_what_would_not_run_is_found(
    language, code, error, message, here, capsys
):
    with pytest.raises(error, match=message):
        run_block(ROOT / "README.md", language, code, {})
