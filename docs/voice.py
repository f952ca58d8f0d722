"""Rates of wordings that readers stumble over, in code and in pages.  A rate may fall and never rises.

``make check`` compares the rates with those in ``voice.json``, and the subjects of new commits with the rules in
``CONTRIBUTING.md``.  ``python -m docs.voice --list RULE`` shows every place of a rule, ``--keep`` records lower rates.
The rules find places to look at.  They do not define good English.
"""

import argparse
import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from math import ceil
from pathlib import Path
from typing import NamedTuple

from tests.support.harness.sources import parsed

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "docs" / "voice.json"
SUBJECT_MAX = 72
"""Characters of a commit's subject that ``git log`` shows on one line of a terminal."""

CODE = ("skep", "sim", "bench", "tests/support")
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/concepts",
    "docs/compare",
    "docs/guide",
    "docs/tutorials",
    "docs/cookbook",
    "docs/reference",
    "docs/design",
)

_OPENER = (
    r"^(Of|By|That|Those|Where|What|Who|Why|How|Which|One that|As|With|From|Until|While)\b"
    r"(?! (this|the same|order|addition|case|above|follows|well))"
)
CODE_RULES: Mapping[str, re.Pattern[str]] = {
    "fragment": re.compile(_OPENER),
    "none-colon": re.compile(r"(?:[;,.] |^)(?:None|empty|False|True|0|-1): "),
    "gives": re.compile(r"\bgives?\b"),
    "what-is": re.compile(r"\bwhat (?:is|was|it|has|they|this|to)\b", re.IGNORECASE),
    "goes": re.compile(r"\b(?:goes|go on|goes on|gone|went)\b"),
    "is-no": re.compile(r"\b(?:is|are|was) (?:no|none)\b"),
    "one-that": re.compile(r"\b(?:one that|those that|that of|those of)\b"),
    "any-more": re.compile(r"\b(?:any more|no more|anew)\b"),
    "beside": re.compile(r"\b(?:beside|besides)\b"),
    "is-to": re.compile(r"\b(?:is|are|was|were) to (?:be|have|go|run|stop|come|give|stay)\b"),
}
PAGE_RULES: Mapping[str, re.Pattern[str]] = {
    "semicolon": re.compile(r";"),
    "what-opener": re.compile(r"(?:^|[.:!?] )(?:What|Who|Whatever)\b"),
    "odd": re.compile(
        r"\b(?:beside|that of|those of|of its own|is no|are no|is none|any more|goes on|go on|nothing of|as wanted"
        r"|way back|mend|mended|anew)\b|, too\b"
    ),
}
PARTICIPLE = "participle"
"""Coroutines that are named by a participle.  Counted, not a rate."""
# Without "read", which is also the verb.
_IRREGULAR = frozenset(
    {
        *(
            "begun",
            "brought",
            "built",
            "chosen",
            "done",
            "found",
            "given",
            "gone",
            "got",
            "heard",
            "held",
            "kept",
        ),
        *(
            "left",
            "lost",
            "made",
            "owed",
            "said",
            "seen",
            "sent",
            "shown",
            "taken",
            "told",
            "written",
        ),
    }
)
_NO_PARTICIPLES = frozenset({"need", "feed", "seed", "speed", "embed", "shed"})
_SUBJECT = re.compile(r"[a-z0-9][\w./-]*(?:, [\w./-]+)*: [a-z]")


class Place(NamedTuple):
    """A text in a file."""

    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.text[:120]}"


class Measured(NamedTuple):
    """The texts of one folder."""

    places: list[Place]
    rules: Mapping[str, re.Pattern[str]]

    def rates(self) -> dict[str, float]:
        """Places in 1,000 words of each rule, rounded up to two digits."""
        words = sum(len(place.text.split()) for place in self.places) or 1
        return {
            name: ceil(100_000 * sum(len(rule.findall(place.text)) for place in self.places) / words) / 100
            for name, rule in self.rules.items()
        }

    def matching(self, rule: str) -> list[Place]:
        """The places of a rule."""
        return [place for place in self.places if self.rules[rule].search(place.text)]


def measured() -> dict[str, Measured]:
    """Read the docstrings and comments of all code folders, and the prose of all pages."""
    code = {
        name: Measured([place for path in _python_files(ROOT / name) for place in _texts(path)], CODE_RULES)
        for name in CODE
    }
    pages = {
        name: Measured([place for path in _pages(ROOT / name) for place in _prose(path)], PAGE_RULES)
        for name in PAGES
    }
    return code | pages


