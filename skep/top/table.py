"""A table of any number of rows, which paints only those on the screen.

Textual's ``DataTable`` measures every added cell, which takes 1.3 s for ten thousand rows, and renumbers all rows when
one is removed, which takes 17 ms (decision 93).  Here the rows are one list, which is replaced as a whole.
"""

import time
from collections.abc import Sequence
from typing import ClassVar

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from skep.model.task_end import printable
from skep.top.rows import Column, ScreenRow, Tone, age_of, laid_out

_GAP = 2
"""Columns of the terminal between two columns of the table."""


class RowTable(ScrollView, can_focus=True):
    """Rows with a cursor, which stays on its row when the others change.  The rows contain no markup."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("home", "edge(0)", "First", show=False),
        Binding("end", "edge(1)", "Last", show=False),
        Binding("enter", "choose", "Explain", key_display="enter"),
    ]
    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "table--header",
        "table--cursor",
        *(f"table--{tone.value}" for tone in Tone),
    }
    DEFAULT_CSS = """
    RowTable { height: 1fr; padding-left: 1; overflow-x: hidden; scrollbar-size-vertical: 1; }
    RowTable > .table--header { color: $text-muted; text-style: bold; }
    RowTable > .table--cursor { background: $panel; color: $foreground; text-style: bold; }
    RowTable:focus > .table--cursor { background: $block-cursor-background; color: $block-cursor-foreground; }
    RowTable > .table--good { color: $text-success; }
    RowTable > .table--warning { color: $text-warning; }
    RowTable > .table--bad { color: $text-error; text-style: bold; }
    RowTable > .table--muted { color: $text-muted; }
    """

    class Chosen(Message):
        """Enter on a row."""

    def __init__(
        self, columns: Sequence[Column], *, empty: str, follows_end: bool = False, id: str | None = None
    ):
        super().__init__(id=id)
        self._columns = columns
        self._empty = empty
        self._follows_end = follows_end
        self._rows: Sequence[ScreenRow] = ()
        self._naturals = [len(column.title) for column in columns]
        self._cursor = 0

    @property
    def key(self) -> str:
        """Key of the row under the cursor, or empty without rows."""
        return self._rows[self._cursor].key if self._rows else ""

    def show(self, rows: Sequence[ScreenRow]) -> None:
        """Replace the rows by ``rows``."""
        was_at_end = self._cursor >= len(self._rows) - 1
        key, place = self.key, self._cursor
        self._rows = rows
        if self._follows_end and was_at_end:
            place = len(rows) - 1
        elif not (place < len(rows) and rows[place].key == key):
            place = next((number for number, row in enumerate(rows) if row.key == key), place)
        self._naturals = [
            max(
                len(column.title),
                _AGE_WIDTH if column.is_age else max((len(row.cells[number]) for row in rows), default=0),
            )
            for number, column in enumerate(self._columns)
        ]
        self.virtual_size = Size(self.size.width, len(rows) + 1)
        self._move_to(place)
        self.refresh()

    def say_when_empty(self, text: str) -> None:
        """Set the text that is shown without rows."""
        if text != self._empty:
            self._empty = text
            self.refresh()

    def render_line(self, y: int) -> Strip:
        width = self.scrollable_content_region.width
        widths = laid_out(self._columns, self._naturals, width, _GAP)
        if y == 0:
            style = self.get_component_rich_style("table--header")
            cells = [(column.title, style) for column in self._columns]
            return self._strip(cells, widths, style)
        number = int(self.scroll_offset.y) + y - 1
        if not self._rows and y == 1:
            return self._strip([(self._empty, self.rich_style)], [width], self.rich_style)
        if number >= len(self._rows):
            return Strip.blank(width, self.rich_style)
        row = self._rows[number]
        base, now = self.rich_style, time.time()
        toned = base + self.get_component_rich_style(f"table--{row.tone.value}", partial=True)
        if number == self._cursor:
            marked = self.get_component_rich_style("table--cursor", partial=True)
            base, toned = base + marked, toned + marked
        cells = [
            (age_of(cell, now) if column.is_age else printable(cell), toned if column.is_toned else base)
            for column, cell in zip(self._columns, row.cells, strict=True)
        ]
        return self._strip(cells, widths, base)

    def _strip(self, cells: Sequence[tuple[str, Style]], widths: Sequence[int], base: Style) -> Strip:
        segments: list[Segment] = []
        for (text, style), width in zip(cells, widths, strict=True):
            if not width:
                continue
            if cell_len(text) > width:
                text = f"{set_cell_size(text, width - 1)}…"
            segments += [Segment(set_cell_size(text, width), style), Segment(" " * _GAP, base)]
        return Strip(segments).adjust_cell_length(self.scrollable_content_region.width, base)

    def _move_to(self, place: int) -> None:
        self._cursor = max(0, min(place, len(self._rows) - 1))
        lines = self.size.height - 1
        top = int(self.scroll_offset.y)
        if self._cursor < top:
            self.scroll_to(y=self._cursor, animate=False, immediate=True)
        elif lines > 0 and self._cursor >= top + lines:
            self.scroll_to(y=self._cursor - lines + 1, animate=False, immediate=True)

    def action_move(self, by: int) -> None:
        """Move the cursor up or down."""
        self._move_to(self._cursor + by)
        self.refresh()

    def action_page(self, by: int) -> None:
        """Move the cursor by a screen of rows."""
        self.action_move(by * max(self.size.height - 2, 1))

    def action_edge(self, last: int) -> None:
        """Move the cursor to the first or last row."""
        self.action_move(len(self._rows) if last else -len(self._rows))

    def action_choose(self) -> None:
        """Post that the row is chosen."""
        if self._rows:
            self.post_message(self.Chosen())

    def on_resize(self) -> None:
        """Keep the cursor on the screen."""
        self.virtual_size = Size(self.size.width, len(self._rows) + 1)
        self.call_after_refresh(self.action_move, 0)  # the scroll range is known only after the refresh

    def on_click(self, event: events.Click) -> None:
        """Move the cursor to the row.  A second click chooses it."""
        place = int(self.scroll_offset.y) + event.y - 1
        if event.y > 0 and place < len(self._rows):
            self._move_to(place)
            self.refresh()
            if event.chain == 2:
                self.action_choose()


_AGE_WIDTH = 5
"""Width of an age of up to 9999 days, so that columns do not move while ages grow."""
