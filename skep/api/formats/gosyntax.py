"""Error messages of Go's JSON scanner for invalid JSON, and Go's parsing of booleans and sizes.

msgspec decodes bodies, and the scanner only runs after a body was refused.  It walks the text token by token with the
states of Go's scanner and returns the sentence of the first error.

Source: Go 1.19, src/encoding/json/scanner.go and stream.go.
"""

import math
import re

from skep.errors import InvalidArgument

_MAX_DEPTH = 10_000
"""The limit of Go's ``encoding/json``."""

_SPACE = re.compile(rb"[ \t\r\n]*")
_STRING = re.compile(rb'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9A-Fa-f]{4})*')
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_LITERALS = {ord("t"): b"true", ord("f"): b"false", ord("n"): b"null"}
_DIGITS = b"0123456789"
_HEX = b"0123456789abcdefABCDEF"

UNEXPECTED_END = "unexpected EOF"

BOOLEANS = {
    **dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True),
    **dict.fromkeys(("0", "f", "F", "FALSE", "false", "False"), False),
}
"""The values that ``strconv.ParseBool`` accepts."""


def first_error(text: bytes) -> str | None:
    """Return the sentence of Go's decoder for the first value in ``text``, or None if that value is well-formed.

    Like ``json.Decoder``, it ignores everything after the first value.
    """
    problem, _ = _scan(text)
    return problem


def end_of_first_value(text: bytes) -> int:
    """Return the end of the first value in ``text``, which is well-formed (see ``first_error``)."""
    return _scan(text)[1]


def _scan(text: bytes) -> tuple[str | None, int]:
    """Return the first error, and the position after the first value."""
    open_brackets = bytearray()
    position = 0
    wanted = "value"
    while True:
        position = _end_of_space(text, position)
        if position == len(text):
            return UNEXPECTED_END, position
        char = text[position]
        match wanted:
            case "value" | "value or ]":
                if wanted == "value or ]" and char == ord("]"):
                    open_brackets.pop()
                    position += 1
                    wanted = "more"
                elif char in b"{[":
                    open_brackets.append(char)
                    if len(open_brackets) > _MAX_DEPTH:
                        return _invalid(char, "exceeded max depth"), position
                    position += 1
                    wanted = "key or }" if char == ord("{") else "value or ]"
                    continue
                else:
                    problem, position = _scan_scalar(text, position, "looking for beginning of value")
                    if problem is not None:
                        return problem, position
                    wanted = "more"
            case "key" | "key or }":
                if wanted == "key or }" and char == ord("}"):
                    open_brackets.pop()
                    position += 1
                    wanted = "more"
                elif char != ord('"'):
                    return _invalid(char, "looking for beginning of object key string"), position
                else:
                    problem, position = _scan_string(text, position)
                    if problem is not None:
                        return problem, position
                    wanted = "colon"
                    continue
            case "colon":
                if char != ord(":"):
                    return _invalid(char, "after object key"), position
                position += 1
                wanted = "value"
                continue
            case _:
                in_object = open_brackets[-1] == ord("{")
                position += 1
                if char == ord(","):
                    wanted = "key" if in_object else "value"
                    continue
                if char != ord("}" if in_object else "]"):
                    context = "after object key:value pair" if in_object else "after array element"
                    return _invalid(char, context), position
                open_brackets.pop()
        if not open_brackets:
            return None, position


def _end_of_space(text: bytes, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _scan_scalar(text: bytes, position: int, context: str) -> tuple[str | None, int]:
    """Scan a string, number or literal that should start at ``position``."""
    char = text[position]
    if char == ord('"'):
        return _scan_string(text, position)
    if char in _LITERALS:
        return _scan_literal(text, position, _LITERALS[char])
    if char == ord("-") or char in _DIGITS:
        return _scan_number(text, position)
    return _invalid(char, context), position


def _scan_literal(text: bytes, position: int, literal: bytes) -> tuple[str | None, int]:
    for index, expected in enumerate(literal):
        at = position + index
        if at == len(text):
            return UNEXPECTED_END, at
        if text[at] != expected:
            context = f"in literal {literal.decode()} (expecting {_quoted(expected)})"
            return _invalid(text[at], context), at
    return None, position + len(literal)


def _scan_string(text: bytes, position: int) -> tuple[str | None, int]:
    match = _STRING.match(text, position)
    assert match is not None
    end = match.end()
    if end == len(text):
        return UNEXPECTED_END, end
    char = text[end]
    if char == ord('"'):
        return None, end + 1
    if char != ord("\\"):
        return _invalid(char, "in string literal"), end
    if end + 1 == len(text):
        return UNEXPECTED_END, end + 1
    if text[end + 1] != ord("u"):
        return _invalid(text[end + 1], "in string escape code"), end + 1
    for at in range(end + 2, end + 6):
        if at == len(text):
            return UNEXPECTED_END, at
        if text[at] not in _HEX:
            return _invalid(text[at], "in \\u hexadecimal character escape"), at
    raise AssertionError("the pattern takes every well-formed escape")


def _scan_number(text: bytes, position: int) -> tuple[str | None, int]:
    match = _NUMBER.match(text, position)
    if match is None:  # a minus sign alone
        return _after_number(text, position + 1, "in numeric literal")
    end = match.end()
    following = text[end : end + 1]
    integral = not set(match.group()) & set(b".eE")
    if following == b"." and integral:
        return _after_number(text, end + 1, "after decimal point in numeric literal")
    if following in (b"e", b"E") and not set(match.group()) & set(b"eE"):
        sign = 1 if text[end + 1 : end + 2] in (b"+", b"-") else 0
        return _after_number(text, end + 1 + sign, "in exponent of numeric literal")
    return None, end


def _after_number(text: bytes, position: int, context: str) -> tuple[str, int]:
    if position >= len(text):
        return UNEXPECTED_END, len(text)
    return _invalid(text[position], context), position


def _invalid(char: int, context: str) -> str:
    return f"invalid character {_quoted(char)} {context}"


_ESCAPES = {
    0x07: "\\a",
    0x08: "\\b",
    0x0C: "\\f",
    0x0A: "\\n",
    0x0D: "\\r",
    0x09: "\\t",
    0x0B: "\\v",
    0x27: "\\'",
    0x5C: "\\\\",
}


def _quoted(char: int) -> str:
    """Quote one byte like Go does in an error: ``'b'``, ``'\\n'``, ``'\\x00'``, ``'ÿ'``."""
    if char in _ESCAPES:
        return f"'{_ESCAPES[char]}'"
    if char < 0x20 or char == 0x7F:
        return f"'\\x{char:02x}'"
    text = chr(char)  # Go takes the byte for a code point
    return f"'{text}'" if text.isprintable() else f"'\\u{char:04x}'"


_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kKmMgGtT])?[iI]?[bB]?", re.ASCII)
_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str) -> int:
    """Return the bytes of ``10m``, ``1.5GiB`` or ``4096``, less than 2**63.  Raises: InvalidArgument.

    Source: docker/go-units, size.go (RAMInBytes).
    """
    match = _SIZE.fullmatch(text.strip())
    size = float(match[1]) * _FACTORS[(match[2] or "").lower()] if match is not None else math.inf
    if size >= 2**63:
        raise InvalidArgument(f"invalid size: '{text}'")
    return int(size)


def parse_port(text: str) -> int | None:
    """Return a port's number, 0 to 65535, or None for an invalid one."""
    is_number = text.isascii() and text.isdigit() and len(text) < 6
    return int(text) if is_number and int(text) < 65536 else None
