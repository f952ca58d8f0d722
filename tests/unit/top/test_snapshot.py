"""What ``skep top`` makes of a cluster's objects and events."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from skep.api.responses import OutputStream
from skep.top.logs import LogLine, line_of
from skep.top.rows import COLUMNS, KnownRow, Tone, View, age_of, chosen, laid_out, rows_of, task_rows
from skep.top.snapshot import Touched, headlines, summary, touched_by
from skep.top.watching import tasks_in
from tests.support.top_clusters import a_node, a_service, a_shop, a_snapshot, a_task


def test_a_tasks_event_has_its_service_read_again_too() -> None:
    attributes = {"com.docker.swarm.service.id": "s1"}
    event = {"Type": "task", "Action": "die", "Actor": {"ID": "t1", "Attributes": attributes}}
    assert touched_by(event) == Touched(services=frozenset({"s1"}), tasks=frozenset({"t1"}))
    assert touched_by({"Type": "node", "Actor": {"ID": "n1"}}) == Touched(nodes=frozenset({"n1"}))
    assert not touched_by({"Type": "secret", "Actor": {"ID": "x"}})


def test_what_happens_before_a_task_runs_has_no_event_so_it_is_not_settled() -> None:
    states = {
        state: a_task("web", 1, state=state).is_settled
        for state in ("pending", "preparing", "running", "failed")
    }
    assert states == {"pending": False, "preparing": False, "running": True, "failed": True}
    assert not a_task("web", 1, desired="shutdown").is_settled


def test_the_headlines_are_those_of_status_the_nodes_first() -> None:
    assert [text for _, text in headlines(a_shop())] == [
        "w2 is down: heartbeat failure",
        'orders: exit 3, last line "panic: no database at db:5432"; crash loop, 4 failures in a row',
        "report: no suitable node (insufficient resources on 2 nodes)",
    ]
    assert dict(summary(a_shop())) == {
        "nodes": "1 down, 2 ready",
        "services": "2 of 5 as wanted",
        "tasks": "9 run, 1 start, 3 wait",
    }


def test_what_is_wrong_comes_first_or_rows_come_by_name() -> None:
    rows = rows_of(View.SERVICES, a_shop())
    assert [row.cells[0] for row in chosen(rows, "")] == ["orders", "report", "api", "agent", "web"]
    assert [row.cells[0] for row in chosen(rows, "", by_name=True)] == [
        "agent",
        "api",
        "orders",
        "report",
        "web",
    ]


def test_a_filter_wants_every_word_in_any_cell() -> None:
    rows = rows_of(View.TASKS, a_shop())
    assert [row.cells[0] for row in chosen(rows, "W1 web")] == ["web.2"]
    assert chosen(rows, "web nowhere") == []


def test_ended_tasks_are_shown_when_they_should_not_have_ended() -> None:
    tasks = (
        a_task("job", 1, state="complete", desired="complete"),
        a_task("web", 1, state="shutdown", desired="shutdown"),
        a_task("web", 2, state="failed", desired="shutdown"),
        a_task("once", 1, state="failed"),
    )
    snapshot = a_snapshot(services=(a_service("once"),), tasks=tasks)
    assert [row.cells[:2] for row in rows_of(View.TASKS, snapshot)] == [("once.1", "failed")]
    assert len(rows_of(View.TASKS, snapshot, with_ended=True)) == 4


def test_the_row_of_a_task_is_made_again_when_the_task_or_a_name_of_it_changes() -> None:
    first, second = a_task("web", 1, "m1"), a_task("web", 2, "m1")
    node, web = a_node("m1"), a_service("web")
    known: dict[str, KnownRow] = {}
    before = task_rows(a_snapshot((node,), (web,), (first, second)), known)
    failed = a_task("web", 2, "m1", state="failed")
    after = task_rows(a_snapshot((node,), (web,), (first, failed)), known)
    assert after[0] is before[0]
    assert [row.cells[1] for row in after] == ["running", "failed"]
    renamed = {**node, "Description": {**node["Description"], "Hostname": "m9"}}
    assert task_rows(a_snapshot((renamed,), (web,), (first,)), known)[0].cells[3] == "m9"
    assert set(known) == {first.id}


def test_a_task_of_a_global_service_has_the_name_of_its_node() -> None:
    snapshot = a_snapshot(
        (a_node("m1"),), (a_service("agent", mode={"Global": {}}),), (a_task("agent", 0, "m1"),)
    )
    assert rows_of(View.TASKS, snapshot)[0].cells[0] == "agent.m1"


def test_a_node_that_is_drained_or_has_a_message_says_so() -> None:
    nodes = (a_node("a"), a_node("b", availability="drain"), a_node("c", state="down"))
    tones = {row.cells[0]: row.tone for row in rows_of(View.NODES, a_snapshot(nodes))}
    assert tones == {"a": Tone.GOOD, "b": Tone.WARNING, "c": Tone.BAD}


def test_a_task_that_cannot_be_read_is_left_out_of_the_list() -> None:
    body = msgspec.json.encode([{"ID": "t1", "Slot": "three"}, {"ID": "t2", "Slot": 3, "Unknown": {}}])
    assert list(tasks_in(body)) == ["t2"]


def test_narrow_screens_leave_out_the_columns_of_the_highest_rank() -> None:
    columns = COLUMNS[View.SERVICES]
    naturals = [20, 5, 10, 30, 10, 60]
    assert laid_out(columns, naturals, 200) == [20, 5, 10, 30, 10, 115]
    assert laid_out(columns, naturals, 80) == [20, 5, 0, 0, 0, 51]


@given(st.lists(st.integers(0, 300), min_size=6, max_size=6), st.integers(1, 300))
def test_no_row_is_wider_than_a_screen_that_has_room_for_its_first_columns(
    naturals: list[int], width: int
) -> None:
    widths = laid_out(COLUMNS[View.SERVICES], naturals, width)
    assert sum(one + 2 for one in widths[:-1] if one) + widths[-1] <= max(width, 32 + 11 + 4)


def test_ages_are_the_largest_unit() -> None:
    begun = 1_767_323_045.0  # 2026-01-02T03:04:05Z
    ages = [age_of("2026-01-02T03:04:05Z", begun + later) for later in (-5, 59, 60, 7200, 200_000)]
    assert ages == ["0s", "59s", "1m", "2h", "2d"]
    assert age_of("yesterday", begun) == ""


def test_a_line_of_a_log_is_its_time_its_task_and_its_text() -> None:
    details = "com.docker.swarm.node.id=n,com.docker.swarm.service.id=s,com.docker.swarm.task.id=t1"
    text = f"2026-01-02T03:04:05.000000000Z {details} \x1b[31mred\x1b[0m alert"
    assert line_of(text, OutputStream.STDOUT) == LogLine("red alert", "t1", "2026-01-02T03:04:05.000000000Z")
    assert line_of("no details", OutputStream.STDERR) == LogLine("no details", is_error=True)
    assert line_of("Error grabbing logs: gone", OutputStream.SYSTEM).is_error
