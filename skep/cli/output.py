"""Output options of all commands: ``-o``, ``--format`` and ``--watch``.

A command returns a ``Shown``: its data in the form of the API, and its lines for people. A command that follows events
prints each one and does not need ``--watch``. Output is colored and cut to the width of a terminal only; piped output
is plain and complete. ``NO_COLOR`` applies to every command (``main``).
"""

import asyncio
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import update_wrapper
from typing import Any, TextIO

import click
import msgspec

from skep.cli.running import errors_shown
from skep.errors import InvalidArgument, SkepError
from skep.model.task_end import printable

FORMS = ("text", "wide", "json", "yaml")
_COLUMNS_MIN = 40
"""Narrower terminals wrap lines, because cells of a few characters say nothing."""
_GAP = "  "
_CLEAR = "\x1b[H\x1b[2J\x1b[3J"


class Screen(msgspec.Struct, frozen=True):
    """The screen that lines are written for. ``columns`` is None for a pipe, where lines can have any length."""

    columns: int | None = None
    is_wide: bool = False
    has_colors: bool = False

    @classmethod
    def present(cls, *, is_wide: bool, output: TextIO | None = None) -> "Screen":
        """Return the screen of ``output``, by default this command's standard output."""
        is_terminal = (output or sys.stdout).isatty()
        columns = (
            max(shutil.get_terminal_size().columns, _COLUMNS_MIN) if is_terminal and not is_wide else None
        )
        return cls(
            columns=columns, is_wide=is_wide, has_colors=is_terminal and not os.environ.get("NO_COLOR")
        )

    def styled(self, text: str, color: str = "", *, bold: bool = False) -> str:
        """Return ``text`` in a color, if the screen has colors."""
        return click.style(text, fg=color or None, bold=bold or None) if self.has_colors and text else text

    def fitted(self, text: str, *, indent: int = 0) -> list[str]:
        """Wrap ``text`` to the screen. The first line keeps its indentation, the others have ``indent``."""
        if self.columns is None or width_of(text) <= self.columns:
            return [text]
        first, *words = text.lstrip(" ").split(" ")
        lines, line = [], " " * (len(text) - len(text.lstrip(" "))) + first
        for word in words:
            if width_of(line) + 1 + width_of(word) > self.columns:
                lines.append(line)
                line = " " * indent + word
            else:
                line = f"{line} {word}"
        return [*lines, line]


class Cell(msgspec.Struct, frozen=True):
    """A table cell with a color."""

    text: str
    color: str = ""


def width_of(text: str) -> int:
    """Return the number of terminal columns that ``text`` takes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def shortened(text: str, columns: int) -> str:
    """Return ``text``, cut to ``columns``."""
    if width_of(text) <= columns:
        return text
    kept = ""
    for char in text:
        if width_of(kept + char) > columns - 1:
            break
        kept += char
    return f"{kept}…"


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str | Cell]],
    screen: Screen,
    *,
    indent: int = 0,
    empty: str = "",
) -> Iterator[str]:
    """Yield the lines of a table with aligned columns. On a narrow terminal, the last column is cut.

    Control characters are escaped. ``empty`` is the line that replaces a table without rows.
    """
    if empty and not rows:
        yield empty
        return
    cells = [[each if isinstance(each, Cell) else Cell(each) for each in row] for row in (head, *rows)]
    shown = [[Cell(printable(each.text), each.color) for each in row] for row in cells]
    widths = [max(width_of(each.text) for each in column) for column in zip(*shown, strict=True)]
    if screen.columns is not None:
        before = indent + sum(width + len(_GAP) for width in widths[:-1])
        widths[-1] = min(widths[-1], max(screen.columns - before, 8))
    for number, row in enumerate(shown):
        line, missing = " " * indent, 0
        for each, width in zip(row, widths, strict=True):
            text = shortened(each.text, width)
            line += " " * missing + screen.styled(text, each.color, bold=number == 0)
            missing = width - width_of(text) + len(_GAP)
        yield line.rstrip()


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """The output of a command in every form.

    ``data``: for JSON and YAML. ``rows``: the objects that ``--format`` formats one by one, or None to format ``data``.
    ``lines``: for people. ``exit_code``: exit code of the command if this is its last output.
    """

    data: Any
    lines: Callable[[Screen], Iterator[str]]
    rows: Sequence[Mapping[str, Any]] | None = None
    exit_code: int = 0


class OutputOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The output options of one call."""

    form: str = "text"
    template: str = ""
    watches: bool = False
    watch_s: float = 2.0
    """Seconds between two pictures, as in ``watch``."""

    def show(self, fetch: Callable[[], Awaitable[Shown]]) -> None:
        """Show the result of ``fetch``, once or every ``watch_s``.

        With ``--watch``, a failed fetch is shown and retried.

        Raises:
            SystemExit: With the exit code of the output.
            click.ClickException: The fetch failed, or the template is invalid.
        """
        with errors_shown():
            code = asyncio.run(self._watch(fetch) if self.watches else self._once(fetch))
        if code:
            raise SystemExit(code)

    async def _once(self, fetch: Callable[[], Awaitable[Shown]]) -> int:
        report = await fetch()
        for line in self.lines(report):
            click.echo(line)
        return report.exit_code

    async def _watch(self, fetch: Callable[[], Awaitable[Shown]]) -> int:
        last: list[str] = []
        while True:
            try:
                lines = self.lines(await fetch())
            except InvalidArgument:
                raise
            except (SkepError, OSError) as error:
                lines = [f"The state could not be read: {printable(str(error))}"]
            if sys.stdout.isatty():
                height = shutil.get_terminal_size().lines - 1
                click.echo(_CLEAR + "\n".join(lines[:height]))
            elif lines != last:
                click.echo("\n".join(lines))
                sys.stdout.flush()
            last = lines
            await asyncio.sleep(self.watch_s)

    def lines(self, report: Shown) -> list[str]:
        """Format the report as requested.  Raises: InvalidArgument: the template is invalid."""
        screen = Screen.present(is_wide=self.form == "wide")
        if self.template:
            rows = report.rows if report.rows is not None else [report.data]
            return list(templated(self.template, rows, screen))
        match self.form:
            case "json":
                return [msgspec.json.format(msgspec.json.encode(report.data), indent=2).decode()]
            case "yaml":
                return [_yaml(report.data)]
        return list(report.lines(screen))

    def show_next(self, row: Mapping[str, Any], line: str) -> None:
        """Show the next object of a stream. ``line`` is the text for people, or empty to show them nothing.

        JSON is one object per line, YAML one document per object.  Raises: InvalidArgument: the template is invalid.
        """
        if self.form == "json":
            line = msgspec.json.encode(row).decode()
        elif self.form == "yaml":
            line = f"---\n{_yaml(row)}"
        elif self.template and line:
            (line,) = templated(self.template, [row], Screen())
        if line:
            click.echo(line)
            sys.stdout.flush()


