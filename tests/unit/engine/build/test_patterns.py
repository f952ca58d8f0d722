"""Which names a pattern fits."""

import pytest

from skep.engine.build.dockerfile.patterns import (
    PATTERNS_MAX,
    PathPatterns,
    Pattern,
    has_wildcards,
    ignored_patterns,
    is_ignored,
)
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


@pytest.mark.parametrize(
    ("line", "patterns"),
    [
        ("\ufeffa\nb", ["a", "b"]),
        ("# comment\n\n  \t\n", []),
        (" # no comment", ["# no comment"]),
        ("\t a b \r\n", ["a b"]),
        ("/a/", ["a"]),
        ("//a//b", ["a/b"]),
        ("./a/../b", ["b"]),
        ("../a", ["../a"]),
        ("!  /a", ["!a"]),
        ("!", ["!"]),
        ("/", ["/"]),
        ("//", ["/"]),
        (".", ["."]),
        ("\\#a", ["\\#a"]),
    ],
)
def test_lines_of_an_ignore_file_are_cleaned(line: str, patterns: list[str]) -> None:
    assert ignored_patterns(line) == patterns


def test_an_ignore_file_is_bounded() -> None:
    with pytest.raises(InvalidArgument, match="more than 10000 patterns"):
        ignored_patterns("x\n" * (PATTERNS_MAX + 1))


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("*.log", "a.log", True),
        ("*.log", "d/a.log", False),
        ("a", "a/b/c", True),
        ("**/*.log", "a.log", True),
        ("**/*.log", "d/e/a.log", True),
        ("a/**", "a", False),
        ("a/**", "a/b/c", True),
        ("**", "x/y", True),
        ("a/**/b", "a/b", True),
        ("a/**/b", "a/x/y/b/c", True),
        ("a/**/b", "a/x", False),
        ("**/foo", "xfoo", False),
        ("a**b", "axx/yyb", True),
        ("[^a]*", "abc", False),
        ("[^a]*", "bcd", True),
        ("*a*b*c", "xaybzc", True),
        ("*a*b*c", "xaybz", False),
        ("\\*x", "*x", True),
        ("\\*x", "ax", False),
        (".", "x", False),
        ("[z-a]", "m", False),
        ("**/a/**/b", "q/a/b", True),
    ],
)
def test_a_pattern_fits_paths_and_what_is_below_them(pattern: str, path: str, fits: bool) -> None:
    assert PathPatterns([pattern]).fits(path) is fits


@pytest.mark.parametrize("pattern", ["*a" * 100 + "b", "*[a-c]*" * 100 + "d", "**/a/" * 100 + "b"])
def test_an_expensive_pattern_of_paths_is_matched_soon(pattern: str) -> None:
    assert not PathPatterns([pattern]).fits("a" * 255 + "/a" * 100)


def test_only_directories_that_may_have_something_are_entered() -> None:
    patterns = PathPatterns(["one/two/th*"])
    assert patterns.may_fit_below("one")
    assert patterns.may_fit_below("one/two")
    assert not patterns.may_fit_below("two")
    assert PathPatterns(["**/x"]).may_fit_below("anything/at/all")


@pytest.mark.parametrize("patterns", [["!"], ["["], ["a", "!["]])
def test_broken_patterns_of_paths_are_errors(patterns: list[str]) -> None:
    with pytest.raises(InvalidArgument):
        PathPatterns(patterns)
