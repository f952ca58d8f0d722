"""The placeholders of a service: ``{{.Node.Hostname}}``, ``{{.Task.Slot}}``, ``{{index .Service.Labels "x"}}``.

Go templates are a language; these are its expressions that the documentation of ``docker service create``
names (field paths and ``index``).  Anything else is refused, so that none is expanded in part.

Source: swarmkit, template/context.go.
"""

import re
from collections.abc import Mapping
from typing import TypeAlias

from skep.errors import InvalidArgument

Context: TypeAlias = Mapping[str, "str | Context"]

_PLACEHOLDER = re.compile(r"\{\{-?\s*(.*?)\s*-?\}\}")
_PATH = re.compile(r"(?:\.\w+)+")
_INDEX = re.compile(r"index\s+((?:\.\w+)+)\s+\"((?:[^\"\\]|\\.)*)\"")


def expand(text: str, context: Context) -> str:
    """``text`` with its placeholders filled in.  Raises: InvalidArgument: an expression that is not known."""
    if "{{" not in text:
        return text
    return _PLACEHOLDER.sub(lambda match: _value(match.group(1), context), text)


def _value(expression: str, context: Context) -> str:
    if _PATH.fullmatch(expression):
        found = _walk(expression, context)
        if isinstance(found, str):
            return found
    match = _INDEX.fullmatch(expression)
    if match is not None:
        table = _walk(match.group(1), context)
        if not isinstance(table, str):
            value = table.get(match.group(2), "")
            return value if isinstance(value, str) else ""
    raise InvalidArgument(f"expanding {{{{{expression}}}}} failed: no such placeholder")


def _walk(path: str, context: Context) -> "str | Context":
    present: str | Context = context
    for name in path.removeprefix(".").split("."):
        if isinstance(present, str) or name not in present:
            raise InvalidArgument(f"expanding {{{{{path}}}}} failed: no such placeholder")
        present = present[name]
    return present
