"""Environment files: ``.env``, and ``env_file`` of services.

A line has the form ``NAME=value`` or ``export NAME=value``.  Comments begin with ``#`` at the start of a line or after
a space.  Text in single quotes is literal.  In other values variables are replaced, including variables of earlier
lines.  A name without a value takes its value from the environment.

Source: compose-spec, 05-services.md (env_file); compose-go, dotenv/parser.go.
"""

import re
from collections.abc import Mapping
from typing import Final

from skep.stack.compose.interpolation import Substitution

_NAME: Final = re.compile(r"(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_.\-]*)[ \t]*(=|:(?=[ \t]|$)|$|(?=#))")
_ESCAPES: Final = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "$": "$$", "'": "'"}


def parse(text: str, variables: Mapping[str, str], *, is_raw: bool = False) -> dict[str, str]:
    """Return the variables in a file.

    Args:
        variables: the environment, which sets names without a value and takes precedence in substitutions.
        is_raw: whether to take each text after the equals sign literally (``format: raw``).

    Raises:
        ValueError: a line is invalid.  The error names its number.
    """
    made: dict[str, str] = {}
    lines = text.removeprefix("\ufeff").splitlines()
    number = 0
    while number < len(lines):
        line, first = lines[number].strip(), number + 1
        number += 1
        if not line or line.startswith("#"):
            continue
        match = _NAME.match(line)
        if match is None:
            raise ValueError(
                f"line {first}: expected NAME=VALUE"
            )  # The error does not show the line, which may contain a secret.
        name, rest = match[1], line[match.end() :].strip()
        if not match[2]:
            if name in variables:
                made[name] = variables[name]
            continue
        if is_raw:
            made[name] = rest
            continue
        while _is_open(rest) and number < len(lines):  # a quoted value may span several lines
            rest = f"{rest}\n{lines[number]}"
            number += 1
        try:
            made[name] = _value(rest, {**made, **variables})
        except ValueError as error:
            raise ValueError(f"line {first}: {error}") from None
    return made


def _is_open(text: str) -> bool:
    """Return whether ``text`` begins with a quote that it does not close."""
    return text[:1] in ("'", '"') and _closing(text) < 0


def _closing(text: str) -> int:
    """Return the index of the closing quote in ``text``, which begins with a quote, or -1."""
    at = 1
    while at < len(text):
        if text[at] == "\\" and text[0] == '"':
            at += 1
        elif text[at] == text[0]:
            return at
        at += 1
    return -1


def _value(text: str, variables: Mapping[str, str]) -> str:
    if text[:1] in ("'", '"'):
        end = _closing(text)
        if end < 0:
            raise ValueError("a quote is never closed")
        behind = text[end + 1 :].strip()
        if behind and not behind.startswith("#"):
            raise ValueError("unexpected text after the closing quote")
        inside = text[1:end]
        if text[0] == "'":
            return inside
        return Substitution(variables).text(
            re.sub(r"\\(.)", lambda match: _ESCAPES.get(match[1], match[0]), inside)
        )
    plain = re.split(r"(?:^|\s)#", text, maxsplit=1)[0].strip()
    return Substitution(variables).text(plain)
