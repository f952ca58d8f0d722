"""Moves are made by the real loops on a copied state: successors start first, where the plan wants them."""

from collections import Counter
from collections.abc import Iterable

import pytest
from msgspec.structs import replace

from skep.aio.time_slices import run_at_once
from skep.errors import FailedPrecondition, InvalidArgument
from skep.manager.rebalance.plan import Balance, PlannedMove, first_moves
from skep.manager.rebalance.records import (
    begin_move,
    end_run,
    give_up,
    rebalancing_in,
    set_after_return,
    start_run,
    stop_run,
)
from skep.manager.services.freezes import set_freeze
from skep.manager.what_if.answer import Question
from skep.manager.what_if.rehearsal import Rehearsal
from skep.model.node import Availability, Node, SessionOwner
from skep.model.options.freezes import FreezeRequest
from skep.model.options.labels import MAINTENANCE, MIN_AVAILABLE
from skep.model.swarm import Swarm
from skep.model.task import StopCause, Task, TaskState
from skep.model.values.ids import ClusterId, NodeId, ServiceId, SessionId, TaskId
from skep.model.values.times import Timestamp
from skep.store.state import State
from tests.support.builders import a_node, a_service
from tests.unit.manager.rebalance.test_plan import a_state, add

NOW = Timestamp("2026-11-28T00:00:00Z")


def cluster(*nodes: str, labels: dict[str, str] | None = None) -> State:
    """Return three nodes, and web with a task on each of ``nodes``."""
    found = [
        replace(a_node(id), session=SessionOwner(session_id=SessionId(f"of-{id}")))
        for id in ("n1", "n2", "n3")
    ]
    state = a_state(Swarm(id=ClusterId("c")), *found)
    service = a_service("web", replicas=len(nodes))
    add(state, replace(service, spec=replace(service.spec, labels=labels or {})), *nodes)
    return state


def question(state: State) -> Question:
    found = Question(Rehearsal(state, 0), lambda _: True)
    finish(found.begin())
    return found


def finish(work: Iterable[None]) -> None:
    for _ in work:
        pass


def plan_of(rehearsal: Rehearsal) -> list[PlannedMove]:
    return run_at_once(Balance(rehearsal.copy.view(), {}, 0).planning())


def running(rehearsal: Rehearsal) -> Counter[str]:
    """Return how many tasks of web run on each node.  No slot has two of them."""
    tasks = [
        one
        for one in rehearsal.copy.view().find(Task, service_id="web")
        if one.desired_state is TaskState.RUNNING
    ]
    assert len({one.slot for one in tasks}) == len(tasks)
    return Counter(one.node_id for one in tasks if one.status.state is TaskState.RUNNING)


def test_all_moves_are_made_and_none_is_left() -> None:
    asked = question(cluster("n1", "n1", "n1", "n1", "n2", "n1", labels={MIN_AVAILABLE: "100%"}))
    copy = asked.rehearsal.copy
    copy.apply(start_run, "me", NOW)
    number = 0
    while moves := plan_of(asked.rehearsal):
        for move in first_moves(moves, [], 5):
            assert copy.apply(begin_move, move, NOW)
            number += 1
        finish(asked.settle())
    assert running(asked.rehearsal) == {"n1": 2, "n2": 2, "n3": 2}
    assert asked.course.lowest["web"] == 0, "no task stopped before its successor ran"
    assert rebalancing_in(copy.view()).run.moved == number == 3
    stopped = [one for one in copy.view().find(Task) if one.relocation is not None]
    assert {one.restart.stop_cause for one in stopped if one.restart} == {StopCause.REBALANCED.value}
    copy.apply(end_run, NOW)
    assert (rebalancing_in(copy.view()).run, rebalancing_in(copy.view()).last) == (None, "3 moves")


def test_a_move_that_no_run_wants_any_longer_is_not_begun() -> None:
    asked = question(cluster("n1", "n1", "n1"))
    copy, (move, *_) = asked.rehearsal.copy, plan_of(asked.rehearsal)
    assert not copy.apply(begin_move, move, NOW), "no run is in progress"
    copy.apply(start_run, "me", NOW)
    copy.apply(set_freeze, "", FreezeRequest(until=Timestamp("1970-01-02T00:00:00Z")), by="", now_ns=0)
    assert not copy.apply(begin_move, move, NOW), "the cluster is frozen"
    copy.apply(stop_run)
    copy.apply(end_run, NOW)
    with pytest.raises(FailedPrecondition, match="frozen"):
        copy.apply(start_run, "me", NOW)


