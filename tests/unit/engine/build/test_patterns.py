"""Which names a pattern fits."""

import pytest

from skep.engine.build.patterns import Pattern, has_wildcards, ignored_patterns, is_ignored
from skep.errors import InvalidArgument


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("*.c", "a.c", True),
        ("*.c", "d/a.c", False),
        ("a?c", "abc", True),
        ("a?c", "a/c", False),
        ("[a-c]x", "bx", True),
        ("[^a-c]x", "bx", False),
        ("[^a-c]x", "dx", True),
        ("a\\*", "a*", True),
        ("a\\*", "ab", False),
        ("", "", True),
        ("*", "", True),
    ],
)
def test_a_pattern_of_copy_stops_at_slashes(pattern: str, path: str, fits: bool) -> None:
    assert Pattern(pattern).matches(path) is fits


@pytest.mark.parametrize("pattern", ["[", "[]", "[a", "[a-]", "a\\", "[-a]"])
def test_a_broken_pattern_is_an_error(pattern: str) -> None:
    with pytest.raises(InvalidArgument, match="syntax error in pattern"):
        Pattern(pattern)


def test_a_name_with_an_escaped_wildcard_is_no_pattern() -> None:
    assert not has_wildcards("a\\*b")
    assert has_wildcards("a*b")
    assert has_wildcards("a[0]")


def test_an_expensive_pattern_is_matched_soon() -> None:
    assert not Pattern("*a" * 100 + "b").matches("a" * 255)


@pytest.mark.parametrize(
    ("path", "is_out"),
    [
        ("a.log", True),
        ("d/a.log", False),
        ("node_modules/x/y", True),
        ("d/node_modules", True),
        ("keep.txt", False),
        ("out/x", True),
        ("out/keep", False),
        ("x.md", True),
        ("README.md", False),
    ],
)
def test_the_last_pattern_of_the_ignore_file_that_fits_decides(path: str, is_out: bool) -> None:
    patterns = ignored_patterns("# comment\n*.log\n\n/out/\n**/node_modules\n!out/keep\n*.md\n! README.md \n")
    assert is_ignored(path, patterns) is is_out
