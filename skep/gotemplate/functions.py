"""The built-in functions of templates.

Source: Go 1.24, text/template/funcs.go.
"""

import operator
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import quote_plus

from skep.gotemplate.format import sprintf
from skep.gotemplate.text import BoundedText, TemplateBudget, TooMuchText
from skep.gotemplate.values import Struct, Value, printed, to_bytes, to_text, type_name, write_value

_SHOWN_MAX = 1_000
"""An error shows at most this many characters of a value, because errors become a task's status."""


class CallError(Exception):
    """A function refused its arguments.  The message is Go's."""


class Function(NamedTuple):
    """A function of a template.  ``call`` raises CallError.

    A function whose result may be much longer than its string arguments must set ``writes``.
    """

    call: Callable[..., Value]
    parameters: int
    """Minimum number of arguments."""
    is_variadic: bool = False
    """Whether it accepts more arguments."""
    texts: int = 0
    """Number of leading arguments that have to be strings."""
    writes: bool = False
    """Whether it writes its result to a ``BoundedText``, its first argument, and returns nothing."""


def _kind(value: Value) -> str:
    """Return the kind of a comparable value, or ""."""
    name = type_name(value)
    return name if name in ("bool", "int", "float64", "string") else ""


def _equal(first: Value, *others: Value) -> bool:
    if not others:
        raise CallError("missing argument for comparison")
    for other in others:
        if _kind(first) != _kind(other) and first is not None and other is not None:
            raise CallError("incompatible types for comparison")
        if not _kind(first) and not (first is None or other is None):
            raise CallError(f"non-comparable type {shown(first)}: {type_name(first)}")
        if _kind(first) == _kind(other) and first == other:
            return True
    return False


def _not_equal(first: Value, second: Value) -> bool:
    return not _equal(first, second)


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[Value, Value], bool]:
    def ordered(first: Value, second: Value) -> bool:
        if not _kind(first) or not _kind(second):
            raise CallError("invalid type for comparison")
        if _kind(first) != _kind(second):
            raise CallError("incompatible types for comparison")
        if isinstance(first, bool):
            raise CallError("invalid type for comparison")
        if isinstance(first, str) and isinstance(second, str):
            return compare(to_bytes(first), to_bytes(second))
        return compare(first, second)

    return ordered


def _length(value: Value) -> int:
    if isinstance(value, str):
        return len(to_bytes(value))
    if value is None:
        raise CallError("reflect: call of reflect.Value.Type on zero Value")
    if isinstance(value, Struct | bool | int | float):
        raise CallError(f"len of type {type_name(value)}")
    return len(value)


def _position(value: Value, length: int) -> int:
    if value is None:
        raise CallError("cannot index slice/array with nil")
    if isinstance(value, bool) or not isinstance(value, int):
        raise CallError(f"cannot index slice/array with type {type_name(value)}")
    if not 0 <= value < length:
        raise CallError(f"index out of range: {value}")
    return value


def _index(item: Value, *indexes: Value) -> Value:
    for index in indexes:
        if isinstance(item, str):
            data = to_bytes(item)
            position = _position(index, len(data) + 1)
            if position == len(data):
                raise CallError("reflect: string index out of range")
            item = data[position]
        elif item is None:
            raise CallError("index of untyped nil")
        elif isinstance(item, Struct | bool | int | float):
            raise CallError(f"can't index item of type {type_name(item)}")
        elif isinstance(index, str):
            item = item.get(index, "")
        else:
            raise CallError(f"value has type {type_name(index)}; should be string")
    return item


def _slice(item: Value, *bounds: Value) -> str:
    if item is None:
        raise CallError("slice of untyped nil")
    if len(bounds) > 3:
        raise CallError(f"too many slice indexes: {len(bounds)}")
    if not isinstance(item, str):
        raise CallError(f"can't slice item of type {type_name(item)}")
    if len(bounds) == 3:
        raise CallError("cannot 3-index slice a string")
    data = to_bytes(item)
    start, end = [_position(bound, len(data) + 1) for bound in bounds] + [0, len(data)][len(bounds) :]
    if start > end:
        raise CallError(f"invalid slice index: {start} > {end}")
    return to_text(data[start:end])