def test_a_move_to_a_node_that_takes_no_tasks_since_the_plan_is_not_begun() -> None:
    asked = question(cluster("n1", "n1", "n1"))
    copy, (move, *_) = asked.rehearsal.copy, plan_of(asked.rehearsal)
    copy.apply(start_run, "me", NOW)
    target = copy.view().get(Node, move.target)
    paused = replace(target, spec=replace(target.spec, availability=Availability.PAUSE))
    copy.apply(lambda tx: tx.put(paused))
    assert not copy.apply(begin_move, move, NOW)
    copy.apply(lambda tx: tx.put(target))
    lock = f'{{"holders":[{{"node":"{move.target}","by":"me","until":"2027-01-01T00:00:00Z"}}]}}'
    swarm = copy.view().get(Swarm, "c")
    copy.apply(lambda tx: tx.put(replace(swarm, spec=replace(swarm.spec, labels={MAINTENANCE: lock}))))
    assert not copy.apply(begin_move, move, NOW), "it is about to restart"
    copy.apply(lambda tx: tx.put(replace(tx.get(Swarm, "c"), spec=swarm.spec)))
    assert copy.apply(begin_move, move, NOW)


def test_a_freeze_delays_a_move_that_was_begun() -> None:
    asked = question(cluster("n1", "n1", "n1"))
    copy, (move, *_) = asked.rehearsal.copy, plan_of(asked.rehearsal)
    copy.apply(start_run, "me", NOW)
    copy.apply(begin_move, move, NOW)
    copy.apply(set_freeze, "", FreezeRequest(until=Timestamp("1970-01-02T00:00:00Z")), by="", now_ns=0)
    finish(asked.settle())
    assert running(asked.rehearsal) == {"n1": 3}


def test_a_move_whose_target_takes_no_tasks_is_given_up_and_the_task_stays() -> None:
    asked = question(cluster("n1", "n1", "n1"))
    copy, (move, *_) = asked.rehearsal.copy, plan_of(asked.rehearsal)
    copy.apply(start_run, "me", NOW)
    target = copy.view().get(Node, move.target)
    copy.apply(begin_move, move, NOW)
    copy.apply(lambda tx: tx.put(replace(target, spec=replace(target.spec, availability=Availability.PAUSE))))
    finish(asked.settle())
    assert len(copy.view().find(Task)) == 3, "no successor is made for a node that takes none"
    copy.apply(give_up, copy.view().get(Task, move.task_id))
    finish(asked.settle())
    wanted = [one for one in copy.view().find(Task) if one.is_wanted]
    assert (len(wanted), running(asked.rehearsal)) == (3, {"n1": 3})
    assert rebalancing_in(copy.view()).run.skipped == ("web",)


def a_move(service: str, source: str, target: str) -> PlannedMove:
    return PlannedMove(
        task_id=TaskId(service), service_id=ServiceId(service), source=NodeId(source), target=NodeId(target)
    )


def test_few_moves_are_made_at_a_time_and_none_needs_the_space_of_another_one() -> None:
    moves = [
        a_move("a", "n1", "n2"),
        a_move("b", "n3", "n1"),
        a_move("a", "n1", "n3"),
        a_move("c", "n1", "n2"),
    ]
    assert [one.service_id for one in first_moves(moves, [], 5)] == ["a", "c"]
    assert [one.service_id for one in first_moves(moves, [], 1)] == ["a"]


def test_the_wait_after_a_return_has_limits() -> None:
    state = cluster("n1")
    for seconds in (0, 30, 600):
        asked = question(state).rehearsal.copy
        asked.apply(set_after_return, seconds)
        assert rebalancing_in(asked.view()).after_return_s == seconds
    for seconds in (1, 100_000, -5):
        with pytest.raises(InvalidArgument):
            question(state).rehearsal.copy.apply(set_after_return, seconds)