def participles() -> list[Place]:
    """Return the coroutines of all code folders that are named by a participle."""
    return [
        Place(path, node.lineno, node.name)
        for folder in CODE
        for path in _python_files(ROOT / folder)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.AsyncFunctionDef) and _is_participle(node.name.lstrip("_"))
    ]


def _is_participle(name: str) -> bool:
    if "_" in name or name in _NO_PARTICIPLES:
        return False
    return name in _IRREGULAR or re.fullmatch(r"\w{2,}ed", name) is not None


def _python_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.py")) if "_pb2" not in path.name]


def _pages(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.md"))


def _texts(path: Path) -> Iterator[Place]:
    """The docstrings and comments of a file."""
    source = path.read_text()
    for node in ast.walk(parsed(path)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield Place(path, statement.lineno, " ".join(text.split()))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Place(path, token.start[0], token.string.lstrip("# "))


def _prose(path: Path) -> Iterator[Place]:
    """The lines of a Markdown page outside of code blocks, without code and addresses."""
    is_code = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not is_code:
            yield Place(path, number, re.sub(r"`[^`]*`|\]\([^)]*\)|<[^>]*>", " ", line))


def subject_faults(subjects: Iterable[str]) -> list[str]:
    """Return what is wrong with the subjects of commits."""
    faults = []
    for subject in subjects:
        if len(subject) > SUBJECT_MAX:
            faults.append(f"the subject has {len(subject)} characters, at most {SUBJECT_MAX}: {subject}")
        if not _SUBJECT.match(subject):
            faults.append(f"the subject does not begin with `area: verb`: {subject}")
    return faults


def _new_subjects() -> list[str]:
    """The subjects of commits that are not on main."""
    return _git_from_main("log", "--no-merges", "--format=%s", "{main}..HEAD")


def _changed() -> set[Path]:
    """Files that differ from main, for the list of places."""
    return {ROOT / name for name in _git_from_main("diff", "--name-only", "{main}")}


def _git_from_main(*words: str) -> list[str]:
    """Return the lines of a git command; ``{main}`` is main's name.  Empty where no main is known, as in an archive."""
    for main in ("origin/main", "main"):
        command = ["git", "-C", str(ROOT), *(word.format(main=main) for word in words)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if not found.returncode:
            return found.stdout.splitlines()
    return []


def risen(
    rates: Mapping[str, Mapping[str, float]], kept: Mapping[str, Mapping[str, float]]
) -> list[tuple[str, str]]:
    """Return each folder and rule whose rate is higher than the kept one."""
    return [
        (folder, rule)
        for folder, found in rates.items()
        for rule, rate in found.items()
        if rate > kept.get(folder, {}).get(rule, 0.0)
    ]


def main() -> int:
    """Exit code 1 if a rate has risen or the subject of a commit is wrong."""
    parser = argparse.ArgumentParser(prog="python -m docs.voice", description="Check the wording.")
    parser.add_argument("--list", metavar="RULE", help=f"show the places of a rule: {', '.join(_rules())}")
    parser.add_argument("--keep", action="store_true", help="record the present rates where they are lower")
    options = parser.parse_args()
    texts, names = measured(), participles()
    if options.list:
        found = names if options.list == PARTICIPLE else []
        found += [
            place
            for one in texts.values()
            if options.list in one.rules
            for place in one.matching(options.list)
        ]
        _print(map(str, found))
        return 0
    rates: dict[str, dict[str, float]] = {folder: one.rates() for folder, one in texts.items()}
    rates["coroutines"] = {PARTICIPLE: len(names)}
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else rates
    if options.keep:
        lower = {
            folder: {rule: min(rate, kept.get(folder, {}).get(rule, rate)) for rule, rate in found.items()}
            for folder, found in rates.items()
        }
        KEPT.write_text(json.dumps(lower, indent=1) + "\n")
        return 0
    faults = subject_faults(_new_subjects())
    changed = _changed()
    for folder, rule in risen(rates, kept):
        faults.append(
            f"{folder}: {rule} has risen from {kept.get(folder, {}).get(rule, 0)} to {rates[folder][rule]}"
        )
        found = names if rule == PARTICIPLE else texts[folder].matching(rule)
        faults += [f"  {place}" for place in found if place.path in changed]
    _print(faults)
    return 1 if faults else 0


def _rules() -> list[str]:
    return [*CODE_RULES, *PAGE_RULES, PARTICIPLE]


def _print(lines: Iterable[str]) -> None:
    sys.stdout.writelines(f"{line}\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
