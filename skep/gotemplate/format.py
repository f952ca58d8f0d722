"""``fmt.Sprintf`` for values of templates.

Source: Go 1.24, fmt/{doc,print,format}.go.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from skep.gotemplate.text import BoundedText, TemplateBudget
from skep.gotemplate.values import (
    Value,
    printed,
    printed_float,
    quoted,
    to_bytes,
    type_name,
    write_quoted,
    write_value,
)

WIDTH_MAX = 1_000
"""Maximum width and number of digits, to limit memory.  Go's limit is 1,000,000, which nothing needs."""

_VERB = re.compile(r"%(?P<flags>[-+# 0]*)(?P<width>\*|\d+)?(?:\.(?P<digits>\*|\d*))?(?P<verb>.)?", re.DOTALL)


class _Format(NamedTuple):
    flags: str
    width: int | None
    digits: int | None
    verb: str


class _Arguments:
    def __init__(self, values: Sequence[Value]) -> None:
        self._values = values
        self._next = 0

    def any_left(self) -> bool:
        return self._next < len(self._values)

    def take(self) -> Value:
        self._next += 1
        return self._values[self._next - 1]

    def rest(self) -> Sequence[Value]:
        return self._values[self._next :]


def sprintf(out: BoundedText, format: str, values: Sequence[Value]) -> None:
    """Write ``values`` according to ``format``.  Mismatches are shown like in Go (``%!d(string=x)``)."""
    arguments = _Arguments(values)
    position = 0
    for match in _VERB.finditer(format):
        out.write(format[position : match.start()])
        out.write(_one(match, arguments, out.budget))
        position = match.end()
    out.write(format[position:])
    if rest := arguments.rest():
        out.write("%!(EXTRA ")
        for number, one in enumerate(rest):
            out.write(", " if number else "")
            out.write("" if one is None else f"{type_name(one)}=")
            write_value(out, one)
        out.write(")")


def _one(match: "re.Match[str]", arguments: _Arguments, budget: TemplateBudget) -> str:
    verb = match["verb"]
    if verb is None:
        return "%!(NOVERB)"
    problems = ""
    flags = match["flags"]
    width, problem = _number(match["width"], arguments, "WIDTH")
    problems += problem
    if width is not None and width < 0:
        flags, width = flags + "-", -width
    digits, problem = _number(match["digits"], arguments, "PREC")
    problems += problem
    if match["digits"] == "" or (digits is not None and digits < 0):
        digits = 0 if match["digits"] == "" else None
    if verb == "%":
        return problems + "%"
    if not arguments.any_left():
        return f"{problems}%!{verb}(MISSING)"
    return problems + _formatted(_Format(flags, width, digits, verb), arguments.take(), budget)


def _number(text: str | None, arguments: _Arguments, word: str) -> tuple[int | None, str]:
    """Return a width or precision, and its error text."""
    if not text:
        return None, ""
    if text != "*":
        number: Value = int(text) if len(text) < 10 else WIDTH_MAX + 1
    elif arguments.any_left():
        number = arguments.take()
    else:
        number = None
    if isinstance(number, bool) or not isinstance(number, int) or abs(number) > WIDTH_MAX:
        return None, f"%!(BAD{word})"
    return number, ""


def _formatted(format: _Format, value: Value, budget: TemplateBudget) -> str:
    """Format one value with one verb."""
    match format.verb:
        case "T":
            return _padded(format, type_name(value))
        case "v":
            return _shown(format, value, budget)
    text: str | None = None
    match value:
        case bool():
            text = printed(value, budget) if format.verb == "t" else None
        case int():
            text = _integer(format, value)
        case float():
            text = _float(format, value)
        case str():
            text = _string(format, value, budget)
    if text is not None:
        return text
    if value is None:
        return f"%!{format.verb}(<nil>)"
    return f"%!{format.verb}({type_name(value)}={printed(value, budget)})"


