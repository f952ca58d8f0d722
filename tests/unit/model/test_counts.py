"""Numbers with their nouns."""

import re
from pathlib import Path

import pytest

from skep.model.values.counts import counted

SOURCES = Path(__file__).parents[3] / "skep"


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 CPUs"), (1, "1 CPU"), (1.0, "1 CPU"), (0.5, "0.5 CPUs"), (2, "2 CPUs")]
)
def test_one_is_singular_and_everything_else_plural(number: float, text: str) -> None:
    assert counted(number, "CPU") == text


def test_large_numbers_keep_their_digits_and_irregular_plurals_are_named() -> None:
    assert counted(12_345_678, "task") == "12345678 tasks"
    assert (counted(1, "entry", "entries"), counted(3, "entry", "entries")) == ("1 entry", "3 entries")


def test_no_other_code_chooses_the_form_of_a_counted_noun() -> None:
    """One helper does, so that no text says ``1 CPUs``."""
    own = re.compile(r"""\} [a-z]+\{['"]{1,2} if .* == 1 else|["']1 [a-z]+["'] if """)
    found = [str(path) for path in SOURCES.rglob("*.py") if own.search(path.read_text())]
    assert found == []
