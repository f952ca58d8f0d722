"""The Compose keys on the page about compatibility, as the tests find what becomes of each.

``python -m docs.reference.compose_keys`` writes them.  It needs docker-compose (``make setup``), which has the schema.
"""

import importlib
from pathlib import Path

PAGE = Path(__file__).with_name("compatibility.md")
_BEGIN, _END = "<!-- compose keys: written by python -m docs.reference.compose_keys -->", "<!-- end -->"


def rows_on_the_page() -> list[tuple[str, ...]]:
    """Return the page's rows of keys: the key, and what becomes of it."""
    lines = _parts()[1].splitlines()
    return [
        tuple(cell.strip() for cell in line.strip("| ").split(" | "))
        for line in lines
        if line.startswith("| `")
    ]


def _parts() -> tuple[str, str, str]:
    before, _, rest = PAGE.read_text().partition(_BEGIN)
    keys, _, after = rest.partition(_END)
    return before, keys, after


def write() -> None:
    """Write the rows."""
    before, _, after = _parts()
    rows = importlib.import_module("tests.component.test_compose_schema").outcomes()
    lines = ["", "", "| key | Skep |", "|---|---|", *(f"| {key} | {said} |" for key, said in rows), "", ""]
    PAGE.write_text(f"{before}{_BEGIN}{chr(10).join(lines)}{_END}{after}")


if __name__ == "__main__":
    write()
