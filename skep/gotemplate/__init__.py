"""Go's text/template: the language of Docker's placeholders (``{{.Node.Hostname}}``, ``{{secret "x"}}``).

``expand`` parses and executes a text.  Supports the whole language except methods, channels and complex numbers, which
need Go's reflection.  Error texts are Go's.  A budget limits the cost of executions (``text.py``).

Source: Go 1.24, text/template and text/template/parse.
"""

from collections.abc import Mapping

from skep.gotemplate.execute import execute
from skep.gotemplate.functions import CallError, Function
from skep.gotemplate.parse import TemplateError, parse
from skep.gotemplate.text import BoundedText, TemplateBudget
from skep.gotemplate.values import Struct, Value, quoted, to_bytes, to_text

__all__ = [
    "BoundedText",
    "CallError",
    "Function",
    "Struct",
    "TemplateBudget",
    "TemplateError",
    "Value",
    "expand",
    "quoted",
    "to_bytes",
    "to_text",
]


def expand(
    text: str,
    data: Struct,
    functions: Mapping[str, Function] | None = None,
    *,
    budget: TemplateBudget | None = None,
) -> str:
    """Return ``text`` with its actions replaced by their output.

    Args:
        text: The template.  Bytes that are not UTF-8 are surrogates (``errors="surrogateescape"``) and stay unchanged.
        data: The value of ``.`` and ``$``.
        functions: Functions in addition to Go's own.
        budget: Reduced by the execution.  Several texts may share one.

    Raises: TemplateError: the text cannot be parsed, an action failed, or the budget is exceeded.
    """
    if "{{" not in text:
        return text
    extra, budget = functions or {}, budget or TemplateBudget()
    return execute(parse(text, extra, budget), data, extra, budget)
