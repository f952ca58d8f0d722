"""Interpolation of variables in the values of Compose files: ``$NAME``, ``${NAME:-default}`` and other forms.

| form | result | |---|---| | ``$NAME``, ``${NAME}`` | the value, or empty with a warning if NAME is unset | |
``${NAME:-text}``, ``${NAME-text}`` | ``text`` if NAME is unset or empty, or only if it is unset | | ``${NAME:?text}``,
``${NAME?text}`` | an error with ``text`` in the same cases | | ``${NAME:+text}``, ``${NAME+text}`` | ``text`` if NAME
is set and not empty, or if it is set at all | | ``$$`` | a dollar sign |

``text`` may have variables of its own.

Source: compose-spec, 12-interpolation.md.
"""

import re
from collections.abc import Callable, Mapping
from typing import Final

from msgspec.structs import replace

from skep.stack.compose.document import FileProblem, FileProblems, YamlNode, scalar

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPERATORS: Final = (":-", ":?", ":+", "-", "?", "+")
_DEPTH_MAX: Final = 20
"""Deepest nesting of variables."""
_BYTES_MAX: Final = 1 << 20
"""Longest value after substitution, in characters."""


class Substitution:
    """Replaces variables, and records the names of those without a value."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables
        self.missing: dict[str, None] = {}
        """Names without a value, in the order of their use."""

    def text(self, text: str) -> str:
        """Return ``text`` with its variables replaced.

        Raises: ValueError: a form is invalid, or a required variable has no value.
        """
        made, rest = self._until(text, "", 0)
        assert not rest
        return made

    def _until(self, text: str, end: str, depth: int) -> tuple[str, str]:
        """Return the text before ``end`` with variables replaced, and the rest after it.  An empty ``end`` means the
        whole text.
        """
        if depth > _DEPTH_MAX:
            raise ValueError(f"variables are nested more than {_DEPTH_MAX} levels deep")
        made: list[str] = []
        size = 0
        while text:
            if end and text.startswith(end):
                return "".join(made), text[len(end) :]
            if text[0] == "$":
                part, text = self._variable(text[1:], depth)
            else:
                stop = min(
                    (at for at in (text.find("$"), text.find(end) if end else -1) if at >= 0),
                    default=len(text),
                )
                part, text = text[:stop], text[stop:]
            made.append(part)
            size += len(part)
            if size > _BYTES_MAX:
                raise ValueError(f"it is longer than {_BYTES_MAX} characters with its variables replaced")
        if end:
            raise ValueError("a ${ is never closed: write $$ for a dollar sign")
        return "".join(made), ""

    def _variable(self, text: str, depth: int) -> tuple[str, str]:
        """Return the value of the variable in ``text``, which follows a dollar sign, and the rest after it."""
        if text.startswith("$"):
            return "$", text[1:]
        if match := _NAME.match(text):
            return self._value(match[0]), text[match.end() :]
        if not text.startswith("{"):
            raise ValueError("a dollar sign without the name of a variable: write $$ for a dollar sign")
        match = _NAME.match(text, 1)
        if match is None:
            raise ValueError("${ without the name of a variable: write $$ for a dollar sign")
        name, rest = match[0], text[match.end() :]
        if rest.startswith("}"):
            return self._value(name), rest[1:]
        for operator in _OPERATORS:
            if rest.startswith(operator):
                return self._operated(name, operator, rest[len(operator) :], depth)
        raise ValueError(
            f"${{{name} is followed by {rest[:1]!r}: expected one of {' '.join(_OPERATORS)} or a closing brace"
        )

    def _value(self, name: str) -> str:
        if name not in self._variables:
            self.missing[name] = None
        return self._variables.get(name, "")

    def _operated(self, name: str, operator: str, rest: str, depth: int) -> tuple[str, str]:
        value = self._variables.get(name)
        has_value = value is not None and not (operator[0] == ":" and not value)
        is_used = has_value if operator[-1] == "+" else not has_value
        inner = (
            self if is_used else Substitution(self._variables)
        )  # a variable in a default that is not used does not count as missing
        try:
            text, rest = inner._until(rest, "}", depth + 1)
        except _MissingError:
            if is_used:
                raise
            rest = _behind(rest)
            text = ""
        match operator[-1]:
            case "-":
                return (value or "") if has_value else text, rest
            case "+":
                return text if has_value else "", rest
            case _:
                if not has_value:
                    raise _MissingError(f"the variable {name} has no value" + (f": {text}" if text else ""))
                return value or "", rest


class _MissingError(ValueError):
    """A required variable has no value."""


def _behind(text: str) -> str:
    """Return the rest of ``text`` after the closing brace that belongs to the opening brace before ``text``."""
    depth = 1
    for at, character in enumerate(text):
        if character == "{" and at and text[at - 1] == "$":
            depth += 1
        elif character == "}":
            depth -= 1
            if not depth:
                return text[at + 1 :]
    raise ValueError("a ${ is never closed: write $$ for a dollar sign")


def interpolated(node: YamlNode, variables: Mapping[str, str], warn: Callable[[str], None]) -> YamlNode:
    """Return the tree with variables in its values, but not in its keys, replaced.  Raises: FileProblems: values are
    invalid.
    """
    substitution = Substitution(variables)
    problems: list[FileProblem] = []
    made = _tree(node, "", substitution, problems)
    if problems:
        raise FileProblems(problems)
    for name in substitution.missing:
        warn(f"the variable {name} is not set: it is taken as empty")
    return made


def _tree(node: YamlNode, path: str, substitution: Substitution, problems: list[FileProblem]) -> YamlNode:
    if (entries := node.entries) is not None:
        dotted = f"{path}." if path else ""
        return replace(
            node,
            value={key: _tree(one, f"{dotted}{key}", substitution, problems) for key, one in entries.items()},
        )
    if (items := node.items) is not None:
        return replace(
            node,
            value=tuple(_tree(one, f"{path}[{at}]", substitution, problems) for at, one in enumerate(items)),
        )
    if not isinstance(node.value, str) or "$" not in node.text:
        return node
    try:
        text = substitution.text(node.text)
    except ValueError as error:
        problems.append(FileProblem(node.place, path, str(error)))
        return node
    return replace(scalar(text, node.place, is_plain=node.is_plain and bool(text)), tag=node.tag)
