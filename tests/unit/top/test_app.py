"""``skep top`` driven by its keys, on snapshots."""

import asyncio
import re
import time
from contextlib import suppress
from typing import Any

import pytest
from textual.css.query import NoMatches
from textual.pilot import Pilot
from textual.screen import Screen
from textual.widgets import Input, Static

from skep.errors import FailedPrecondition
from skep.top.actions import Action
from skep.top.app import TopApp
from skep.top.dialogs import Ask, Confirm, Show
from skep.top.logs import ShownLine
from skep.top.snapshot import Connection, LinkStatus
from skep.top.table import RowTable
from tests.support.clients.top_clusters import (
    StillCluster,
    a_health,
    a_node,
    a_service,
    a_shop,
    a_snapshot,
    a_task,
)
from tests.support.clients.top_screen import PICTURE, picture

HOSTILE = "[red]x[/red]\x1b]0;owned\x07\u202e[@click=app.quit]go[/]"


def screen_of(app: TopApp) -> str:
    """All characters on the screen."""
    return "\n".join(
        "".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips()
    )


async def settled(pilot: Pilot[None]) -> str:
    """The screen once everything is composed and painted: on a busy machine that takes several turns."""
    await pilot.app.workers.wait_for_complete([w for w in pilot.app.workers if w.group == "cluster"])
    assert isinstance(pilot.app, TopApp)
    before = None
    async with asyncio.timeout(10):
        while True:
            await pilot.pause()
            with suppress(NoMatches):
                text = screen_of(pilot.app)
                if text == before:
                    return text
                before = text


async def shown(pilot: Pilot[None], words: str) -> None:
    """Wait until the screen has these words.  Keys that follow are then for what they describe."""
    assert isinstance(pilot.app, TopApp)
    async with asyncio.timeout(10):
        while True:
            with suppress(NoMatches):
                if words in screen_of(pilot.app):
                    return
            await pilot.pause()


async def opened(pilot: Pilot[None], dialog: type[Screen[Any]]) -> None:
    """Wait until a dialog has the focus: keys before that are for the table below it."""
    async with asyncio.timeout(10):
        while not isinstance(pilot.app.screen, dialog) or pilot.app.screen.focused is None:
            await pilot.pause()


async def answered(pilot: Pilot[None]) -> str:
    """The screen after what was confirmed is done."""
    await pilot.app.workers.wait_for_complete([w for w in pilot.app.workers if w.group == "action"])
    await pilot.pause()
    await pilot.pause()
    assert isinstance(pilot.app, TopApp)
    return screen_of(pilot.app)


async def test_the_first_screen_says_what_is_wrong_and_why() -> None:
    app = TopApp(StillCluster(a_shop()))
    async with app.run_test(size=(120, 30)) as pilot:
        text = await settled(pilot)
        assert " 1 Services (5)  2 Tasks (13)  3 Nodes (3)  4 Events  5 Logs" in text
        assert (
            "Degraded  Node w2 is down: heartbeat failure. 2 services are degraded (orders, report)." in text
        )
        assert 'exit 3, last line "panic: no database' in text
        assert "2/5 healthy" in text
        assert text.index("orders ") < text.index("web ")


async def test_scaling_asks_says_what_it_would_do_and_does_it() -> None:
    cluster = StillCluster(a_shop())
    app = TopApp(cluster)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settled(pilot)
        await pilot.press("end", "s")
        await opened(pilot, Ask)
        await pilot.press("backspace", "x", "enter")
        await shown(pilot, "Enter a number of replicas, +N or -N.")
        await pilot.press("backspace", "5", "enter")
        await opened(pilot, Confirm)
        await shown(pilot, "Starts 2 more tasks.")
        assert cluster.performed == []
        await pilot.press("y")
        await answered(pilot)
        (action,) = cluster.performed
        assert (action.id, action.title) == ("id-web", "Scale web from 3 to 5 replicas?")
        await shown(pilot, "web scaled to 5")


async def test_nothing_is_painted_once_the_tables_are_closed() -> None:
    class Closing(TopApp):
        async def _close_all(self) -> None:
            await super()._close_all()
            self.publish(a_shop())
            await asyncio.sleep(1.2)  # longer than the timer that renews the ages

    app = Closing(StillCluster(a_shop()))
    async with app.run_test(size=(80, 24)) as pilot:
        await settled(pilot)
    app.paint()


@pytest.mark.parametrize("key", ["enter", "n", "escape"])
async def test_a_stray_key_confirms_nothing(key: str) -> None:
    cluster = StillCluster(a_shop())
    app = TopApp(cluster)
    async with app.run_test(size=(80, 24)) as pilot:
        await settled(pilot)
        await pilot.press("3", "down", "d")
        await opened(pilot, Confirm)
        await shown(pilot, "Drain m1?")
        await pilot.press(key)
        async with asyncio.timeout(10):
            while isinstance(app.screen, Confirm):
                await pilot.pause()
        assert cluster.performed == []


