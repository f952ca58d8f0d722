"""Go's text/template: the language of Docker's placeholders (``{{.Node.Hostname}}``, ``{{secret "x"}}``).

``expand`` parses and executes a text. All of the language is here but what needs Go's reflection: methods,
channels and complex numbers. Error texts are Go's. A budget bounds what executions cost (``text.py``).

Source: Go 1.24, text/template and text/template/parse.
"""

from collections.abc import Mapping

from skep.gotemplate.execute import execute
from skep.gotemplate.functions import CallError, Function
from skep.gotemplate.parse import TemplateError, parse
from skep.gotemplate.text import Budget, Text
from skep.gotemplate.values import Struct, Value, quoted, to_bytes, to_text

__all__ = [
    "Budget",
    "CallError",
    "Function",
    "Struct",
    "TemplateError",
    "Text",
    "Value",
    "expand",
    "quoted",
    "to_bytes",
    "to_text",
]


def expand(
    text: str, data: Struct, functions: Mapping[str, Function] | None = None, *, budget: Budget | None = None
) -> str:
    """``text`` with its actions replaced by what they print.

    Args:
        text: bytes that are no UTF-8 are surrogates (``errors="surrogateescape"``) and stay as they are.
        data: what ``.`` and ``$`` are.
        functions: besides Go's own.
        budget: may be shared by several texts; it is reduced.

    Raises: TemplateError: it cannot be parsed, an action failed, or it exceeds its budget.
    """
    if "{{" not in text:
        return text
    extra, budget = functions or {}, budget or Budget()
    return execute(parse(text, extra, budget), data, extra, budget)
