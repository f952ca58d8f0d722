"""``skep what-if``: what the command shows of an answer, its exit codes, and what it refuses."""

from typing import Any

import pytest
from click.testing import CliRunner

from skep.cli.main import main
from skep.cli.output import Screen
from skep.cli.see.what_if import DIFFERS, answered

CAPACITY = {"Nodes": 2, "FreeNanoCPUs": 4_000_000_000, "FreeMemoryBytes": 8 << 30}


def an_answer(**fields: Any) -> dict[str, Any]:
    return {
        "Seconds": 17.4,
        "Services": [],
        "OtherServices": 0,
        "OtherMissing": 0,
        "Nodes": [],
        "CapacityBefore": CAPACITY,
        "CapacityAfter": CAPACITY | {"Nodes": 1},
        "Notes": [],
    } | fields


def a_service(**fields: Any) -> dict[str, Any]:
    service = {"ID": "1", "Name": "web", "Desired": 2, "Before": 2, "Lowest": 1, "After": 2}
    move = {"Tasks": 1, "Source": "w1", "Target": "w2"}
    return service | {"Seconds": 17.4, "Moves": [move], "Missing": []} | fields


def lines(answer: dict[str, Any]) -> list[str]:
    return list(answered("What if w1 is lost", answer).lines(Screen()))


def test_moves_and_what_is_left_are_shown() -> None:
    node = {"ID": "1", "Hostname": "w1", "Before": 1, "After": 0, "TakesTasks": False}
    nodes = [node | {"FreeNanoCPUs": 0, "FreeMemoryBytes": 0}]
    assert lines(an_answer(Services=[a_service()], Nodes=nodes)) == [
        "What if w1 is lost: 1 task started, moved or stopped within about 17 s, all run afterwards",
        "",
        "SERVICE  RUNNING  LOWEST  SECONDS  MOVES",
        "web      2 → 2/2  1       17.4     1 w1 → w2",
        "",
        "NODE  TASKS  CPUS LEFT  MEMORY LEFT",
        "w1    1 → 0  -          -",
        "  left on 2 → 1 node that takes tasks: 4 → 4 CPUs, 8 GiB → 8 GiB",
    ]


def test_missing_tasks_minimums_and_other_stacks_end_with_another_exit_code() -> None:
    missing = [{"Tasks": 1, "Kind": "no-node", "Reason": "no suitable node"}]
    lost = an_answer(Services=[a_service(After=1, Missing=missing)], Notes=["It is frozen."])
    assert "  web: 1 not running: no suitable node" in lines(lost)
    assert "  It is frozen." in lines(lost)
    moved = an_answer(Services=[a_service(LeftBehind=["data"])])
    assert "  web: starts elsewhere with empty volumes, the data of data stays on w1" in lines(moved)
    hidden = an_answer(OtherServices=2, OtherMissing=3)
    assert "  2 services of other stacks are affected, and 3 of their tasks do not run" in lines(hidden)
    worse = [lost, hidden, an_answer(Services=[a_service(Minimum=2)])]
    assert [answered("", one).exit_code for one in worse] == [DIFFERS] * 3
    fine = [an_answer(), an_answer(Services=[a_service()]), an_answer(Services=[a_service(Minimum=1)])]
    assert [answered("", one).exit_code for one in fine] == [0] * 3
    assert lines(an_answer()) == ["What if w1 is lost: no task has to move"]


def test_an_update_that_fails_is_named_although_all_old_tasks_run() -> None:
    why = "update rolled back: no suitable node"
    answer = an_answer(Services=[a_service(Moves=[], FailedUpdate=why)], OtherServices=1)
    assert lines(answer)[0] == "What if w1 is lost: 1 update cannot complete"
    assert f"  web: its update fails: {why}" in lines(answer)
    assert "  1 service of other stacks is affected" in lines(answer)
    assert answered("", answer).exit_code == DIFFERS


def test_a_task_that_stays_on_a_drained_node_is_not_called_missing() -> None:
    why = "web.1: it stays on w1, which is drained: its replacement does not run yet: no suitable node"
    answer = an_answer(Services=[a_service(Moves=[], Staying=1, WhyStaying=why)])
    assert lines(answer)[0] == "What if w1 is lost: 1 task cannot leave"
    assert f"  {why}" in lines(answer)
    assert answered("", answer).exit_code == DIFFERS
    moves = an_answer(Services=[a_service(Staying=1, WhyStaying=why)])
    assert lines(moves)[0].endswith("within about 17 s, all run afterwards, 1 task cannot leave")


@pytest.mark.parametrize("word", ["web", "web=", "web=many", "=3", "web=-1"])
def test_a_scale_needs_a_number(word: str) -> None:
    done = CliRunner().invoke(main, ["--host", "unix:///nowhere", "what-if", "scale", word])
    assert done.exit_code == 2
    assert "write SERVICE=REPLICAS" in done.output