def _shown(format: _Format, value: Value, budget: TemplateBudget) -> str:
    if isinstance(value, str) and "#" in format.flags:
        return _padded(format, _quoted(value, budget))
    if isinstance(value, str):
        return _string(format._replace(verb="s"), value, budget) or ""
    if isinstance(value, float):
        return _signed(format, printed_float(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return _integer(format._replace(verb="d"), value) or ""
    return _padded(format, printed(value, budget))


def _quoted(text: str, budget: TemplateBudget) -> str:
    out = BoundedText(budget)
    write_quoted(out, text)
    return str(out)


def _string(format: _Format, value: str, budget: TemplateBudget) -> str | None:
    if format.digits is not None and format.verb in "sq":
        value = value[: format.digits]
    match format.verb:
        case "s":
            return _padded(format, value)
        case "q":
            is_raw = "#" in format.flags and "`" not in value and value.isprintable()
            return _padded(format, f"`{value}`" if is_raw else _quoted(value, budget))
        case "x" | "X":
            data = to_bytes(value)[: format.digits]
            space = " " if " " in format.flags else ""
            text = data.hex(" ") if space else data.hex()
            text = f"0x{text}" if "#" in format.flags and text else text
            return _padded(format, text.upper() if format.verb == "X" else text)
    return None


def _integer(format: _Format, value: int) -> str | None:
    match format.verb:
        case "d":
            text = str(abs(value))
        case "b":
            text = f"{abs(value):b}"
        case "o" | "O":
            prefix = "0o" if format.verb == "O" else "0" if "#" in format.flags else ""
            text = f"{prefix}{abs(value):o}"
        case "x" | "X":
            text = f"{'0x' if '#' in format.flags else ''}{abs(value):x}"
            text = text.upper() if format.verb == "X" else text
        case "c" | "q" | "U":
            return _padded(format._replace(flags=format.flags.replace("0", "")), _code_point(format, value))
        case _:
            return None
    if format.digits is not None:
        text = text.rjust(format.digits, "0") if format.digits or value else ""
        format = format._replace(flags=format.flags.replace("0", ""))
    return _signed(format, ("-" if value < 0 else "") + text)


def _code_point(format: _Format, value: int) -> str:
    is_one = 0 <= value < 0x110000 and not 0xD800 <= value < 0xE000
    char = chr(value) if is_one else "\ufffd"
    match format.verb:
        case "c":
            return char
        case "q":
            inner = quoted(char)[1:-1].replace(r"\"", '"')
            return "'" + (r"\'" if char == "'" else inner) + "'"
    return f"U+{value:04X}" + (f" '{char}'" if "#" in format.flags and char.isprintable() else "")


def _float(format: _Format, value: float) -> str | None:
    if format.verb not in "eEfFgG":
        return None
    if not math.isfinite(value):
        return _signed(format._replace(flags=format.flags.replace("0", "")), printed_float(value))
    if format.digits is None and format.verb in "gG":
        text = printed_float(value)
        return _signed(format, text.upper() if format.verb == "G" else text)
    text = f"{value:.{6 if format.digits is None else format.digits}{format.verb}}"
    return _signed(format, text)


def _signed(format: _Format, text: str) -> str:
    """Pad a number's text.  Zeros, if requested, are inserted after its sign."""
    sign = "-" if text.startswith("-") else "+" if "+" in format.flags else " " if " " in format.flags else ""
    digits = text.lstrip("+-")
    if "0" in format.flags and "-" not in format.flags and format.width is not None:
        digits = digits.rjust(format.width - len(sign), "0")
    return _padded(format._replace(flags=format.flags.replace("0", "")), sign + digits)


def _padded(format: _Format, text: str) -> str:
    if format.width is None:
        return text
    if "-" in format.flags:
        return text.ljust(format.width)
    return text.rjust(format.width, "0" if "0" in format.flags else " ")
