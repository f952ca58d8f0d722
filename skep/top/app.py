"""The application: tables over snapshots, and keys."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.geometry import Size
from textual.widgets import ContentSwitcher, Footer, Input, Static

from skep.cli.output import shortened
from skep.cli.see.status import ServiceLine
from skep.errors import SkepError
from skep.model.task_end import printable
from skep.top.actions import Action, image_of, replicas_of, roll_back, scale, set_availability, update_image
from skep.top.describe import HELP, about_node, tasks_listed
from skep.top.dialogs import Ask, Confirm, Show
from skep.top.logs import ShownLine
from skep.top.rows import COLUMNS, KnownRow, ScreenRow, ScreenView, chosen, log_row, rows_of, task_rows
from skep.top.snapshot import ClusterHealth, LinkStatus, Snapshot, headline, states_of, summary
from skep.top.table import RowTable
from skep.top.watching import WatchedCluster

_SHORT = 16
"""If the screen has fewer lines, it leaves out empty lines and shows the headline and the counts on one line each."""
_TABS_WITH_COUNTS = 72
"""Number of columns from which on the tabs have space for their counts."""
_WRAPPING = 12
"""Columns that stay empty at the end of a wrapped line: the length of a long word."""
_COLORS = {ClusterHealth.HEALTHY: "text-success", ClusterHealth.CONVERGING: "text-warning"}
"""Theme variables of the headline.  Other states are errors."""
_WHEN_EMPTY: Mapping[ScreenView, str] = {
    ScreenView.SERVICES: "No services.  Create one: skep service create --name web nginx",
    ScreenView.TASKS: "No tasks.  Services start them: skep service create --name web nginx",
    ScreenView.NODES: "No nodes.  Create a cluster: skep swarm init",
    ScreenView.EVENTS: "No events since skep top started.  Earlier ones: skep history",
}
LOG_LINES_MAX = 2000
"""Log lines that the view keeps."""
_LOGS_S = 0.2
"""Seconds between two repaints of the logs."""
_LOG_BATCH, _LOG_REST_S = 500, 0.02
"""Number of log lines after which reading pauses, and the pause in seconds."""
_DARK, _LIGHT = "textual-dark", "textual-light"
_ONLY_IN: Mapping[str, tuple[ScreenView, ...]] = {
    "scale": (ScreenView.SERVICES, ScreenView.TASKS),
    "image": (ScreenView.SERVICES, ScreenView.TASKS),
    "roll_back": (ScreenView.SERVICES, ScreenView.TASKS),
    "drain": (ScreenView.NODES,),
    "activate": (ScreenView.NODES,),
    "logs": (ScreenView.SERVICES, ScreenView.TASKS),
    "ended": (ScreenView.TASKS,),
    "order": (ScreenView.SERVICES, ScreenView.TASKS, ScreenView.NODES),
}
"""Keys that only work in some views."""


class TopApp(App[None]):
    """The live cluster.  ``is_light`` selects colors for a light background."""

    ENABLE_COMMAND_PALETTE = False
    TITLE = "skep top"
    CSS = """
    Screen { overflow: hidden; }
    ContentSwitcher { height: 1fr; }
    #title { height: 1; background: $panel; color: $foreground; }
    #name { width: 1fr; text-style: bold; }
    #link { width: auto; }
    #summary, #tabs, #name { text-wrap: nowrap; text-overflow: ellipsis; }
    #health { height: auto; max-height: 2; padding: 0 1; }
    #summary { height: auto; color: $text-muted; }
    #tabs { height: 1; margin-top: 1; link-style: none; link-color: $foreground; }
    #filter { display: none; }
    #filter.shown { display: block; }
    .-no-color #summary, .-no-color RowTable > .table--bad { color: $foreground; }
    .-short #tabs { margin-top: 0; }
    .-short #health { max-height: 1; text-wrap: nowrap; text-overflow: ellipsis; }
    """
    VERTICAL_BREAKPOINTS = [(0, "-short"), (_SHORT, "-tall")]  # noqa: RUF012 - Textual annotates it
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(str(number), f"view('{view.name}')", view.value, show=False)
            for number, view in enumerate(ScreenView, start=1)
        ),
        Binding("tab", "next_view(1)", "Next view", show=False, priority=True),
        Binding("shift+tab", "next_view(-1)", "Previous view", show=False, priority=True),
        Binding("slash", "filter", "Filter", key_display="/"),
        # Before the keys of a view, so that a narrow terminal shows them.
        Binding("question_mark", "help", "Help", key_display="?"),
        Binding("q", "quit", "Quit"),
        Binding("s", "scale", "Scale"),
        Binding("u", "image", "Image"),
        Binding("r", "roll_back", "Roll back"),
        Binding("d", "drain", "Drain"),
        Binding("a", "activate", "Activate"),
        Binding("l", "logs", "Logs"),
        Binding("e", "ended", "Ended"),
        Binding("o", "order", "Order", show=False),
        Binding("t", "light", "Light/dark", show=False),
        Binding("escape", "clear", "Clear", show=False),
        Binding("ctrl+c", "quit", "Quit", show=False, priority=True),
    ]

    def __init__(self, cluster: WatchedCluster, *, is_light: bool = False):
        super().__init__()
        self._cluster = cluster
        self.snapshot = Snapshot()
        self._view = ScreenView.SERVICES
        self._is_stale = False
        self._rows: dict[ScreenView, list[ScreenRow]] = {}
        """Rows of the current snapshot, as far as they were needed."""
        self._task_rows: dict[str, KnownRow] = {}
        self._needle = ""
        self._with_ended = False
        self._by_name = False
        self._lines: deque[ScreenRow] = deque(maxlen=LOG_LINES_MAX)
        self._log_name = ""
        self.theme = _LIGHT if is_light else _DARK

    def compose(self) -> ComposeResult:
        with Horizontal(id="title"):
            yield Static(Text(f" skep top  {printable(self._cluster.name)}"), id="name")
            yield Static("", id="link", markup=False)
        yield Static("", id="health", markup=False)
        yield Static("", id="summary", markup=False)
        yield Static("", id="tabs", markup=False)
        with ContentSwitcher(initial=ScreenView.SERVICES.name):
            for view in ScreenView:
                is_log = view is ScreenView.LOGS
                yield RowTable(COLUMNS[view], empty="", follows_end=is_log, id=view.name)
        yield Input(
            placeholder="Words that rows must contain.  enter: keep   esc: clear", id="filter", compact=True
        )
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Start to follow the cluster."""
        self.screen.set_class(
            self.no_color, "-no-color"
        )  # on terminals without color, gray would hide problems
        self.table.focus()
        self.paint()
        self.screen.set_interval(1.0, self._age)  # timers of the app would outlive the tables
        self.screen.set_interval(_LOGS_S, self._paint_log)
        self.run_worker(self._cluster.run(self.publish), group="cluster")

    def _age(self) -> None:
        self.table.refresh()

    @property
    def table(self) -> RowTable:
        """The table of the current view."""
        return self.screen_stack[0].query_one(f"#{self._view.name}", RowTable)

    def publish(self, snapshot: Snapshot) -> None:
        """Show ``snapshot`` soon.  If several arrive at once, the last one is shown."""
        self.snapshot = snapshot
        self._rows.clear()
        if not self._is_stale:
            self._is_stale = True
            self.call_next(self.paint)

    def paint(self) -> None:
        """Paint the lines at the top, and the table of the current view."""
        self._is_stale = False
        if not self.is_running:  # the last snapshot arrived while the tables were being closed
            return
        snapshot, screen = self.snapshot, self.screen_stack[0]
        screen.query_one("#link", Static).update(_link(snapshot))
        services = states_of(snapshot, time.time())
        screen.query_one("#health", Static).update(self._health(services))
        screen.query_one("#summary", Static).update(_summary(snapshot, services, self.size))
        screen.query_one("#tabs", Static).update(self._tabs())
        self._paint_table()

    def _paint_table(self) -> None:
        if self._view is ScreenView.LOGS:
            self._paint_log()
            return
        table = self.table
        table.say_when_empty(self._when_empty())
        if self._view not in self._rows:
            self._rows[self._view] = (
                task_rows(self.snapshot, self._task_rows, with_ended=self._with_ended)
                if self._view is ScreenView.TASKS
                else rows_of(self._view, self.snapshot, time.time())
            )
        table.show(chosen(self._rows[self._view], self._needle, by_name=self._by_name))

    def _paint_log(self) -> None:
        if self._view is ScreenView.LOGS:
            table = self.table
            table.say_when_empty(
                "No lines yet."
                if self._log_name
                else "Select a service or a task and press l to follow its logs."
            )
            table.show(chosen(self._lines, self._needle))

    def _when_empty(self) -> str:
        if self._needle:
            return f"No row contains {printable(self._needle)!r}.  Press esc to clear the filter."
        if not self.snapshot.is_loaded:
            return "Loading..."
        return _WHEN_EMPTY.get(self._view, "")

    def _tabs(self) -> Text:
        counts = {
            ScreenView.SERVICES: len(self.snapshot.services),
            ScreenView.TASKS: sum(task.is_active for task in self.snapshot.tasks.values()),
            ScreenView.NODES: len(self.snapshot.nodes),
        }
        text = Text()
        has_counts = self.size.width >= _TABS_WITH_COUNTS
        for number, view in enumerate(ScreenView, start=1):
            count = f" ({counts[view]})" if counts.get(view) and has_counts else ""
            style = "reverse bold" if view is self._view else ""
            label = f" {number} {view.value}{count} "
            text.append(label, style=style)
            text.apply_meta({"@click": f"app.view('{view.name}')"}, len(text) - len(label), len(text))
        if self._view is ScreenView.LOGS and self._log_name:
            text.append(f"  of {printable(self._log_name)}")
        elif self._needle:
            text.append(f"  filter {printable(self._needle)!r}")
        return text

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Hide and disable keys of other views."""
        return action not in _ONLY_IN or self._view in _ONLY_IN[action]

    def action_view(self, name: str) -> None:
        """Switch to another table."""
        self._view = ScreenView[name]
        self.screen_stack[0].query_one(ContentSwitcher).current = name
        self.table.focus()
        self.refresh_bindings()
        self.paint()

    def action_next_view(self, by: int) -> None:
        """Switch to the next table, or in a dialog to the next field."""
        if len(self.screen_stack) > 1:
            self.screen.focus_next() if by > 0 else self.screen.focus_previous()
            return
        views = list(ScreenView)
        self.action_view(views[(views.index(self._view) + by) % len(views)].name)

    def action_filter(self) -> None:
        """Open the filter."""
        field = self.query_one("#filter", Input)
        field.add_class("shown")
        field.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter while typing."""
        if event.input.id == "filter":
            self._needle = event.value
            self.paint()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Keep the filter, and return to the table."""
        if event.input.id == "filter":
            if not self._needle:
                event.input.remove_class("shown")
            self.table.focus()

    def action_clear(self) -> None:
        """Clear the filter."""
        field = self.query_one("#filter", Input)
        field.remove_class("shown")
        field.value = self._needle = ""
        self.table.focus()
        self.paint()

    def action_ended(self) -> None:
        """Show or hide ended tasks."""
        self._with_ended = not self._with_ended
        self._rows.pop(ScreenView.TASKS, None)
        self.paint()

    def action_order(self) -> None:
        """Switch between the order by name and problems first."""
        self._by_name = not self._by_name
        self.notify("Sorted by name." if self._by_name else "Problems first.", timeout=2)
        self.paint()

    def action_light(self) -> None:
        """Switch the theme."""
        self.theme = _DARK if self.theme == _LIGHT else _LIGHT

    def action_help(self) -> None:
        """Show the keys."""
        self.push_screen(Show("Keys", _help))

    def on_row_table_chosen(self) -> None:
        """Explain the state of the object under the cursor."""
        snapshot, key = self.snapshot, self.table.key
        if self._view is ScreenView.NODES and (node := snapshot.nodes.get(key)):
            lines = about_node(snapshot, node)

            async def known() -> list[str]:
                return lines

            self.push_screen(Show(snapshot.node_name(key), known))
        elif self._view is ScreenView.SERVICES and key in snapshot.services:
            name = snapshot.service_name(key)

            async def service() -> list[str]:
                return [
                    *await self._cluster.details("service", key, name),
                    *tasks_listed(self.snapshot, key),
                ]

            self.push_screen(Show(name, service))
        elif self._view is ScreenView.TASKS and (task := snapshot.tasks.get(key)):
            name = snapshot.task_name(task)
            self.push_screen(Show(name, lambda: self._cluster.details("task", key, name)))
        elif self._view in (ScreenView.EVENTS, ScreenView.LOGS) and (row := self._row(key)):

            async def cells() -> list[str]:
                titles = (column.title for column in COLUMNS[self._view])
                return [f"{title}: {cell}" for title, cell in zip(titles, row.cells, strict=True) if cell]

            self.push_screen(Show(self._view.value[:-1], cells))

    def _row(self, key: str) -> ScreenRow | None:
        rows = self._lines if self._view is ScreenView.LOGS else self._rows.get(self._view, [])
        return next((row for row in rows if row.key == key), None)

    def _service(self) -> Mapping[str, Any] | None:
        """Return the service under the cursor, or the service of the task there."""
        key = self.table.key
        if self._view is ScreenView.TASKS and (task := self.snapshot.tasks.get(key)):
            key = task.service_id
        return self.snapshot.services.get(key)

    def action_scale(self) -> None:
        """Ask for another number of replicas."""
        if service := self._service():
            name = service["Spec"]["Name"]
            try:
                now = replicas_of(service)
            except SkepError as error:
                self._complain(error)
                return
            self._ask(
                f"Scale {name}",
                str(now),
                "Number of replicas, +N or -N.",
                lambda typed: scale(service, typed),
            )

    def action_image(self) -> None:
        """Ask for another image."""
        if service := self._service():
            title = f"Set the image of {service['Spec']['Name']}"
            hint = "The same image replaces all tasks."
            self._ask(title, image_of(service), hint, lambda typed: update_image(service, typed))

    def action_roll_back(self) -> None:
        """Propose the previous spec."""
        if service := self._service():
            self._propose(lambda: roll_back(service))

    def action_drain(self) -> None:
        """Propose to drain the node."""
        self._set_availability("drain")

    def action_activate(self) -> None:
        """Propose to activate the node."""
        self._set_availability("active")

    def _set_availability(self, word: str) -> None:
        if node := self.snapshot.nodes.get(self.table.key):
            self._propose(lambda: set_availability(self.snapshot, node, word))

    def on_resize(self) -> None:
        """Fit the lines at the top to the new width."""
        self.call_after_refresh(self.paint)

    def _health(self, services: Sequence[ServiceLine]) -> Text:
        """Return the headline: the health in its color, and the reason."""
        snapshot, connection = self.snapshot, self.snapshot.connection
        colors = self.theme_variables
        if connection.link is LinkStatus.LOST:
            seen = " The screen shows the last known state." if snapshot.is_loaded else ""
            words = f"{connection.reason}.{seen} Next attempt in {connection.retry_s:.0f} s."
            return Text.assemble(("Not connected", f"bold {colors['text-error']}"), "  ", printable(words))
        if not snapshot.is_loaded:
            return Text("")
        health, reason = headline(snapshot, services)
        style = f"bold {colors[_COLORS.get(health, 'text-error')]}"
        return Text.assemble((health.value, style), "  ", shortened(printable(reason), self._headline_room()))

    def _headline_room(self) -> int:
        """Return how many characters the reason of the headline may have, less some that wrapping leaves empty."""
        lines = 1 if self.size.height < _SHORT else 2
        return max(
            lines * (self.size.width - 2) - (lines - 1) * _WRAPPING - len(ClusterHealth.CONVERGING.value) - 2,
            10,
        )

    @work(group="action", exclusive=True)
    async def _ask(self, title: str, value: str, hint: str, build: Callable[[str], Action]) -> None:
        if action := await self.push_screen_wait(Ask(title, value, hint, build)):
            await self._confirm(action)

    @work(group="action", exclusive=True)
    async def _propose(self, build: Callable[[], Action]) -> None:
        try:
            action = build()
        except SkepError as error:
            self._complain(error)
        else:
            await self._confirm(action)

    async def _confirm(self, action: Action) -> None:
        """Describe an action, ask for confirmation, and perform it."""
        if not await self.push_screen_wait(Confirm(action)):
            return
        try:
            await self._cluster.perform(action)
        except (SkepError, OSError) as error:
            self._complain(error)
        else:
            self.notify(printable(action.done), markup=False)

    def _complain(self, error: Exception) -> None:
        self.notify(printable(str(error)), severity="error", markup=False, timeout=10)

    def action_logs(self) -> None:
        """Follow the logs of the service or task under the cursor."""
        key, snapshot = self.table.key, self.snapshot
        if self._view is ScreenView.SERVICES and key in snapshot.services:
            kind, self._log_name = "service", snapshot.service_name(key)
        elif self._view is ScreenView.TASKS and (task := snapshot.tasks.get(key)):
            kind, self._log_name = "task", snapshot.task_name(task)
        else:
            return
        self._lines.clear()
        self.run_worker(self._follow_log(kind, key), group="log", exclusive=True)
        self.action_view(ScreenView.LOGS.name)

    async def _follow_log(self, kind: str, id: str) -> None:
        number = 0
        try:
            async for line in self._cluster.logs(kind, id):
                number += 1
                self._lines.append(log_row(self.snapshot, number, line))
                if number % _LOG_BATCH == 0:
                    await asyncio.sleep(
                        _LOG_REST_S
                    )  # a flood of lines waits on its node and does not delay the keys
        except (SkepError, OSError) as error:
            self._lines.append(log_row(self.snapshot, number + 1, ShownLine(str(error))))


async def _help() -> list[str]:
    return list(HELP)


def _link(snapshot: Snapshot) -> Text:
    link = snapshot.connection.link
    text = {
        LinkStatus.CONNECTING: "connecting ",
        LinkStatus.LIVE: "live ",
        LinkStatus.LOST: "NOT CONNECTED ",
    }[link]
    return Text(text, style="" if link is LinkStatus.LIVE else "bold")


def _summary(snapshot: Snapshot, services: Sequence[ServiceLine], size: Size) -> Text:
    """Return the counts on one line, or on two if they do not fit and the screen of ``size`` is not short.

    Counts that still do not fit are left out.
    """
    parts = summary(snapshot, services) if snapshot.is_loaded else ()
    lines = [Text()]
    for noun, words in parts:
        part = Text.assemble(" ", (f"{noun} ", "bold"), printable(words))
        if lines[-1] and lines[-1].cell_len + 1 + part.cell_len > size.width:
            if len(lines) > 1 or size.height < _SHORT:
                break
            lines.append(Text())
        lines[-1].append_text(Text.assemble(" ", part) if lines[-1] else part)
    return Text("\n").join(lines)
