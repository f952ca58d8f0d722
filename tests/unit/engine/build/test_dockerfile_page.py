"""The page on the Dockerfile reference and the cases of its test name each other."""

import re
from pathlib import Path

from tests.support.builds import dockerfile_oddities as oddities
from tests.support.builds import dockerfile_steps as steps
from tests.support.builds import dockerfile_table as table
from tests.support.builds.dockerfile_cases import Case

PAGE = Path(__file__).parents[4] / "docs" / "conformance" / "dockerfile.md"


def cases() -> list[str]:
    """All cases as the page names them."""
    found = []
    for module in (table, steps, oddities):
        for group, members in vars(module).items():
            if isinstance(members, tuple) and members and isinstance(members[0], Case):
                found += [f"{group}: {case.name}" for case in members]
    return found


def test_every_case_has_its_rule_and_every_rule_its_case() -> None:
    named = re.findall(r"\| ([A-Z]+: [^|]+?) \|$", PAGE.read_text(), re.MULTILINE)
    assert sorted(named) == sorted(cases())


def test_a_rule_without_a_case_says_why() -> None:
    for row in re.findall(r"^\| (.+) \| \|$", PAGE.read_text(), re.MULTILINE):
        rule, _, says = row.partition(" | ")
        assert says not in ("", "as BuildKit"), f"{rule}: neither a test nor a reason"
