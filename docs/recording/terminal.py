"""A terminal of fixed size, with the few control sequences that ``docker`` and ``skep`` print."""

import re
from typing import NamedTuple

_TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b[()][A-Z0-9]|\x1b[=>]|([\r\n\b])|([^\x1b\r\n\b]+)|\x1b")
_COLORS = {31: "red", 32: "green", 33: "yellow", 34: "blue", 36: "cyan", 90: "dim", 91: "red", 92: "green"}
_NO_COLOR = 39


class Style(NamedTuple):
    """Attributes of a character."""

    color: str = ""
    is_bold: bool = False


class Run(NamedTuple):
    """Characters of one row that are next to each other and have one style."""

    column: int
    text: str
    style: Style


Row = tuple[Run, ...]


class Terminal:
    """The characters on the screen.  The screen scrolls when the cursor leaves its last row."""

    def __init__(self, columns: int, rows: int) -> None:
        self._columns = columns
        self._blank = [(" ", Style())] * columns
        self._cells = [list(self._blank) for _ in range(rows)]
        self._row = self._column = 0
        self._style = Style()

    def write(self, text: str) -> None:
        """Print ``text`` at the cursor."""
        for found in _TOKEN.finditer(text):
            parameters, final, control, plain = found.groups()
            if final:
                self._control(parameters, final)
            elif control:
                self._move(control)
            elif plain:
                self._put(plain)

    def clear(self) -> None:
        """Erase everything, and put the cursor at the top."""
        self._cells = [list(self._blank) for _ in self._cells]
        self._row = self._column = 0

    def rows(self) -> tuple[Row, ...]:
        """Return the content of every row, without blanks at its end."""
        return tuple(_runs(cells) for cells in self._cells)

    def _put(self, text: str) -> None:
        for character in text.expandtabs():
            if self._column == self._columns:
                self._column = 0
                self._next_row()
            self._cells[self._row][self._column] = (character, self._style)
            self._column += 1

    def _move(self, control: str) -> None:
        if control == "\n":
            self._next_row()
        elif control == "\r":
            self._column = 0
        else:
            self._column = max(0, self._column - 1)

    def _next_row(self) -> None:
        self._row += 1
        if self._row == len(self._cells):
            self._cells = [*self._cells[1:], list(self._blank)]
            self._row -= 1

    def _control(self, parameters: str, final: str) -> None:
        numbers = [int(number) for number in re.findall(r"\d+", parameters)]
        first = numbers[0] if numbers else 0
        match final:
            case "A":
                self._row = max(0, self._row - max(1, first))
            case "B":
                self._row = min(len(self._cells) - 1, self._row + max(1, first))
            case "K":
                start = 0 if first == 2 else self._column
                self._cells[self._row][start:] = self._blank[start:]
            case "J":
                self._cells[self._row][self._column :] = self._blank[self._column :]
                for row in range(self._row + 1, len(self._cells)):
                    self._cells[row] = list(self._blank)
            case "m":
                self._paint(numbers or [0])

    def _paint(self, numbers: list[int]) -> None:
        for number in numbers:
            if number == 0:
                self._style = Style()
            elif number == 1:
                self._style = self._style._replace(is_bold=True)
            elif number == 2:
                self._style = self._style._replace(color="dim")
            elif number == _NO_COLOR or number in _COLORS:
                self._style = self._style._replace(color=_COLORS.get(number, ""))


def _runs(cells: list[tuple[str, Style]]) -> Row:
    """Join neighbors of one style.  Blanks between words belong to them."""
    runs: list[Run] = []
    for column, (character, style) in enumerate(cells):
        if runs and (runs[-1].style == style or character == " "):
            runs[-1] = runs[-1]._replace(text=runs[-1].text + character)
        else:
            runs.append(Run(column, character, style))
    return tuple(
        run._replace(column=run.column + len(run.text) - len(run.text.lstrip()), text=run.text.strip())
        for run in runs
        if run.text.strip()
    )
