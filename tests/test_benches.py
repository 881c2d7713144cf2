"""The benches: few, each named by a page, and no result that no page shows."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHES = ROOT / "benchmarks"
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "speechbrain_flashformer").glob("pretrained*/README.md")),
]
TEXT = "".join(page.read_text("utf-8") for page in PAGES)
CODE = {path.name: path.read_text("utf-8") for path in BENCHES.glob("*.py")}
SCRIPTS = sorted(name for name, text in CODE.items() if "__main__" in text)


def test_there_are_at_most_ten():
    assert 0 < len(SCRIPTS) <= 10


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_page_names_it(script):
    assert f"benchmarks/{script}" in TEXT


@pytest.mark.parametrize("module", sorted(set(CODE) - set(SCRIPTS)))
def test_what_is_not_run_is_imported(module):
    line = f"from {module.removesuffix('.py')} import"
    assert any(line in text for text in CODE.values())


@pytest.mark.parametrize(
    "result", sorted(path.name for path in (BENCHES / "results").iterdir())
)
def test_a_page_shows_it(result):
    # The curves and the table of learning.py stand beside its rows.
    stem = result.removesuffix("_curves.csv").removesuffix(".md")
    assert f"benchmarks/results/{stem.removesuffix('.csv')}" in TEXT
