"""The rule on full disks: it is shown histories in which it is broken, and in which it is kept."""

import pytest
from msgspec.structs import replace

from sim.invariants.nodes.disks import KNOWN_S, FullNodesGetNoNewTasks
from skep.model.node import EngineDescription, Node
from skep.model.node_reports.conditions import DISK_PRESSURE_LABEL
from skep.model.task import Task, TaskState, TaskStatus
from tests.sim.histories import W1, History, a_node, a_service, a_task


def a_full_node() -> Node:
    engine = EngineDescription(labels={DISK_PRESSURE_LABEL: "the disk is full"})
    return replace(a_node(W1), description=replace(a_node(W1).description, engine=engine))


def assign(history: History, task: Task) -> None:
    history.put(task)
    status = TaskStatus(state=TaskState.ASSIGNED, message="scheduler assigned task to node")
    history.put(replace(history.state.get(Task, task.id), node_id=W1, status=status))


@pytest.mark.parametrize(("after_s", "is_wrong"), [(KNOWN_S - 1, False), (KNOWN_S + 1, True)])
def test_a_full_node_that_gets_a_new_task_is_rejected(after_s: float, *, is_wrong: bool) -> None:
    history = History(FullNodesGetNoNewTasks())
    history.put(a_service(), a_full_node())
    assign(history.after(after_s), a_task("t1", state=TaskState.PENDING))
    assert bool(history.violations) is is_wrong


def test_a_node_that_has_space_again_or_had_the_slot_may_get_a_task() -> None:
    history = History(FullNodesGetNoNewTasks())
    history.put(a_service(), a_full_node(), a_task("t0", slot=2, node=W1, state=TaskState.FAILED))
    assign(history.after(KNOWN_S + 1), a_task("t1", slot=2, state=TaskState.PENDING))
    history.put(a_node(W1))
    assign(history.after(KNOWN_S + 1), a_task("t2", slot=1, state=TaskState.PENDING))
    assert history.violations == []


@pytest.mark.parametrize(("later_s", "is_wrong"), [(1.0, False), (KNOWN_S + 1, True)])
def test_a_slot_whose_task_was_just_deleted_may_return(later_s: float, *, is_wrong: bool) -> None:
    """The scheduler may have decided while its replica still had the task."""
    history = History(FullNodesGetNoNewTasks())
    history.put(a_service(), a_full_node(), a_task("t0", slot=2, node=W1, state=TaskState.FAILED))
    history.after(KNOWN_S + 1).commit(lambda tx: tx.delete(Task, "t0"))
    assign(history.after(later_s), a_task("t1", slot=2, state=TaskState.PENDING))
    assert bool(history.violations) is is_wrong
