"""Changelog fragments (``changes/``) are well-formed, and the release tool puts each under its section."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.harness.documents import ROOT

FOLDER = ROOT / "changes"
APART = {"README.md", "template.md.jinja"}
CHARACTERS_MAX = 160


def sections(root: Path = ROOT) -> dict[str, str]:
    """Return the headings of the sections by the last part of a fragment's name."""
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["towncrier"]
    return {kind["directory"]: kind["name"] for kind in settings["type"]}


def why_malformed(fragment: Path) -> str | None:
    """Return the rule of ``changes/README.md`` that a fragment breaks."""
    text = fragment.read_text()
    if not re.fullmatch(rf"[a-z0-9-]+\.({'|'.join(sections())})\.md", fragment.name):
        return "its name is not CHANGE.SECTION.md"
    if text.count("\n") != 1 or not text.endswith(".\n"):
        return "its text is not one line that ends with a period"
    if len(text) > CHARACTERS_MAX + 1:
        return f"its line is longer than {CHARACTERS_MAX} characters"
    if not re.match(r"[A-Z`]", text):
        return "its sentence does not begin with a capital or a name in backquotes"
    return None


def test_every_fragment_is_one_sentence_of_a_section() -> None:
    fragments = [path for path in FOLDER.iterdir() if path.name not in APART]
    assert {path.name: why for path in fragments if (why := why_malformed(path))} == {}


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("drain.added.md", "`skep node drain` waits.\n", None),
        ("drain.improved.md", "`skep node drain` waits.\n", "its name"),
        ("Drain.added.md", "`skep node drain` waits.\n", "its name"),
        ("drain.added.md", "`skep node drain` waits\n", "its text"),
        ("drain.added.md", "`skep node drain`\nwaits.\n", "its text"),
        ("drain.added.md", "It waits.", "its text"),
        ("drain.added.md", f"It {'wa' * 80}its.\n", "its line"),
        ("drain.added.md", "- It waits.\n", "its sentence"),
    ],
)
def test_the_rules_for_fragments(tmp_path: Path, name: str, text: str, rule: str | None) -> None:
    fragment = tmp_path / name
    fragment.write_text(text)
    found = why_malformed(fragment)
    assert found is None if rule is None else found is not None and found.startswith(rule)


def test_a_release_has_each_fragment_as_an_entry_of_its_section(tmp_path: Path) -> None:
    """Builds the section above the newest one, and removes the fragments."""
    (tmp_path / "changes").mkdir()
    for name in ("pyproject.toml", "CHANGELOG.md", "changes/template.md.jinja"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    texts = {kind: f"Something was {kind}." for kind in sections()}
    for kind, text in texts.items():
        (tmp_path / "changes" / f"some-change.{kind}.md").write_text(f"{text}\n")
    build = (
        sys.executable,
        "-m",
        "towncrier",
        "build",
        "--yes",
        "--version",
        "9.8.7",
        "--date",
        "2030-01-02",
    )
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    before = (ROOT / "CHANGELOG.md").read_text()
    after = (tmp_path / "CHANGELOG.md").read_text()
    opening, rest = before.split("\n## ", 1)
    entries = "\n".join(f"### {name}\n\n- {texts[kind]}\n" for kind, name in sections().items())
    assert after.split() == f"{opening}\n## 9.8.7 (2030-01-02)\n\n{entries}\n## {rest}".split()
    assert [path.name for path in (tmp_path / "changes").iterdir()] == ["template.md.jinja"]
