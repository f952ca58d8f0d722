"""Values of templates, and their text in Go."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from skep.gotemplate.text import BoundedText, TemplateBudget


@dataclass(frozen=True)
class Struct:
    """A Go struct: its fields in order, and its type's name in errors."""

    type_name: str
    fields: Mapping[str, "Value"]


Value: TypeAlias = str | int | float | bool | Mapping[str, str] | Struct | None
"""None is nil.  A mapping is Go's ``map[string]string``."""


def type_name(value: Value) -> str:
    """Return Go's name of the value's type."""
    match value:
        case Struct():
            return value.type_name
        case bool():
            return "bool"
        case int():
            return "int"
        case float():
            return "float64"
        case str():
            return "string"
        case None:
            return "<nil>"
        case _:
            return "map[string]string"


def is_true(value: Value) -> bool:
    """Return whether ``if`` treats the value as true: structs always, other values unless they are empty or zero."""
    return isinstance(value, Struct) or bool(value)


def printed(value: Value, budget: TemplateBudget) -> str:
    """Return the output of ``fmt.Print`` (``%v``).  Raises: TooMuchText."""
    if isinstance(value, str):
        return value
    out = BoundedText(budget)
    write_value(out, value)
    return str(out)


def write_value(out: BoundedText, value: Value) -> None:
    """Write the output of ``fmt.Print`` (``%v``).  Raises: TooMuchText."""
    match value:
        case None:
            out.write("<nil>")
        case bool():
            out.write("true" if value else "false")
        case str():
            out.write(value)
        case int():
            out.write(str(value))
        case float():
            out.write(printed_float(value))
        case Struct():
            out.write("{")
            for number, field in enumerate(value.fields.values()):
                out.write(" " if number else "")
                write_value(out, field)
            out.write("}")
        case _:
            out.write("map[")
            for number, key in enumerate(sorted(value)):
                out.write(" " if number else "")
                out.write(key)
                out.write(":")
                out.write(value[key])
            out.write("]")


_EXPONENT = 6
"""Numbers with this exponent or a larger one, or with an exponent below -4, are written in scientific notation."""


def printed_float(value: float) -> str:
    """Return ``%v`` of a float, with the fewest digits that read back as the same number."""
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    text = repr(value)
    mantissa, _, exponent = text.partition("e")
    sign = "-" if mantissa.startswith("-") else ""
    whole, _, fraction = mantissa.lstrip("-").partition(".")
    digits = whole + ("" if fraction == "0" else fraction)
    point = len(whole) + int(exponent or 0)
    stripped = digits.lstrip("0")
    point -= len(digits) - len(stripped)
    digits = stripped.rstrip("0")
    if not digits:
        return sign + "0"
    if -4 <= point - 1 < _EXPONENT:
        if point <= 0:
            return f"{sign}0.{'0' * -point}{digits}"
        if point >= len(digits):
            return sign + digits + "0" * (point - len(digits))
        return f"{sign}{digits[:point]}.{digits[point:]}"
    tail = f".{digits[1:]}" if len(digits) > 1 else ""
    power = point - 1
    return f"{sign}{digits[0]}{tail}e{'-' if power < 0 else '+'}{abs(power):02}"


def quoted(text: str) -> str:
    """Quote like ``strconv.Quote``: in double quotes, with escapes for unprintable characters."""
    return f'"{escaped(text)}"'


def escaped(text: str) -> str:
    """Return ``quoted(text)`` without its quotes."""
    return "".join(map(_escaped, text))


def write_quoted(out: BoundedText, text: str) -> None:
    """Write ``quoted(text)``.  Raises: TooMuchText."""
    out.write('"')
    out.write_escaped(text, escaped)
    out.write('"')


_ESCAPES = {
    "\a": r"\a",
    "\b": r"\b",
    "\f": r"\f",
    "\n": r"\n",
    "\r": r"\r",
    "\t": r"\t",
    "\v": r"\v",
    '"': r"\"",
    "\\": "\\\\",
}


def _escaped(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    if char.isprintable():
        return char
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def to_bytes(text: str) -> bytes:
    """Return the text's bytes in Go."""
    return text.encode(errors="surrogateescape")


def to_text(data: bytes) -> str:
    """Convert bytes back, as the inverse of ``to_bytes``."""
    return data.decode(errors="surrogateescape")
