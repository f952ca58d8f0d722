"""Why a prepared task does not start yet."""

import pytest

from skep.manager.diagnosis.reasons import progress_of
from skep.model.node import NodeState
from skep.model.task import Task, TaskState
from tests.support.builders import a_node, a_service, a_task

WEB = a_service("web")
NODES = {node.id: node for node in (a_node("m1"), a_node("w2", state=NodeState.DOWN))}
NEW = a_task("t2", service=WEB, slot=1, node="m1", state=TaskState.READY, desired=TaskState.READY)


def before(id: str, node: str, state: TaskState = TaskState.RUNNING) -> Task:
    return a_task(id, service=WEB, slot=1, node=node, state=state, desired=TaskState.SHUTDOWN)


def test_it_waits_for_the_task_before_it_to_stop() -> None:
    words = "m1 has prepared it; it starts when the task before it has stopped"
    assert progress_of(NEW, [before("t1", "m1"), NEW], NODES) == words
    assert progress_of(NEW, [NEW], NODES) == "m1 has prepared it; it waits for its turn to start"


@pytest.mark.parametrize("state", [TaskState.RUNNING, TaskState.UNKNOWN])
def test_it_does_not_wait_for_a_task_on_a_lost_node_to_stop(state: TaskState) -> None:
    lost = before("t1", "w2", state)
    words = "m1 has prepared it; it replaces the task on w2, which is down"
    assert progress_of(NEW, [lost, NEW], NODES) == words
    words = "m1 has prepared it; it starts when the task before it has stopped"
    assert progress_of(NEW, [before("t0", "m1"), lost, NEW], NODES) == words


def test_it_replaces_a_task_whose_node_was_removed() -> None:
    gone = before("t1", "w9", TaskState.ORPHANED)
    assert (
        progress_of(NEW, [gone, NEW], NODES)
        == "m1 has prepared it; it replaces a task whose node was removed"
    )
