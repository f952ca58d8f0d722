"""Figures on pages are those of the newest results, and have one home: the performance page."""

import re
from pathlib import Path

import pytest

from bench.page import FIGURES, PAGE, RESULTS, figures, kept_results, marked_pages, written
from tests.support.harness.documents import ROOT

_FIGURE = re.compile(r"(?<![\w.])\d[\d.,]* (?:MiB|ms|Gbit/s|s|%|times)(?!\w)")
README = ROOT / "README.md"


def test_pages_are_as_the_generator_writes_them() -> None:
    """If a result was added, run ``make bench-page``."""
    different = [str(path.relative_to(ROOT)) for path, text in written().items() if path.read_text() != text]
    assert different == [], "run make bench-page"
    assert {README, PAGE} <= written().keys()


def test_every_figure_that_the_generator_knows_is_in_a_result_and_on_the_page() -> None:
    found = {one.wanted.key for one in figures(kept_results())}
    assert found == {one.key for one in FIGURES}
    assert [one.what for one in FIGURES if f"| {one.what} |" not in PAGE.read_text()] == []


def test_a_result_that_a_newer_one_of_its_kind_replaces_is_named_or_leaves() -> None:
    texts = "".join(
        path.read_text()
        for folder in ("docs", "bench", "tests", "setup", "skep")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".md", ".py", ".sh", ".txt"} and path.parent != RESULTS
    )
    kinds: dict[str, list[str]] = {}
    for path in RESULTS.iterdir():
        if (day := re.search(r"\d{4}-\d\d-\d\d(-\d{4})?", path.name)) and path.suffix != ".json":
            words = re.sub(r"-?(\d{4}-\d\d-\d\d(-\d{4})?|(?<=-)[0-9a-f]{7,9}\b)", "", path.stem).strip("-")
            kinds.setdefault(words, []).append(f"{day[0]} {path.stem}")
    older = [name.partition(" ")[2] for names in kinds.values() for name in sorted(names)[:-1]]
    assert [name for name in older if name not in texts] == []


def test_each_row_names_a_kept_result() -> None:
    text = PAGE.read_text()
    named = re.findall(r"^\| \d+ \| .*\(\.\./\.\./bench/results/([^)]+)\)", text, re.MULTILINE)
    numbers = {int(number) for number in re.findall(r"\| \[(\d+)\]\(#results\) \|$", text, re.MULTILINE)}
    assert numbers == {*range(1, len(named) + 1)}
    assert [name for name in named if not (RESULTS / name).exists()] == []


@pytest.mark.parametrize(
    "page", [README, *sorted((ROOT / "docs/compare").glob("*.md"))], ids=lambda page: page.name
)
def test_no_page_has_a_figure_that_the_performance_page_has_not(page: Path) -> None:
    """But for those that another system's documentation names."""
    lines = [line for line in page.read_text().splitlines() if "by its documentation" not in line]
    text = re.sub(r"<!--.*?-->", "", "\n".join(lines))
    home = {*_FIGURE.findall(PAGE.read_text()), *ratios()}
    assert [one for one in _FIGURE.findall(text) if one not in home] == []


def ratios() -> set[str]:
    return {one.text("ratio") for one in figures(kept_results())}


@pytest.mark.parametrize("page", marked_pages(), ids=lambda page: page.name)
def test_no_line_begins_with_a_mark(page: Path) -> None:
    """There, Markdown begins a block of HTML, which ends the paragraph."""
    assert re.findall(r"^\s*<!--[a-z-]+\..*", page.read_text(), re.MULTILINE) == []
