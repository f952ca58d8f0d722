"""Patterns of file names: those of COPY, and those of a .dockerignore file.

A pattern is matched by the set of its positions that a path leads to, so the time is path times pattern, whatever
is in it.

Source: Go, path/filepath/match.go; moby/patternmatcher (patternmatcher.go, ignorefile/ignorefile.go).
"""

import posixpath
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from skep.errors import InvalidArgument

PATTERNS_MAX = 10_000


class _Token(NamedTuple):
    """``kind``: character, any, star, deep (any number of directories), class."""

    kind: str
    text: str = ""
    ranges: tuple[tuple[str, str], ...] = ()
    is_negated: bool = False

    def takes(self, character: str) -> bool:
        match self.kind:
            case "character":
                return character == self.text
            case "deep":
                return True
            case "class":
                is_in = any(low <= character <= high for low, high in self.ranges)
                return character != "/" and is_in != self.is_negated
            case _:
                return character != "/"


class Pattern:
    """A pattern of whole paths.  ``*``, ``?`` and ``[a-z]`` stop at slashes; with ``deep``, ``**`` does not."""

    def __init__(self, text: str, *, deep: bool = False) -> None:
        """Raises: InvalidArgument: ``syntax error in pattern``."""
        self._tokens = tuple(_tokens(text, deep=deep))

    def matches(self, path: str) -> bool:
        """Whether it matches the whole of ``path``."""
        states = self._closed({0})
        for character in path:
            following = set()
            for state in states:
                if state < len(self._tokens) and self._tokens[state].takes(character):
                    following.add(state if self._tokens[state].kind in ("star", "deep") else state + 1)
            states = self._closed(following)
            if not states:
                return False
        return len(self._tokens) in states

    def _closed(self, states: set[int]) -> set[int]:
        found = set()
        for state in states:
            while state not in found:
                found.add(state)
                if state < len(self._tokens) and self._tokens[state].kind in ("star", "deep"):
                    state += 1
        return found


def has_wildcards(name: str) -> bool:
    """Whether a source of COPY is a pattern."""
    characters = iter(name)
    for character in characters:
        if character == "\\":
            next(characters, "")
        elif character in "*?[":
            return True
    return False


def _tokens(text: str, *, deep: bool) -> Iterable[_Token]:
    at = 0
    while at < len(text):
        character = text[at]
        at += 1
        if deep and text.startswith("**", at - 1):
            at += 1
            yield _Token("deep")
        elif character == "*":
            yield _Token("star")
        elif character == "?":
            yield _Token("any")
        elif character == "[":
            token, at = _class(text, at)
            yield token
        elif character == "\\":
            if at == len(text):
                raise InvalidArgument("syntax error in pattern")
            yield _Token("character", text[at])
            at += 1
        else:
            yield _Token("character", character)


def _class(text: str, at: int) -> tuple[_Token, int]:
    """The class that begins behind its bracket, and where it ends."""
    is_negated = text.startswith("^", at)
    at += is_negated
    ranges: list[tuple[str, str]] = []
    while not (text.startswith("]", at) and ranges):
        low, at = _bound(text, at)
        high = low
        if text.startswith("-", at):
            high, at = _bound(text, at + 1)
        ranges.append((low, high))
    return _Token("class", ranges=tuple(ranges), is_negated=is_negated), at + 1


def _bound(text: str, at: int) -> tuple[str, int]:
    if text.startswith("\\", at):
        at += 1
    elif text[at : at + 1] in ("-", "]"):
        raise InvalidArgument("syntax error in pattern")
    if at + 1 >= len(text):
        raise InvalidArgument("syntax error in pattern")
    return text[at], at + 1


def ignored_patterns(text: str) -> Sequence[str]:
    """The patterns of a .dockerignore file, cleaned: comments and empty lines are left out.

    Raises: InvalidArgument: there are too many.
    """
    patterns = []
    for line in text.removeprefix("\ufeff").split("\n"):
        if line.startswith("#"):
            continue
        pattern = line.strip()
        if not pattern:
            continue
        is_negated = pattern.startswith("!")
        pattern = pattern[is_negated:].strip()
        if pattern:
            pattern = posixpath.normpath(pattern)
            pattern = pattern.lstrip("/") if len(pattern) > 1 else pattern
        patterns.append("!" + pattern if is_negated else pattern)
        if len(patterns) > PATTERNS_MAX:
            raise InvalidArgument(f".dockerignore has more than {PATTERNS_MAX} patterns")
    return patterns


def is_ignored(path: str, patterns: Sequence[str]) -> bool:
    """Whether the last pattern that fits ``path``, or a directory above it, excludes it.  Raises: InvalidArgument."""
    parents = ["/".join(path.split("/")[:depth]) for depth in range(1, path.count("/") + 2)]
    result = False
    for pattern in patterns:
        is_negated = pattern.startswith("!")
        if result == is_negated:
            matcher = _ignoring(pattern[is_negated:])
            if any(one.matches(parent) for one in matcher for parent in parents):
                result = not is_negated
    return result


def _ignoring(pattern: str) -> Sequence[Pattern]:
    """``**/`` stands for no directory, too."""
    patterns = [pattern]
    if pattern.startswith("**/"):
        patterns.append(pattern.removeprefix("**/"))
    if "/**/" in pattern:
        patterns.append(pattern.replace("/**/", "/"))
    return [Pattern(one, deep=True) for one in patterns]