def _yaml(data: Any) -> str:
    import yaml  # importing it takes longer than most commands

    return yaml.safe_dump(msgspec.to_builtins(data), sort_keys=False, allow_unicode=True).rstrip()


def templated(template: str, rows: Sequence[Mapping[str, Any]], screen: Screen) -> Iterator[str]:
    """Format each row with ``template``, or with docker's keywords ``json``, ``table`` and ``table TEMPLATE``.

    Raises: InvalidArgument: the template cannot be parsed, or names an unknown field.
    """
    word, _, rest = template.partition(" ")
    if template == "json":
        yield from (msgspec.json.encode(row).decode() for row in rows)
    elif word == "table" and rest:
        head = [_heading(cell) for cell in rest.replace("\\t", "\t").split("\t")]
        yield from table(head, [filled(rest, row).split("\t") for row in rows], screen)
    else:
        yield from (filled(template, row) for row in rows)


def _heading(cell: str) -> str:
    """Return docker's heading for a field: ``CURRENT STATE`` for ``{{.CurrentState}}``."""
    name = cell.strip().strip("{}").strip().rpartition(".")[2]
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).upper()


def filled(template: str, row: Mapping[str, Any]) -> str:
    """Fill a Go template with the values of ``row``. ``json`` is a function, as in docker.

    Raises: InvalidArgument: the template cannot be parsed, or names an unknown field.
    """
    from skep.gotemplate import Function, Struct, TemplateError, Value, expand

    def value_of(given: Any, name: str) -> Value:
        if isinstance(given, Mapping):
            return Struct(name, {key: value_of(each, key) for key, each in given.items()})
        if given is None or isinstance(given, str | int | float):
            return given
        return msgspec.json.encode(given).decode()  # templates have no lists

    def plain(value: Value) -> Any:
        if isinstance(value, Struct):
            return {key: plain(each) for key, each in value.fields.items()}
        return value

    def as_json(value: Value) -> str:
        if isinstance(value, str) and value[:1] in ("[", "{"):
            return value
        return msgspec.json.encode(plain(value)).decode()

    data = value_of(msgspec.to_builtins(row), "Shown")
    assert isinstance(data, Struct), "a report's rows are objects"
    text = template.replace("\\t", "\t").replace("\\n", "\n")
    try:
        return printable_lines(expand(text, data, {"json": Function(as_json, 1)}))
    except TemplateError as error:
        raise InvalidArgument(f"template parsing error: {error}. To see the fields, use -o json.") from error


def printable_lines(text: str) -> str:
    """Escape the control characters in ``text``, except tabs and line feeds."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def shows(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the output options to a command. It gets an ``OutputOptions``."""
    watch = click.option(
        "-w", "--watch", "watches", is_flag=True, help="Refresh every two seconds until Ctrl+C."
    )
    return watch(_with_forms(command))


def shows_as_it_happens(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the output options to a command that follows a stream until Ctrl+C. It gets an ``OutputOptions``."""
    return _with_forms(command)


def _with_forms(command: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, form: str, template: str, watches: bool = False, **options: Any) -> Any:
        if template and form not in ("text", "wide"):
            raise click.UsageError("--format and -o cannot be used together")
        return command(*args, output=OutputOptions(form=form, template=template, watches=watches), **options)

    for option in (
        click.option(
            "--format",
            "template",
            default="",
            metavar="TEMPLATE",
            help="Format with a Go template, or json, as in docker.",
        ),
        click.option(
            "-o",
            "--output",
            "form",
            type=click.Choice(FORMS),
            default="text",
            help="Output format. wide shows IDs and cuts nothing.",
        ),
    ):
        run = option(run)
    return update_wrapper(run, command)
