"""MkDocs hooks that order the pages as in the index and link to files outside ``docs``.

MkDocs calls the functions by their names (https://www.mkdocs.org/dev-guide/plugins/#events).
"""

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_build_date

from docs.site.diagrams import placed, shown
from docs.site.recipes import archive_of, packed
from docs.site.released import released

ROOT: Final = Path(__file__).parents[2]
OUTSIDE: Final = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "bench/README.md": "benchmarks.md",
}
"""Pages of the site that lie beside ``docs`` in the repository, and what they are called there."""

FILES: Final = {
    "packaging/prometheus/prometheus.yml": "guide/monitoring/prometheus.yml",
    "packaging/prometheus/skep-alerts.yml": "guide/monitoring/skep-alerts.yml",
    "packaging/grafana/skep.json": "guide/monitoring/skep.json",
}
"""Files beside ``docs`` that pages lead to, and what they are called on the site."""

INDEX: Final = "README.md"
"""The index of the pages, which is the site's first page."""
BUTTONS: Final = (
    "[Get started](guide/start.md){ .md-button .md-button--primary } [Install](guide/install.md){ .md-button } "
    "[Coming from Docker Swarm](guide/migrate.md){ .md-button } [How fast](guide/performance.md){ .md-button }"
)
_PARTS = re.compile(
    r"(^```.*?^```$|`[^`\n]*`)|\[((?:[^\]\n]|\n(?!\n))+)\]\(([^)\s]+)\)", re.MULTILINE | re.DOTALL
)
"""Code, or a link. Its text may be wrapped."""
_ROW = re.compile(r"^\| \[[^\]]+\]\(([^)#]+)\)", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take the navigation from the index, and show the version at the end of each page."""
    docs = Path(config.docs_dir)
    config.nav = list(navigation((docs / "README.md").read_text(), docs))
    version = config.extra["release"]
    newest = re.search(r"^## (.*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None, "the changelog has no version"
    config.copyright = f"Skep {version} ({get_build_date()})" if version else f"Skep {newest[1]}"
    return config


def _read(source: str, config: MkDocsConfig) -> str:
    """Read a page beside ``docs``.  A release's site names the release in it."""
    text = (ROOT / source).read_text()
    version = config.extra["release"]
    return released(text, version, get_build_date()) if version else text


def navigation(index: str, docs: Path) -> Iterator[Any]:
    """A section for each heading of the index, with the pages of its table; folders with all of their pages."""
    yield {"Skep": [INDEX, {"README": OUTSIDE["README.md"]}]}
    for section in index.split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        pages = [page for target in _ROW.findall(text) for page in _pages(target, docs)]
        yield {title: pages}


def _pages(target: str, docs: Path) -> Iterator[Any]:
    path = docs / target
    if path.is_dir():
        if target.strip("/") != "design":  # its pages have a table of their own
            name = target.strip("/").capitalize()
            pages = sorted(path.glob("*.md"), key=lambda page: (page.name != "README.md", page.name))
            yield {name: [str(page.relative_to(docs)) for page in pages]}
    elif target.endswith(".md"):
        place = path.resolve()
        yield (
            str(place.relative_to(docs))
            if place.is_relative_to(docs)
            else OUTSIDE[str(place.relative_to(ROOT))]
        )


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages and files beside ``docs``, and an archive for each recipe of the cookbook."""
    recipes = defaultdict[PurePosixPath, list[tuple[PurePosixPath, Path]]](list)
    for file in files:
        path, source = PurePosixPath(file.src_uri), file.abs_src_path
        if source is None or not file.inclusion.is_included():  # exclude_docs names it
            continue
        for folder in path.parents:
            if archive := archive_of(folder):
                recipes[archive].append((path.relative_to(folder.parent), Path(source)))
    for archive, members in recipes.items():
        files.append(File.generated(config, str(archive), content=packed(members)))
    for outside, name in (OUTSIDE | FILES).items():
        files.append(File.generated(config, name, content=_read(outside, config)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with links that lead somewhere on the site, and places for its diagrams."""
    sources = {name: source for source, name in OUTSIDE.items()}
    uri = page.file.src_uri
    text = linked(markdown, PurePosixPath(sources.get(uri, f"docs/{uri}")), PurePosixPath(uri))
    if uri == INDEX:
        page.meta["hide"] = ["navigation", "toc"]
        readme = _read("README.md", config)
        text = landing(linked(readme, PurePosixPath("README.md"), PurePosixPath(uri)), text)
    return placed(text)


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with the pictures of its diagrams."""
    return shown(html)


def landing(readme: str, index: str) -> str:
    """The site's first page: what Skep is and why to use it, from the README, and the tables of the index."""
    intro, _, rest = readme.partition("\n## ")
    intro = re.sub(r" ·\s*\[documentation\]\([^)]*\)", "", intro)
    why = rest.partition("\n## Why Skep\n")[2].partition("\n## ")[0]
    tables = index.partition("\n## ")[2]
    return f"{intro}\n{BUTTONS}\n\n## Why Skep\n{why}\n## {tables}"


def linked(markdown: str, source: PurePosixPath, uri: PurePosixPath) -> str:
    """Return a page's Markdown with links of the site.

    A link to another page or its files leads there, and one to a recipe's folder to its archive. Links to anything else
    of the repository become its path.

    Args:
        source: The page in the repository.
        uri: The page on the site.
    """

    def link(found: re.Match[str]) -> str:
        code, text, target = found.groups()
        if code or "://" in target or target.startswith("#"):
            return found.group()
        path, _, heading = target.partition("#")
        place = PurePosixPath(posixpath.normpath(source.parent / path))
        if place.is_relative_to("docs"):
            page = place.relative_to("docs")
            if (ROOT / place).is_dir():
                archive = archive_of(page)
                if archive is None:
                    return text
                page, text = archive, f"`{archive.name}`"
        elif name := (OUTSIDE | FILES).get(str(place)):
            page = PurePosixPath(name)
        else:
            return text if text.startswith("`") else f"`{place}`"
        if text.endswith(".md"):
            text = _title(ROOT / place)
        up = "../" * (len(uri.parts) - 1)
        return f"[{text}]({up}{page}{'#' + heading if heading else ''})"

    return _PARTS.sub(link, markdown)


def _title(page: Path) -> str:
    heading = page.read_text().partition("\n")[0]
    return heading.removeprefix("# ")
