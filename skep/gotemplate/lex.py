"""Tokens of a template.  An error is the last token, so that the parser reports its own earlier errors first.

Source: Go 1.24, text/template/parse/lex.go.
"""

import re
from collections.abc import Generator, Iterator
from typing import Literal, NamedTuple

from skep.gotemplate.values import quoted

Kind = Literal[
    "text", "left", "right", "space", "field", "dot", "variable", "identifier", "keyword", "number", "string", "raw",
    "char", "pipe", "declare", "assign", "(", ")", "other", "bool", "nil", "error", "eof",
]  # fmt: skip

KEYWORDS = frozenset(
    {"block", "break", "continue", "define", "else", "end", "if", "range", "template", "with"}
)


class Token(NamedTuple):
    """A token.  ``position`` is in characters, ``line`` counts from 1, an error's ``text`` is its message."""

    kind: Kind
    text: str
    position: int
    line: int

    def __str__(self) -> str:
        """Return the token's name in error messages."""
        match self.kind:
            case "eof":
                return "EOF"
            case "error":
                return self.text
            case "keyword" | "nil" | "dot":
                return f"<{self.text}>"
        return quoted(self.text[:10]) + "..." if len(self.text) > 10 else quoted(self.text)


_SPACES = " \t\r\n"
_LEFT = re.compile(r"\{\{(?:-[ \t\r\n])?")
_RIGHT = re.compile(r"(?:[ \t\r\n]-)?\}\}")
_SPACE = re.compile(r"(?:(?![ \t\r\n]-\}\})[ \t\r\n])+")
_WORD = re.compile(r"\w*")
_NUMBER = re.compile(
    r"[+-]?(?:0[xX][0-9a-fA-F_]*|0[oO][0-7_]*|0[bB][01_]*"
    r"|(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][+-]?[0-9_]*)?)|[+-]"
)
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\[^\n])*"')
_CHARACTER = re.compile(r"'(?:[^'\\\n]|\\[^\n])*'")
_RAW = re.compile(r"`[^`]*`")
_LITERALS: dict[str, tuple[re.Pattern[str], Kind, str]] = {
    '"': (_QUOTED, "string", "unterminated quoted string"),
    "'": (_CHARACTER, "char", "unterminated character constant"),
    "`": (_RAW, "raw", "unterminated raw quoted string"),
}


class _Error(Exception):
    """A text that is not a token.  The message is Go's."""


def lex(text: str, most: int) -> list[Token]:
    """Return all tokens, at most ``most``.  The last one is ``eof`` or ``error``."""
    tokens: list[Token] = []
    line, counted = 1, 0

    def add(kind: Kind, token: str, position: int) -> None:
        nonlocal line, counted
        line += text.count("\n", counted, position)
        counted = position
        tokens.append(Token(kind, token, position, line))

    position = 0
    try:
        for kind, token, position in _tokens(text):
            add(kind, token, position)
            if len(tokens) > most:
                raise _Error("it is too long")
    except _Error as error:
        add("error", str(error), position)
    else:
        add("eof", "", len(text))
    return tokens


def _tokens(text: str) -> Iterator[tuple[Kind, str, int]]:
    """Yield kind, text and position of each token.  Raises: _Error."""
    position = 0
    trims = False
    while True:
        left = _LEFT.search(text, position)
        plain = text[position : left.start() if left else len(text)]
        if trims:
            stripped = plain.lstrip(_SPACES)
            position += len(plain) - len(stripped)
            plain = stripped
        if left is not None and left[0] != "{{":
            plain = plain.rstrip(_SPACES)
        if plain:
            yield "text", plain, position
        if left is None:
            return
        start = left.end()
        comment = re.compile(r"[ \t\r\n]*/\*" if left[0] != "{{" else r"/\*").match(text, start)
        if comment is not None:
            end = text.find("*/", comment.end())
            if end < 0:
                raise _Error("unclosed comment")
            right = _RIGHT.match(text, end + 2)
            if right is None:
                raise _Error("comment ends before closing delimiter")
            position = right.end()
        else:
            yield "left", "{{", left.start()
            position = yield from _inside(text, start)
            right = _RIGHT.match(text, position)
            assert right is not None, "_inside ends at the closing delimiter"
            yield "right", "}}", position
            position = right.end()
        trims = "-" in right[0]


def _inside(text: str, position: int) -> Generator[tuple[Kind, str, int], None, int]:
    """Yield the tokens of an action, and return the position of its closing delimiter.  Raises: _Error."""
    depth = 0
    while True:
        if _RIGHT.match(text, position):
            if depth > 0:
                raise _Error("unclosed left paren")
            return position
        if position == len(text):
            raise _Error("unclosed action")
        kind, token = _token(text, position)
        if kind == "(":
            depth += 1
        elif kind == ")":
            depth -= 1
        yield kind, token, position
        position += len(token)


def _token(text: str, position: int) -> tuple[Kind, str]:
    char = text[position]
    if space := _SPACE.match(text, position):
        return "space", space[0]
    if char in _LITERALS:
        pattern, kind, problem = _LITERALS[char]
        found = pattern.match(text, position)
        if found is None:
            raise _Error(problem)
        return kind, found[0]
    if number := _NUMBER.match(text, position):
        after = text[number.end() : number.end() + 1]
        if after.isalnum() or after == "_":
            raise _Error(f"bad number syntax: {quoted(number[0] + after)}")
        return "number", number[0]
    if char == ".":
        word = _word(text, position + 1)
        return ("field", f".{word}") if word else ("dot", ".")
    if char == "$":
        return "variable", f"${_word(text, position + 1)}"
    if char.isalpha() or char == "_":
        return _named(_word(text, position))
    if text.startswith(":=", position):
        return "declare", ":="
    if char == ":":
        raise _Error("expected :=")
    single: dict[str, Kind] = {"=": "assign", "|": "pipe", "(": "(", ")": ")"}
    if char in single:
        return single[char], char
    if " " < char < "\x7f":
        return "other", char
    raise _Error(f"unrecognized character in action: {_code_point(char)}")


def _named(word: str) -> tuple[Kind, str]:
    if word in KEYWORDS:
        return "keyword", word
    if word in ("true", "false"):
        return "bool", word
    return ("nil" if word == "nil" else "identifier"), word


def _word(text: str, position: int) -> str:
    """Return a word of letters, digits and underscores.  Raises: _Error: the next character does not end a word."""
    found = _WORD.match(text, position)
    assert found is not None, "it matches the empty text"
    end = found.end()
    if end < len(text) and text[end] not in " \t\r\n.,|:=)(" and not _RIGHT.match(text, end):
        raise _Error(f"bad character {_code_point(text[end])}")
    return found[0]


def _code_point(char: str) -> str:
    """Format a character like ``%#U``."""
    return f"U+{ord(char):04X}" + (f" '{char}'" if char.isprintable() else "")
