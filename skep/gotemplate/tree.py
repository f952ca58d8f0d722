"""The syntax tree of a template.

Every node has its position (in characters), and its text in Go's errors as ``str``.
Source: Go 1.24, text/template/parse/node.go.
"""

from dataclasses import dataclass
from typing import TypeAlias

from skep.gotemplate.values import quoted

NAME = "expansion"
"""Name of the template in errors."""


@dataclass(frozen=True)
class Constant:
    """A literal.  ``text`` is its source text."""

    position: int
    value: str | int | float | bool
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Nil:
    """``nil``."""

    position: int

    def __str__(self) -> str:
        return "nil"


@dataclass(frozen=True)
class Dot:
    """``.``: the current value."""

    position: int

    def __str__(self) -> str:
        return "."


@dataclass(frozen=True)
class FieldNode:
    """``.Task.Slot``: fields of the current value."""

    position: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        return "".join(f".{name}" for name in self.names)


@dataclass(frozen=True)
class Variable:
    """``$name``, and fields of it.  ``$`` is the value that the template was executed with."""

    position: int
    name: str
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ".".join((self.name, *self.names))


@dataclass(frozen=True)
class FunctionCall:
    """A function by its name.  The rest of its command are its arguments."""

    position: int
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Chain:
    """Fields of the result of a parenthesized pipeline, or of a function without arguments."""

    position: int
    first: "Pipeline | FunctionCall"
    names: tuple[str, ...]

    def __str__(self) -> str:
        return (f"({self.first})" if isinstance(self.first, Pipeline) else str(self.first)) + "".join(
            f".{name}" for name in self.names
        )


@dataclass(frozen=True)
class CommandNode:
    """Operands: a value, or a function and its arguments."""

    position: int
    operands: tuple["Operand", ...]

    def __str__(self) -> str:
        return " ".join(f"({one})" if isinstance(one, Pipeline) else str(one) for one in self.operands)


@dataclass(frozen=True)
class Pipeline:
    """Commands, each with the previous result as its last argument.  Variables get the last result.

    ``assigns`` is set if the variables exist already (``=``).
    """

    position: int
    variables: tuple[str, ...]
    assigns: bool
    commands: tuple[CommandNode, ...]

    def __str__(self) -> str:
        sign = "=" if self.assigns else ":="
        head = f"{', '.join(self.variables)} {sign} " if self.variables else ""
        return head + " | ".join(str(command) for command in self.commands)


Operand: TypeAlias = Constant | Nil | Dot | FieldNode | Variable | FunctionCall | Chain | Pipeline


@dataclass(frozen=True)
class TextNode:
    """Text that is copied unchanged."""

    position: int
    text: str


@dataclass(frozen=True)
class PrintNode:
    """Prints its pipeline's result, unless the pipeline sets variables."""

    position: int
    pipeline: Pipeline

    def __str__(self) -> str:
        return f"{{{{{self.pipeline}}}}}"


@dataclass(frozen=True)
class Branch:
    """``if``, ``with`` and ``range`` (``word``)."""

    position: int
    word: str
    pipeline: Pipeline
    body: "Body"
    otherwise: "Body"


@dataclass(frozen=True)
class Include:
    """``{{template "name" pipeline}}``."""

    position: int
    name: str
    pipeline: Pipeline | None

    def __str__(self) -> str:
        return f"{{{{template {quoted(self.name)}{f' {self.pipeline}' if self.pipeline else ''}}}}}"


@dataclass(frozen=True)
class Jump:
    """``break`` and ``continue`` (``word``)."""

    position: int
    word: str


Statement: TypeAlias = TextNode | PrintNode | Branch | Include | Jump
Body: TypeAlias = tuple[Statement, ...]


@dataclass(frozen=True)
class Template:
    """A parsed text.  ``bodies`` has all templates by name.  The text's own is called ``NAME``."""

    text: str
    bodies: dict[str, Body]
