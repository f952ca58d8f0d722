"""The documents as a site: whole, in the order of the index, and nothing in it comes from elsewhere."""

import gzip
import os
import re
import subprocess
from pathlib import Path, PurePosixPath

import pytest

from docs.site.diagrams import DRAWN, placed, shown, sources
from docs.site.hooks import FILES, OUTSIDE, landing, linked, navigation
from docs.site.recipes import packed
from docs.site.released import released
from tests.support.harness.built_pages import BuiltPage
from tests.support.harness.documents import PAGES, ROOT, build_site, shell_blocks

_LOADED = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["']?((?:https?:)?//[^"' >]+)""")
_STYLED = re.compile(r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with warnings as errors: links, headings, pages that nothing leads to."""
    directory = tmp_path_factory.mktemp("site")
    build_site(directory, "--strict")
    return directory


def test_every_page_of_the_repository_is_on_the_site(site: Path) -> None:
    built = {str(page.relative_to(site)) for page in site.rglob("*.html")} - {"404.html"}
    assert built == {_built(page) for page in PAGES}


def _built(page: Path) -> str:
    name = str(page.relative_to(ROOT))
    uri = OUTSIDE.get(name) or str(Path(name).relative_to("docs"))
    return uri.replace("README.md", "index.md").replace(".md", ".html")


COOKBOOK = ROOT / "docs/cookbook"
RECIPES = sorted(page.stem for page in COOKBOOK.glob("*.md"))


def recipe_files(recipe: str) -> dict[str, Path]:
    """Return the files of a recipe that the repository has, by their paths in the cookbook."""
    found = tracked(f"docs/cookbook/{recipe}")
    return {str(path.relative_to(COOKBOOK)): path for path in found}


def tracked(folder: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", folder], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / name for name in listed.split("\0") if name]


def targets(page: Path) -> set[Path]:
    """Return the files that the links of a built page lead to."""
    return {(page.parent / target).resolve() for target in BuiltPage(page.read_text()).links}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_file_of_a_recipe_is_reachable_from_its_page(site: Path, recipe: str) -> None:
    reachable = targets(site / f"cookbook/{recipe}.html")
    files = recipe_files(recipe)
    assert f"{recipe}/compose.yaml" in files
    assert [name for name in files if (site / "cookbook" / name) not in reachable] == []
    for name, path in files.items():
        assert (site / "cookbook" / name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_archive_has_the_files_of_a_recipe_with_their_modes(
    site: Path, recipe: str, tmp_path: Path
) -> None:
    archive = site / f"cookbook/{recipe}.tar.gz"
    assert archive in targets(site / f"cookbook/{recipe}.html")
    subprocess.run(["tar", "-xpzf", archive, "-C", tmp_path], check=True)
    unpacked = {str(path.relative_to(tmp_path)): path for path in tmp_path.rglob("*") if path.is_file()}
    files = recipe_files(recipe)
    assert unpacked.keys() == files.keys()
    for name, path in files.items():
        assert unpacked[name].read_bytes() == path.read_bytes()
        assert unpacked[name].stat().st_mode & 0o777 == (0o755 if path.stat().st_mode & 0o100 else 0o644)


def test_a_page_has_the_commands_of_its_source(site: Path) -> None:
    """A course types them from the site (``setup/course.sh``)."""
    for recipe in RECIPES:
        built = BuiltPage((site / f"cookbook/{recipe}.html").read_text())
        assert built.shell_blocks == shell_blocks(f"docs/cookbook/{recipe}.md")


def test_an_archive_is_the_same_in_every_build(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("second")
    (tmp_path / "a").write_text("first")
    names = [(PurePosixPath("recipe") / name, tmp_path / name) for name in ("b", "a")]
    first = packed(names)
    os.utime(tmp_path / "a", (1, 1))
    assert packed(reversed(names)) == first
    assert b"first" in gzip.decompress(first)


def test_the_files_for_prometheus_and_grafana_are_reachable_from_the_page_about_them(site: Path) -> None:
    reachable = targets(site / "guide/monitoring.html")
    packaged = [*tracked("packaging/prometheus"), *tracked("packaging/grafana")]
    assert [path for path in packaged if str(path.relative_to(ROOT)) not in FILES] == []
    for source, name in FILES.items():
        assert site / name in reachable
        assert (site / name).read_bytes() == (ROOT / source).read_bytes()


def test_each_page_names_the_version(site: Path) -> None:
    (newest, *_) = re.findall(r"^## (.*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert [page for page in site.rglob("*.html") if f"Skep {newest}" not in page.read_text()] == []


def test_the_site_of_a_release_has_its_date(tmp_path: Path) -> None:
    build_site(tmp_path, SKEP_RELEASE="0.1.0", SOURCE_DATE_EPOCH="1790000000")
    for name in ("index", "readme", "changelog", "guide/start"):
        text = (tmp_path / f"{name}.html").read_text()
        assert "Skep 0.1.0 (2026-09-21)" in text
        assert "not released yet" not in text
        assert "(unreleased)" not in text
    assert "0.1.0 (2026-09-21)</h2>" in re.sub("<a .*?</a>", "", (tmp_path / "changelog.html").read_text())


def test_a_release_is_named_where_a_text_calls_it_unreleased() -> None:
    text = "Status: 1.2.3, not released yet and not used\n## 1.2.4 (unreleased)\n## 1.2.3 (unreleased)\n"
    assert released(text, "1.2.3", "2026-01-02") == (
        "Status: 1.2.3 of 2026-01-02, not used\n## 1.2.4 (unreleased)\n## 1.2.3 (2026-01-02)\n"
    )


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert _LOADED.findall(page.read_text()) == [], page
    for style in site.rglob("*.css"):
        assert _STYLED.findall(style.read_text()) == [], style


def test_every_diagram_has_its_picture_and_each_picture_a_diagram() -> None:
    """If a diagram was changed, run ``python -m docs.site.diagrams``."""
    assert {path.stem for path in DRAWN.glob("*.svg")} == sources(PAGES).keys()


def test_every_diagram_is_shown_as_its_picture(site: Path) -> None:
    built = {page: page.read_text() for page in site.rglob("*.html")}
    left = ('class="mermaid', "language-mermaid", "data-name")
    assert [page for page, html in built.items() if any(word in html for word in left)] == []
    names = sources(PAGES)
    assert len(names) > 20
    assert [name for name in names if not any(f'<svg id="{name}"' in html for html in built.values())] == []


def test_a_diagram_without_a_picture_fails_the_build() -> None:
    with pytest.raises(ValueError, match=r"python -m docs\.site\.diagrams"):
        shown(placed("```mermaid\nflowchart LR\n    a --> b\n```\n"))


def test_the_first_page_has_the_readmes_reasons_and_the_index() -> None:
    readme = "# Skep\n\nIt is · [documentation](i.md)\n\n## Try it\n\nmake\n\n## Why Skep\n\n* So.\n\n## How\n\nThus.\n"
    text = landing(readme, "# Documentation\n\nAll pages.\n\n## Start\n\n| page |\n")
    assert re.findall(r"^#+ .*", text, re.MULTILINE) == ["# Skep", "## Why Skep", "## Start"]
    assert "* So." in text
    assert "(guide/start.md){ .md-button" in text
    assert [part for part in ("make", "Thus.", "All pages.", "documentation") if part in text] == []


def test_the_navigation_is_the_index() -> None:
    docs = ROOT / "docs"
    first, *sections = navigation((docs / "README.md").read_text(), docs)
    assert next(iter(first.values()))[0] == "README.md"
    assert [next(iter(section)) for section in sections] == re.findall(
        r"^## (.*)$", (docs / "README.md").read_text(), re.MULTILINE
    )


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("[the index](../README.md)", "[the index](../README.md)"),
        ("[rules](../../CONTRIBUTING.md#house-rules)", "[rules](../contributing.md#house-rules)"),
        ("[a wrapped\nlink](../../README.md)", "[a wrapped\nlink](../readme.md)"),
        ("[decisions](../decisions/)", "decisions"),
        ("[docs/cookbook/queue](../cookbook/queue/)", "[`queue.tar.gz`](../cookbook/queue.tar.gz)"),
        ("[a queue](../cookbook/queue.md)", "[a queue](../cookbook/queue.md)"),
        ("[the stack](../cookbook/queue/compose.yaml)", "[the stack](../cookbook/queue/compose.yaml)"),
        (
            "[alerts](../../packaging/prometheus/skep-alerts.yml)",
            "[alerts](../guide/monitoring/skep-alerts.yml)",
        ),
        ("[the store](../../skep/store/state.py)", "`skep/store/state.py`"),
        ("[`state.py`](../../skep/store/state.py)", "`state.py`"),
        ("[outside](https://docs.docker.com/engine)", "[outside](https://docs.docker.com/engine)"),
        ("[below](#below)", "[below](#below)"),
        ("`[no](link.md)`", "`[no](link.md)`"),
        ("```sh\n[ -f x ] && echo [a](b)\n```", "```sh\n[ -f x ] && echo [a](b)\n```"),
    ],
)
def test_links_lead_somewhere_on_the_site(text: str, seen: str) -> None:
    page = PurePosixPath("guide/status.md")
    assert linked(text, "docs" / page, page) == seen