async def test_what_the_cluster_refuses_is_said() -> None:
    cluster = StillCluster(a_shop())
    cluster.error = FailedPrecondition(f"no [b]way[/b] {HOSTILE}")
    app = TopApp(cluster)
    async with app.run_test(size=(100, 24), notifications=True) as pilot:
        await settled(pilot)
        await pilot.press("3", "end", "d")
        await opened(pilot, Confirm)
        await pilot.press("y")
        await answered(pilot)
        await shown(pilot, "no [b]way[/b]")
        text = screen_of(app)
        assert "[red]x[/red]]0;owned[@click=app.quit]go[/]" in text


async def test_a_service_without_a_previous_spec_is_not_rolled_back() -> None:
    app = TopApp(StillCluster(a_shop()))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settled(pilot)
        await pilot.press("end", "r")
        await shown(pilot, "service web does not have a previous")


async def test_the_filter_narrows_every_view_and_escape_clears_it() -> None:
    app = TopApp(StillCluster(a_shop()))
    async with app.run_test(size=(80, 24)) as pilot:
        await settled(pilot)
        await pilot.press("2", "slash", *"web", "enter")
        text = await settled(pilot)
        assert "web.3" in text
        assert "api.1" not in text
        await pilot.press("escape")
        await shown(pilot, "api.1")
        assert not app.query_one("#filter", Input).has_class("shown")


async def test_names_logs_and_errors_are_never_markup_nor_control_characters() -> None:
    snapshot = a_snapshot(
        (a_node(f"n{HOSTILE}", message=HOSTILE, state="down"),),
        (a_service(f"s{HOSTILE}", 0, 1, image=HOSTILE, health=a_health("degraded", HOSTILE)),),
        (a_task(f"s{HOSTILE}", 1, f"n{HOSTILE}", state="pending", err=HOSTILE),),
        events=(
            {"Type": HOSTILE, "Action": HOSTILE, "Actor": {"ID": HOSTILE, "Attributes": {HOSTILE: HOSTILE}}},
        ),
    )
    app = TopApp(StillCluster(snapshot, (ShownLine(HOSTILE, "t"),)))
    async with app.run_test(size=(200, 30)) as pilot:
        await settled(pilot)
        for keys in ("1", "2", "3", "4", "s", "escape", "u", "enter", "escape", "1", "l"):
            await pilot.press(keys)
            await pilot.pause()
            if keys in "1234":
                await pilot.press("enter")
                await pilot.pause()
                await pilot.press("escape")
            text = screen_of(app)
            assert "[red]x[/red]" in text, keys
            assert "\x1b" not in text
            assert "\x07" not in text
            assert "\u202e" not in text
        assert app.is_running


@pytest.mark.parametrize("size", [(80, 24), (120, 30), (200, 50), (60, 12), (40, 10)])
async def test_the_screen_fits_terminals_of_any_size(size: tuple[int, int]) -> None:
    """The state, the worst service and the first keys are always there."""
    app = TopApp(StillCluster(a_shop()))
    async with app.run_test(size=size) as pilot:
        text = await settled(pilot)
        assert "Degraded  Node w2 is down" in text
        assert "2/5 healthy" in text
        # Two lines of counts, if the screen is not short.
        assert ("Reserved 1.5/8 CPUs, 3.2/16 GiB" in text) == (size[0] >= 80)
        assert re.search("orders +0/1 .*exit 3", text)
        assert "enter Explain" in text
        shown = [column for column in ("RESERVED", "IMAGE", "PORTS", "MODE") if column in text]
        assert shown == {120: ["RESERVED"], 200: ["RESERVED", "IMAGE", "PORTS", "MODE"]}.get(size[0], [])


@pytest.mark.parametrize(
    ("key", "command"), [("1", "skep service create"), ("2", "skep service create"), ("4", "skep history")]
)
async def test_an_empty_view_shows_a_command(key: str, command: str) -> None:
    app = TopApp(StillCluster(a_snapshot((a_node("m1"),))))
    async with app.run_test(size=(80, 24)) as pilot:
        await settled(pilot)
        await pilot.press(key)
        text = screen_of(app)
        assert command in text
        assert "…" not in text


async def test_a_lost_connection_is_said_and_what_was_seen_stays() -> None:
    lost = Connection(LinkStatus.LOST, "connection refused", 4.0)
    app = TopApp(StillCluster(a_shop()))
    async with app.run_test(size=(80, 24)) as pilot:
        await settled(pilot)
        app.publish(a_snapshot(services=(a_service("web"),), connection=lost))
        await pilot.pause()
        text = screen_of(app)
        assert "NOT CONNECTED" in text
        words = (
            "Not connected connection refused. The screen shows the last known state. Next attempt in 4 s."
        )
        assert words in " ".join(text.split())
        assert "web" in text


