"""The documents, taken apart: their links, their shell blocks, the paths that they name."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for page in (*ROOT.glob("*.md"), *ROOT.glob("bench/*.md"), *ROOT.glob("docs/**/*.md"))
    if "results" not in page.parts
)
_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_QUOTED = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def shell_blocks(page: str) -> list[str]:
    """What stands in the fenced ``sh`` blocks of a page, in order."""
    return _BLOCK.findall((ROOT / page).read_text())


def links(page: Path) -> list[str]:
    """Targets of a page's links to other files, without the fragment."""
    targets = _LINK.findall(_FENCED.sub("", page.read_text()))
    return [
        target.partition("#")[0] for target in targets if "://" not in target and not target.startswith("#")
    ]


def fragments(page: Path) -> list[tuple[Path, str]]:
    """Headings that a page's links lead to: the other page, and the heading as GitHub spells it in addresses."""
    found = []
    for target in _LINK.findall(_FENCED.sub("", page.read_text())):
        path, _, heading = target.partition("#")
        if heading and "://" not in target:
            found.append(((page.parent / path).resolve() if path else page, heading))
    return found


def headings(page: Path) -> set[str]:
    """The headings of a page, as GitHub spells them in addresses."""
    texts = _HEADING.findall(_FENCED.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


def quoted(page: Path) -> list[str]:
    """What a page puts in backquotes outside of its blocks."""
    return _QUOTED.findall(_FENCED.sub("", page.read_text()))


def make_targets() -> set[str]:
    """The targets of the Makefile."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
