"""What ``skep top`` makes of a cluster's objects and events."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from skep.api.http.responses import OutputStream
from skep.top.describe import tasks_listed
from skep.top.logs import ShownLine, line_of
from skep.top.rows import COLUMNS, KnownRow, ScreenView, Tone, age_of, chosen, laid_out, rows_of, task_rows
from skep.top.snapshot import ClusterHealth, Snapshot, Touched, headline, states_of, summary, touched_by
from skep.top.watching import tasks_in
from tests.support.clients.top_clusters import a_health, a_node, a_service, a_shop, a_snapshot, a_task


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


NOW = 1_767_326_645.0


def health(snapshot: Snapshot) -> tuple[ClusterHealth, str]:
    return headline(snapshot, states_of(snapshot, NOW))


def test_the_headline_names_the_worst_first_and_why() -> None:
    assert health(a_shop()) == (
        ClusterHealth.DEGRADED,
        "Node w2 is down: heartbeat failure. 2 services are degraded (orders, report). Service api is converging.",
    )
    crash = a_health("degraded", "exit 3") | {"RestartSummary": "crash loop, 4 failures in a row"}
    shop = a_snapshot((a_node("m1"),), (a_service("orders", 0, 1, health=crash),))
    assert health(shop) == (
        ClusterHealth.DEGRADED,
        "Service orders is degraded: exit 3; crash loop, 4 failures in a row.",
    )


def test_a_cluster_with_all_it_should_have_is_healthy_even_with_a_warning() -> None:
    nodes = (a_node("m1"), a_node("w1", message="disk pressure"))
    assert health(a_snapshot(nodes[:1])) == (
        ClusterHealth.HEALTHY,
        "All nodes and services are in their desired state.",
    )
    assert health(a_snapshot(nodes)) == (
        ClusterHealth.HEALTHY,
        "Node w1 is ready with a warning: disk pressure.",
    )


def test_a_service_that_only_starts_or_updates_is_converging() -> None:
    starting = a_health("converging", "m1 starts it", weight=4)
    begun = a_snapshot(services=(a_service("web", 0, 1, health=starting),))
    assert health(begun) == (ClusterHealth.CONVERGING, "Service web is converging: m1 starts it.")
    paused = a_service("web", health=a_health("degraded", "update paused due to failure"))
    assert health(a_snapshot(services=(paused,))) == (
        ClusterHealth.DEGRADED,
        "Service web is degraded: update paused due to failure.",
    )


def test_many_objects_are_counted_and_some_named() -> None:
    nodes = tuple(a_node(f"w{number}", state="down") for number in range(5))
    assert health(a_snapshot(nodes))[1] == "5 nodes are down (w0, w1, w2 and 2 more)."


def test_without_a_leader_the_headline_says_so() -> None:
    lines = ("NO LEADER since 12:00 UTC: 1 of 3 managers responds", "the state of that time", "more")
    assert health(a_snapshot(without_leader=lines)) == (ClusterHealth.LEADERLESS, f"{lines[0]}. {lines[1]}.")


def test_the_summary_counts_what_is_ready_healthy_and_reserved() -> None:
    shop = a_shop()
    assert dict(summary(shop, states_of(shop, NOW))) == {
        "Nodes": "2/3 ready",
        "Services": "2/5 healthy",
        "Tasks": "9 running, 1 starting, 3 pending",
        "Reserved": "1.5/8 CPUs, 3.2/16 GiB",
    }


def test_nodes_and_services_show_the_cpus_and_memory_that_their_tasks_reserve() -> None:
    def cells(view: ScreenView) -> dict[str, str]:
        place = [column.title for column in COLUMNS[view]].index("RESERVED")
        return {row.cells[0]: row.cells[place] for row in rows_of(view, a_shop(), NOW)}

    assert cells(ScreenView.NODES) == {
        "m1": "1/4 CPUs, 1/8 GiB",
        "w1": "0.5/4 CPUs, 2.2/8 GiB",
        "w2": "0/4 CPUs, 0/8 GiB",
    }
    services = cells(ScreenView.SERVICES)
    assert (services["web"], services["api"], services["agent"]) == ("1.5 CPUs, 768 MiB", "2.5 GiB", "")


def test_services_show_the_requests_of_their_busiest_route() -> None:
    quiet = {"ServiceID": "id-web", "Route": "b.example", "RequestsPerSecond": 0.5, "ErrorPercent": 0.0}
    busy = {**quiet, "Route": "a.example", "RequestsPerSecond": 12.5, "ErrorPercent": 0.3, "LatencyP95": 31.0}
    routes = (quiet, busy, {"ServiceID": "id-api", "Route": "c.example"})
    shop = msgspec.structs.replace(a_shop(), routes=routes)
    place = [column.title for column in COLUMNS[ScreenView.SERVICES]].index("REQUESTS")
    cells = {row.cells[0]: row.cells[place] for row in rows_of(ScreenView.SERVICES, shop, NOW)}
    assert (cells["web"], cells["api"]) == ("12.5/s, 0.3% failed, p95 31ms", "")


def test_what_is_wrong_comes_first_or_rows_come_by_name() -> None:
    rows = rows_of(ScreenView.SERVICES, a_shop(), NOW)
    assert [row.cells[0] for row in chosen(rows, "")] == ["orders", "report", "api", "agent", "web"]
    assert [row.cells[0] for row in chosen(rows, "", by_name=True)] == [
        "agent",
        "api",
        "orders",
        "report",
        "web",
    ]


def test_a_filter_wants_every_word_in_any_cell() -> None:
    rows = rows_of(ScreenView.TASKS, a_shop(), NOW)
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
    assert [row.cells[:2] for row in rows_of(ScreenView.TASKS, snapshot, NOW)] == [("once.1", "failed")]
    assert len(rows_of(ScreenView.TASKS, snapshot, NOW, with_ended=True)) == 4


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
    assert rows_of(ScreenView.TASKS, snapshot, NOW)[0].cells[0] == "agent.m1"


def test_a_task_that_no_node_accepts_has_the_needs_that_its_service_names() -> None:
    snapshot, needs = a_shop(), "needs 16 CPUs; the largest node, m1, has 2"
    (row,) = (row for row in rows_of(ScreenView.TASKS, snapshot, NOW) if row.cells[0] == "report.1")
    assert row.cells[-1] == needs
    assert any(needs in line for line in tasks_listed(snapshot, snapshot.tasks[row.key].service_id))
    other = a_service("report", 0, 2, health=a_health("degraded", "exit 3"))
    snapshot = a_snapshot((), (other,), (a_task("report", 1, state="pending", err="no suitable node"),))
    known: dict[str, KnownRow] = {}
    assert [row.cells[-1] for row in task_rows(snapshot, known)] == ["no suitable node"]
    other = a_service("report", 0, 2, health=a_health("degraded", needs))
    later = msgspec.structs.replace(snapshot, services={other["ID"]: other})
    assert [row.cells[-1] for row in task_rows(later, known)] == [needs], "its row is not kept"


def test_the_first_task_of_a_job_has_the_name_of_its_slot() -> None:
    job = a_service("report", mode={"ReplicatedJob": {"TotalCompletions": 2}})
    snapshot = a_snapshot((a_node("m1"),), (job,), (a_task("report", 0, "m1"), a_task("report", 1, "m1")))
    assert [row.cells[0] for row in rows_of(ScreenView.TASKS, snapshot, NOW)] == ["report.0", "report.1"]


def test_a_node_that_is_drained_or_has_a_message_says_so() -> None:
    nodes = (a_node("a"), a_node("b", availability="drain"), a_node("c", state="down"))
    tones = {row.cells[0]: row.tone for row in rows_of(ScreenView.NODES, a_snapshot(nodes), NOW)}
    assert tones == {"a": Tone.GOOD, "b": Tone.WARNING, "c": Tone.BAD}


def test_a_task_that_cannot_be_read_is_left_out_of_the_list() -> None:
    body = msgspec.json.encode([{"ID": "t1", "Slot": "three"}, {"ID": "t2", "Slot": 3, "Unknown": {}}])
    assert list(tasks_in(body)) == ["t2"]


def test_narrow_screens_leave_out_the_columns_of_the_highest_rank() -> None:
    columns = COLUMNS[ScreenView.SERVICES]
    naturals = [20, 5, 8, 12, 17, 30, 10, 10, 60]
    assert laid_out(columns, naturals, 200) == [20, 5, 8, 12, 17, 30, 10, 10, 72]
    assert laid_out(columns, naturals, 80) == [20, 5, 0, 0, 0, 0, 0, 0, 51]


def test_the_reason_comes_before_other_columns_up_to_a_share_of_the_width() -> None:
    columns = COLUMNS[ScreenView.SERVICES]
    assert laid_out(columns, [8, 5, 0, 0, 17, 12, 9, 10, 300], 120) == [8, 5, 0, 0, 17, 0, 0, 0, 84]
    assert laid_out(columns, [8, 5, 0, 0, 17, 12, 9, 10, 10], 120) == [8, 5, 0, 0, 17, 12, 9, 10, 47]


@given(st.lists(st.integers(0, 300), min_size=9, max_size=9), st.integers(1, 300))
def test_no_row_is_wider_than_a_screen_that_has_room_for_its_first_columns(
    naturals: list[int], width: int
) -> None:
    widths = laid_out(COLUMNS[ScreenView.SERVICES], naturals, width)
    assert sum(one + 2 for one in widths[:-1] if one) + widths[-1] <= max(width, 32 + 11 + 4)


def test_ages_are_the_largest_unit() -> None:
    begun = 1_767_323_045.0  # 2026-01-02T03:04:05Z
    ages = [age_of("2026-01-02T03:04:05Z", begun + later) for later in (-5, 59, 60, 7200, 200_000)]
    assert ages == ["0s", "59s", "1m", "2h", "2d"]
    assert age_of("yesterday", begun) == ""


def test_a_line_of_a_log_is_its_time_its_task_and_its_text() -> None:
    details = "com.docker.swarm.node.id=n,com.docker.swarm.service.id=s,com.docker.swarm.task.id=t1"
    text = f"2026-01-02T03:04:05.000000000Z {details} \x1b[31mred\x1b[0m alert"
    assert line_of(text, OutputStream.STDOUT) == ShownLine(
        "red alert", "t1", "2026-01-02T03:04:05.000000000Z"
    )
    assert line_of("no details", OutputStream.STDERR) == ShownLine("no details", is_error=True)
    assert line_of("Error grabbing logs: gone", OutputStream.SYSTEM).is_error


def test_a_task_of_a_job_that_runs_is_not_said_to_be_stopping() -> None:
    """Its desired state is to complete."""
    tasks = (
        a_task("job", 1, "m1", desired="complete"),
        a_task("web", 1, "m1", desired="shutdown"),
        a_task("web", 2, "m1"),
    )
    rows = rows_of(
        ScreenView.TASKS, a_snapshot((a_node("m1"),), (a_service("job"), a_service("web")), tasks), NOW
    )
    assert {row.cells[0]: (row.cells[-1], row.tone) for row in rows} == {
        "job.1": ("", Tone.GOOD),
        "web.1": ("stopping: its desired state is shutdown", Tone.WARNING),
        "web.2": ("", Tone.GOOD),
    }