async def test_the_cursor_stays_on_its_row_while_others_come_and_go() -> None:
    app = TopApp(StillCluster(a_snapshot(services=tuple(map(a_service, "bdf")))))
    async with app.run_test(size=(80, 24)) as pilot:
        await settled(pilot)
        await pilot.press("down")
        assert app.table.key == "id-d"
        app.publish(a_snapshot(services=tuple(map(a_service, "abcdef"))))
        await pilot.pause()
        assert app.table.key == "id-d"
        app.publish(a_snapshot())
        await pilot.pause()
        assert app.table.key == ""


async def test_logs_are_bounded_and_followed_to_their_end() -> None:
    lines = tuple(
        ShownLine(f"line {number}", "id-web-1-m1", "2026-01-02T03:04:05.1Z") for number in range(5000)
    )
    app = TopApp(StillCluster(a_shop(), lines))
    async with app.run_test(size=(80, 24)) as pilot:
        await settled(pilot)
        await pilot.press("end", "l")
        await app.workers.wait_for_complete([w for w in app.workers if w.group == "log"])
        while "line 4999" not in (text := screen_of(app)):  # until the test's deadline
            await pilot.pause()
        assert "of web" in text
        assert "web.1" in text
        await pilot.press("home")
        assert "line 3000" in screen_of(app)


async def test_the_themes_and_no_color_show_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = set()
    for is_light, no_color in ((False, False), (True, False), (False, True)):
        if no_color:
            monkeypatch.setenv("NO_COLOR", "1")
        app = TopApp(StillCluster(a_shop()), is_light=is_light)
        async with app.run_test(size=(80, 24)) as pilot:
            texts.add(await settled(pilot))
            assert app.no_color is no_color
    assert len(texts) == 1


def test_every_key_does_something_and_every_action_has_a_key() -> None:
    for kind in (TopApp, RowTable, Ask, Confirm, Show):
        bound = {one.action.partition("(")[0] for one in kind.BINDINGS} - {"quit", "app.focus_next"}
        assert bound == {name.removeprefix("action_") for name in vars(kind) if name.startswith("action_")}


async def test_the_help_names_every_key() -> None:
    app = TopApp(StillCluster(a_shop()))
    async with app.run_test(size=(80, 24)) as pilot:
        await settled(pilot)
        await pilot.press("question_mark")
        await pilot.pause()
        text = str(app.screen.query_one("#text", Static).render())
        for key in ("/", "o", "e", "l", "t", "s", "u", "r", "d, a"):
            assert f"\n{key} " in text


async def test_a_text_longer_than_the_screen_scrolls_above_its_hint() -> None:
    app = TopApp(StillCluster(a_shop()))
    async with app.run_test(size=(80, 24)) as pilot:
        await settled(pilot)
        await pilot.press("question_mark")
        await shown(pilot, "esc: close")
        assert "RESERVED is what" not in screen_of(app)
        await pilot.press("end")
        await shown(pilot, "RESERVED is what tasks reserve, and on nodes also the total.")
        assert "esc: close" in screen_of(app)


async def test_long_effects_leave_the_answers_on_the_screen() -> None:
    app = TopApp(StillCluster(a_shop()))
    effects = tuple(f"effect {number}" for number in range(40))
    async with app.run_test(size=(80, 16)) as pilot:
        await settled(pilot)
        app.push_screen(Confirm(Action("service", "id-web", "Roll web back?", effects, "", lambda _: None)))
        await shown(pilot, "effect 5")
        await shown(pilot, "y: yes   n, esc: no")
        assert "effect 39" not in screen_of(app)


async def test_five_hundred_nodes_and_ten_thousand_tasks_are_painted_as_few_are() -> None:
    """As many lines are painted as the screen has, however many rows there are."""
    nodes = tuple(a_node(f"n{number}") for number in range(500))
    services = tuple(a_service(f"s{number}", 100, 100) for number in range(100))
    tasks = tuple(a_task(f"s{n % 100}", n // 100 + 1, f"n{n % 500}") for n in range(10_000))
    app = TopApp(StillCluster(a_snapshot(nodes, services, tasks)))
    async with app.run_test(size=(120, 40)) as pilot:
        await settled(pilot)
        await pilot.press("2")
        table, painted = app.table, 0
        paint = table.render_line

        def counted(y: int):  # type: ignore[no-untyped-def]
            nonlocal painted
            painted += 1
            return paint(y)

        table.render_line = counted  # type: ignore[method-assign]
        begun = time.process_time()
        for _ in range(10):
            app.publish(app.snapshot)
            await pilot.press("pagedown")
        print(f"{(time.process_time() - begun) / 10:.3f} s of processor for a new snapshot and a page")
        assert table.virtual_size.height == 10_001
        assert 0 < painted <= 3 * 10 * table.size.height


async def test_the_picture_in_the_guide_is_the_present_screen() -> None:
    assert PICTURE.read_text() == await picture(), "python -m tests.support.clients.top_screen writes it"
