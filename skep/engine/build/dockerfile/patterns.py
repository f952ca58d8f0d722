"""Patterns of file names, as in COPY and in .dockerignore files.

Matching keeps the set of pattern positions that the path can have reached.  So the time is at most proportional to the
product of both lengths, for any content.

Source: Go, path/filepath/match.go; moby/patternmatcher (patternmatcher.go, ignorefile/ignorefile.go).
"""

import posixpath
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from skep.errors import InvalidArgument

PATTERNS_MAX = 10_000
"""Each file is compared with each pattern, so that their product bounds the work."""
_KNOWN_MAX = 100_000
"""Number of names whose result a pattern caches, because the same names occur many times in a tree."""


class _Token(NamedTuple):
    """Part of a pattern.  ``kind``: character, any, star, deep (any number of directories), class."""

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
    """Pattern of whole paths.  ``*``, ``?``  and ``[a-z]`` do not match slashes.  With ``deep``, ``**`` matches
    them.
    """

    def __init__(self, text: str, *, deep: bool = False) -> None:
        """Raises: InvalidArgument: ``syntax error in pattern``."""
        self._tokens = tuple(_tokens(text, deep=deep))

    def matches(self, path: str) -> bool:
        """Return whether the pattern matches all of ``path``."""
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
    """Return whether a source of COPY is a pattern."""
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
    """Return the character class that starts after its bracket, and its end."""
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
    """Return the patterns of a .dockerignore file, cleaned and without comments and empty lines.

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
            pattern = pattern.lstrip("/") or "/"
        patterns.append("!" + pattern if is_negated else pattern)
        if len(patterns) > PATTERNS_MAX:
            raise InvalidArgument(f".dockerignore has more than {PATTERNS_MAX} patterns")
    return patterns


def is_ignored(path: str, patterns: Sequence[str]) -> bool:
    """Return whether the last pattern that matches ``path`` or a parent directory excludes it.

    Raises: InvalidArgument.
    """
    return PathPatterns(patterns).fits(path)


class PathPatterns:
    """Patterns of a .dockerignore file, of ``--exclude`` or of ``--parents``.  The last match decides.

    A pattern that matches a directory matches everything below it.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        """Raises: InvalidArgument: a pattern is malformed."""
        self._patterns: list[tuple[bool, _Segments | _Free]] = []
        for text in map(str.strip, patterns):
            is_exception = text.startswith("!")
            cleaned = text[is_exception:]
            if not cleaned:
                if is_exception:
                    raise InvalidArgument('illegal exclusion pattern: "!"')
                continue
            self._patterns.append((is_exception, _matcher(posixpath.normpath(cleaned))))
        self.has_exceptions = any(is_exception for is_exception, _ in self._patterns)
        """Whether a pattern starts with ``!``, so that an entry below a matching directory may not match."""

    def fits(self, path: str) -> bool:
        """Return whether the last pattern that matches ``path`` or a parent directory is not an exception."""
        parts = path.split("/")
        result = False
        for is_exception, pattern in self._patterns:
            if result == is_exception and pattern.fits(parts):
                result = not is_exception
        return result

    def may_fit_below(self, path: str) -> bool:
        """Return whether an entry below the directory ``path`` may match, True if that is unknown."""
        parts = path.split("/")
        return any(pattern.leads_on(parts) for is_exception, pattern in self._patterns if not is_exception)


def _matcher(pattern: str) -> "_Segments | _Free":
    segments = pattern.split("/")
    Pattern(pattern)  # checks the syntax of the whole pattern
    if any("**" in segment and segment != "**" for segment in segments):
        return _Free(pattern)
    try:
        return _Segments(segments)
    except InvalidArgument:  # a class or an escape extends over a slash
        return _Free(pattern)


class _Segments:
    """A pattern in which each ``**`` is a whole name.  It is matched name by name, and each name once."""

    def __init__(self, segments: Sequence[str]) -> None:
        self._deep = [segment == "**" for segment in segments]
        self._names = [
            None if segment == "**" else re.compile(_expression(segment), re.DOTALL) for segment in segments
        ]
        self._known: dict[tuple[int, str], bool] = {}

    def fits(self, parts: Sequence[str]) -> bool:
        """Return whether a path or one of its parent directories matches."""
        end = len(self._names)
        states = self._closed({0})
        for part in parts:
            states = self._next(states, part)
            if end in states:
                return True
            if not states:
                return False
        return False

    def leads_on(self, parts: Sequence[str]) -> bool:
        """Return whether a path below these names may match."""
        states = self._closed({0})
        for part in parts:
            states = self._next(states, part)
        return bool(states)

    def _next(self, states: set[int], part: str) -> set[int]:
        following = set()
        for state in states:
            if state == len(self._names):
                continue
            if self._deep[state]:
                following |= {state, state + 1} if state == len(self._names) - 1 else {state}
            elif self._name_fits(state, part):
                following.add(state + 1)
        return self._closed(following)

    def _name_fits(self, state: int, part: str) -> bool:
        key = (state, part)
        if key not in self._known:
            if len(self._known) > _KNOWN_MAX:
                self._known.clear()
            expression = self._names[state]
            assert expression is not None, "a ** matches every name"
            self._known[key] = expression.fullmatch(part) is not None
        return self._known[key]

    def _closed(self, states: set[int]) -> set[int]:
        """Add the states after a ``**`` that stands for no directory.  A final ``**`` stands for at least one name."""
        found = set()
        for state in states:
            while state not in found:
                found.add(state)
                if state < len(self._names) - 1 and self._deep[state]:
                    state += 1
        return found


class _Free:
    """Pattern with ``**`` next to other characters, which matches slashes like any other character."""

    def __init__(self, pattern: str) -> None:
        # "**/" may also stand for no directory.
        texts = [pattern]
        if pattern.startswith("**/"):
            texts.append(pattern.removeprefix("**/"))
        if "/**/" in pattern:
            texts.append(pattern.replace("/**/", "/"))
        self._patterns = [Pattern(one, deep=True) for one in texts]

    def fits(self, parts: Sequence[str]) -> bool:
        """Return whether a path or one of its parent directories matches."""
        paths = ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        return any(pattern.matches(path) for pattern in self._patterns for path in paths)

    def leads_on(self, parts: Sequence[str]) -> bool:
        """Return True, because it is unknown whether a path below these names may match."""
        return True


def _expression(segment: str) -> str:
    """Return a pattern without slashes as a regular expression, in which no star backtracks (``(?>...)``)."""
    pieces = [""]
    for token in _tokens(segment, deep=False):
        match token.kind:
            case "star":
                if pieces[-1] or len(pieces) == 1:
                    pieces.append("")
            case "any":
                pieces[-1] += "."
            case "class":
                ranges = "".join(
                    f"{re.escape(low)}-{re.escape(high)}" for low, high in token.ranges if low <= high
                )
                if not ranges:
                    pieces[-1] += "." if token.is_negated else "(?!)"
                else:
                    pieces[-1] += f"[{'^' * token.is_negated}{ranges}]"
            case _:
                pieces[-1] += re.escape(token.text)
    first, *rest = pieces
    if not rest:
        return first
    return first + "".join(f"(?>.*?{piece})" for piece in rest[:-1]) + f".*{rest[-1]}"
