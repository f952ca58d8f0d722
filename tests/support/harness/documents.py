"""Parses the documents: their links, their shell blocks, the paths that they name."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
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


def build_site(directory: Path, *options: str, within_s: float = 120, **environment: str) -> None:
    """Build the documents' site in ``directory``.

    With ``--quiet``, mkdocs would not count the warnings that ``strict`` makes errors.
    """
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", *options, "--site-dir", str(directory)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", **environment},
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def shell_blocks(page: str) -> list[str]:
    """Return the contents of a page's fenced ``sh`` blocks, in order."""
    return _BLOCK.findall((ROOT / page).read_text())


def links(page: Path) -> list[str]:
    """Return the targets of a page's links to other files, without the fragment."""
    targets = _LINK.findall(_FENCED.sub("", page.read_text()))
    return [
        target.partition("#")[0] for target in targets if "://" not in target and not target.startswith("#")
    ]


def fragments(page: Path) -> list[tuple[Path, str]]:
    """Return the headings that a page's links lead to: the other page, and the heading as in GitHub's addresses."""
    found = []
    for target in _LINK.findall(_FENCED.sub("", page.read_text())):
        path, _, heading = target.partition("#")
        if heading and "://" not in target:
            found.append(((page.parent / path).resolve() if path else page, heading))
    return found


def headings(page: Path) -> set[str]:
    """Return the headings of a page, as in GitHub's addresses."""
    texts = _HEADING.findall(_FENCED.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


def quoted(page: Path) -> list[str]:
    """Return the texts in backquotes outside of a page's code blocks."""
    return _QUOTED.findall(_FENCED.sub("", page.read_text()))


def make_targets() -> set[str]:
    """Return the targets of the Makefile."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
