"""Dialogs of ``skep top``.  All texts are plain, without markup."""

from collections.abc import Awaitable, Callable, Iterable
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Static

from skep.errors import SkepError
from skep.model.task_end import printable
from skep.top.actions import Action

_CSS = """
    align: center middle;
    & > Vertical { width: 76; max-width: 96%; height: auto; max-height: 90%; padding: 0 1; }
    & > Vertical { border: round $primary; background: $surface; }
    & .title { text-style: bold; margin-bottom: 1; }
    & .error { color: $text-error; }
    & .hint { color: $text-muted; margin-top: 1; }
    & VerticalScroll { height: auto; max-height: 100%; }
    & Horizontal { height: 1; margin-top: 1; }
    & Button { margin-right: 2; }
"""
_SCROLLS = """
    & VerticalScroll { margin-bottom: 1; }
    & .foot { dock: bottom; height: auto; }
"""
"""The last lines keep their place below a text that is longer than the dialog."""


def plain(lines: Iterable[str]) -> Text:
    """Return lines without terminal control sequences."""
    return Text("\n".join(map(printable, lines)))


class Ask(ModalScreen[Action | None]):
    """Asks for a value.  ``build`` returns its action, or raises an error, which is shown before the next try."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss", "Cancel")]
    DEFAULT_CSS = f"Ask {{ {_CSS} }}"

    def __init__(self, title: str, value: str, hint: str, build: Callable[[str], Action]):
        super().__init__()
        self._title = title
        self._value = value
        self._hint = hint
        self._build = build

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Static(plain([self._title]), classes="title")
            yield Input(printable(self._value), compact=True)
            yield Static("", classes="error", markup=False)
            yield Static(Text(f"{self._hint}   enter: continue   esc: cancel"), classes="hint")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Close the dialog with an action if the value is valid."""
        try:
            self.dismiss(self._build(event.value))
        except SkepError as error:
            self.query_one(".error", Static).update(plain([str(error)]))

    async def action_dismiss(self, result: Action | None = None) -> None:
        """Cancel."""
        self.dismiss(None)


class Confirm(ModalScreen[bool]):
    """Describes an action and asks for confirmation.  "No" is selected first, so a stray Enter does nothing."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes"),
        Binding("n,escape", "answer(False)", "No"),
        Binding("left,right", "app.focus_next", "Other", show=False),
    ]
    DEFAULT_CSS = f"Confirm {{ {_CSS} {_SCROLLS} }}"

    def __init__(self, action: Action):
        super().__init__()
        self._action = action

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Static(plain([self._action.title]), classes="title")
            with VerticalScroll(can_focus=False):
                yield Static(plain(self._action.consequences))
            with Vertical(classes="foot"):
                with Horizontal():
                    yield Button("No", id="no", compact=True)
                    yield Button("Yes", id="yes", variant="warning", compact=True)
                yield Static("y: yes   n, esc: no", classes="hint")

    def on_mount(self) -> None:
        """Select "No"."""
        self.query_one("#no").focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Answer by mouse or Enter."""
        self.dismiss(event.button.id == "yes")

    def action_answer(self, yes: bool) -> None:
        """Answer by key."""
        self.dismiss(yes)


class Show(ModalScreen[None]):
    """Shows a text that is fetched when the dialog opens."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,enter,q", "close", "Close")]
    DEFAULT_CSS = f"Show {{ {_CSS} {_SCROLLS} }}"

    def __init__(self, title: str, ask: Callable[[], Awaitable[list[str]]]):
        super().__init__()
        self._title = title
        self._ask = ask

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Static(plain([self._title]), classes="title")
            with VerticalScroll():
                yield Static("Loading...", id="text", markup=False)
            yield Static("esc: close", classes="hint foot")

    def on_mount(self) -> None:
        """Start to fetch the text."""
        self.run_worker(self._fill(), exclusive=True)

    async def _fill(self) -> None:
        try:
            lines = await self._ask()
        except (SkepError, OSError) as error:
            lines = [f"The details could not be loaded: {error}"]
        self.query_one("#text", Static).update(plain(lines))

    def action_close(self) -> None:
        """Return to the table."""
        self.dismiss(None)