def _call(function: Value, *_: Value) -> Value:
    raise CallError("call of nil" if function is None else f"non-function of type {type_name(function)}")


def shown(value: Value) -> str:
    """Return a value for an error, cut if it is long."""
    try:
        return printed(value, TemplateBudget(produced=_SHOWN_MAX))
    except TooMuchText:
        return f"a {type_name(value)}"


def print_all(out: BoundedText, *values: Value) -> None:
    """Write values like ``fmt.Sprint``, which adds a space between two values if neither is a string."""
    for number, value in enumerate(values):
        if number and not isinstance(value, str) and not isinstance(values[number - 1], str):
            out.write(" ")
        write_value(out, value)


def _print_line(out: BoundedText, *values: Value) -> None:
    for number, value in enumerate(values):
        out.write(" " if number else "")
        write_value(out, value)
    out.write("\n")


def _print_format(out: BoundedText, format: str, *values: Value) -> None:
    sprintf(out, format, values)


_HTML = str.maketrans({'"': "&#34;", "'": "&#39;", "&": "&amp;", "<": "&lt;", ">": "&gt;", "\0": "\ufffd"})
_JS = {
    "\\": r"\\",
    "'": r"\'",
    '"': r"\"",
    "<": r"\u003C",
    ">": r"\u003E",
    "&": r"\u0026",
    "=": r"\u003D",
}


def _escaping(escape: Callable[[str], str]) -> Callable[..., None]:
    """Return a ``print`` function whose text is escaped."""

    def write(out: BoundedText, *values: Value) -> None:
        plain = BoundedText(out.budget)
        print_all(plain, *values)
        out.write_escaped(str(plain), escape)

    return write


def _js_escaped(char: str) -> str:
    if char in _JS:
        return _JS[char]
    if char < " ":
        return f"\\u00{ord(char):02X}"
    return char if char.isprintable() or 0xDC80 <= ord(char) <= 0xDCFF else f"\\u{ord(char):04X}"


def _join(out: BoundedText, separator: str, *values: str) -> None:
    """Join strings, as SwarmKit's only own function does (template/template.go)."""
    for number, value in enumerate(values):
        out.write(separator if number else "")
        out.write(value)


LOGICAL = frozenset({"and", "or"})
"""Functions that stop at the first decisive argument, and are therefore executed in ``execute.py``."""

BUILTINS: dict[str, Function] = {
    "and": Function(lambda *values: values[-1], 1, is_variadic=True),
    "or": Function(lambda *values: values[-1], 1, is_variadic=True),
    "not": Function(lambda value: not value and not isinstance(value, Struct), 1),
    "call": Function(_call, 1, is_variadic=True),
    "html": Function(_escaping(lambda text: text.translate(_HTML)), 0, is_variadic=True, writes=True),
    "js": Function(_escaping(lambda text: "".join(map(_js_escaped, text))), 0, is_variadic=True, writes=True),
    "urlquery": Function(
        _escaping(lambda text: quote_plus(to_bytes(text), safe="~")), 0, is_variadic=True, writes=True
    ),
    "index": Function(_index, 1, is_variadic=True),
    "slice": Function(_slice, 1, is_variadic=True),
    "len": Function(_length, 1),
    "print": Function(print_all, 0, is_variadic=True, writes=True),
    "println": Function(_print_line, 0, is_variadic=True, writes=True),
    "printf": Function(_print_format, 1, is_variadic=True, texts=1, writes=True),
    "eq": Function(_equal, 1, is_variadic=True),
    "ne": Function(_not_equal, 2),
    "lt": Function(_ordered(operator.lt), 2),
    "le": Function(_ordered(operator.le), 2),
    "gt": Function(_ordered(operator.gt), 2),
    "ge": Function(_ordered(operator.ge), 2),
    "join": Function(_join, 1, is_variadic=True, texts=sys.maxsize, writes=True),
}
