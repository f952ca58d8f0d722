"""Draws the Mermaid diagrams of the pages as pictures, which the site shows without scripts.

::

    .venv/bin/python -m docs.site.diagrams          # after a change of a diagram; needs npm and Chromium

``pictures/`` has a picture for each diagram, named by its source, so the site needs no npm, Chromium or network.
"""

import argparse
import asyncio
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

DOCS: Final = Path(__file__).parents[1]
DRAWN: Final = Path(__file__).with_name("pictures")
MERMAID: Final = "mermaid@11.16.0"
LEAST: Final = 0.6
"""Smallest part of its own size at which a picture's labels can be read."""
_FENCE = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PLACE = re.compile(r'<div class="diagram" data-name="(\w+)"></div>')
# DejaVu Sans is wider than most fonts, so labels that fit their boxes with it also fit with others.
_SETTINGS: Final = """{
    startOnLoad: false, htmlLabels: false, theme: "base",
    flowchart: {htmlLabels: false, nodeSpacing: 24, rankSpacing: 32}, sequence: {actorMargin: 16, width: 120},
    fontFamily: "DejaVu Sans, Verdana, sans-serif",
    themeVariables: {
        fontSize: "14px", primaryColor: "#fbeecb", primaryBorderColor: "#b9770e", primaryTextColor: "#2a2115",
        lineColor: "#5a4930", secondaryColor: "#f3ead8", tertiaryColor: "#faf6ee", noteBkgColor: "#f3ead8",
        noteBorderColor: "#b9770e", edgeLabelBackground: "#faf6ee", actorBkg: "#fbeecb", actorBorder: "#b9770e",
    },
}"""


def name_of(source: str) -> str:
    """Return the name of a diagram's picture."""
    return "d" + hashlib.sha256(source.encode()).hexdigest()[:12]


def sources(pages: Iterable[Path]) -> dict[str, str]:
    """Return the sources of all diagrams by the names of their pictures."""
    return {name_of(source): source for page in pages for source in _FENCE.findall(page.read_text())}


def placed(markdown: str) -> str:
    """Return a page with a place for each diagram's picture.  Markdown cannot have pictures with empty lines."""
    return _FENCE.sub(lambda fence: f'<div class="diagram" data-name="{name_of(fence[1])}"></div>', markdown)


def shown(html: str) -> str:
    """Return a page's HTML with the pictures in their places.  Raises ValueError if one was not drawn."""

    def picture(place: re.Match[str]) -> str:
        path = DRAWN / f"{place[1]}.svg"
        if not path.exists():
            raise ValueError(f"a diagram has no picture {path.name}. Run python -m docs.site.diagrams")
        return f'<div class="diagram">{_legible(path.read_text())}</div>'

    return _PLACE.sub(picture, html)


def _legible(picture: str) -> str:
    """A wide picture with a least width, from which on it scrolls instead of becoming smaller."""
    return re.sub(
        r"max-width: ([\d.]+)px;",
        lambda found: f"{found[0]} min-width: {float(found[1]) * LEAST:.0f}px;",
        picture,
        count=1,
    )


async def _draw(missing: Mapping[str, str], program: Path) -> None:
    from tests.support.clients.browser import a_browser, a_page

    async with a_browser() as browser, a_page(browser) as page:
        await page.set_content("<body></body>")
        await page.add_script_tag(path=program)
        await page.evaluate(f"mermaid.initialize({_SETTINGS})")
        for name, source in missing.items():
            command = "async ([name, source]) => (await mermaid.render(name, source)).svg"
            (DRAWN / f"{name}.svg").write_text(await page.evaluate(command, [name, source]) + "\n")
            print(f"drawn: {name}")


def main() -> None:
    """Draw the diagrams that have no picture, and remove the pictures of those that no page has."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="draw every diagram")
    options = parser.parse_args()
    DRAWN.mkdir(exist_ok=True)
    wanted = sources(sorted(DOCS.rglob("*.md")))
    for path in DRAWN.glob("*.svg"):
        if options.all or path.stem not in wanted:
            path.unlink()
    missing = {name: source for name, source in wanted.items() if not (DRAWN / f"{name}.svg").exists()}
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["npm", "pack", MERMAID, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        (archive,) = Path(folder).glob("*.tgz")
        subprocess.run(["tar", "-xzf", archive, "package/dist/mermaid.min.js"], cwd=folder, check=True)
        asyncio.run(_draw(missing, Path(folder) / "package/dist/mermaid.min.js"))


if __name__ == "__main__":
    main()
