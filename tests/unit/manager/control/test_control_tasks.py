"""The shown state of a task whose node has lost its session."""

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.control.tasks import known_status
from skep.manager.diagnosis.reasons import problem_of
from skep.model.node import Node, NodeState, NodeStatus
from skep.model.swarm import Freeze, Swarm
from skep.model.task import Restart, Task, TaskState
from skep.model.values.ids import ClusterId
from skep.model.values.times import Timestamp
from skep.store.interface import View
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_task

SINCE = Timestamp("2026-01-02T03:04:05Z")


async def view_of(task: Task, node: Node) -> View:
    store = MemoryStore(SystemClock())
    await store.update(lambda tx: [tx.put(object) for object in (a_service(), node, task)])
    return store.view()


def down(node: Node) -> Node:
    return replace(node, status=NodeStatus(state=NodeState.DOWN), silent_since=SINCE)


async def test_tasks_of_a_down_node_are_unknown_since_its_last_heartbeat() -> None:
    task = a_task("t1", node="n1", service=a_service(), state=TaskState.RUNNING)
    status = known_status(await view_of(task, down(a_node("n1"))), task)
    assert status.state is TaskState.UNKNOWN
    assert status.timestamp == SINCE
    assert status.message.endswith("is down; the task was last known to be running")


async def test_a_task_of_a_lost_node_has_the_freeze_of_replacement_as_its_error() -> None:
    task, node = a_task("t1", node="n1", service=a_service(), state=TaskState.RUNNING), down(a_node("n1"))
    store = MemoryStore(SystemClock())
    freeze = Freeze(since=SINCE, nodes=(node.id,), ready_before=4)
    await store.update(
        lambda tx: [tx.put(one) for one in (a_service(), node, task, Swarm(id=ClusterId("c"), freeze=freeze))]
    )
    shown = "n1 is down; replacement of tasks is frozen: 1 of 4 nodes went down at once (skep cluster resume)"
    assert known_status(store.view(), task).err == f"node {shown}"
    before = replace(freeze, nodes=(), down_before={node.id: SINCE})
    await store.update(lambda tx: tx.put(replace(tx.find(Swarm)[0], freeze=before)))
    assert known_status(store.view(), task).err == "node n1 is down"


async def test_tasks_of_a_live_node_keep_their_state() -> None:
    task = a_task("t1", node="n1", service=a_service(), state=TaskState.RUNNING)
    assert known_status(await view_of(task, a_node("n1")), task) == task.status


async def test_an_attempt_that_its_down_node_has_not_received_is_blocked_by_that_node() -> None:
    service, node = a_service(), down(a_node("n1"))
    failed = a_task("t1", node="n2", service=service, state=TaskState.FAILED)
    task = a_task("t2", node="n1", service=service, state=TaskState.ASSIGNED)
    task = replace(task, restart=Restart(failures=1))
    status = known_status(await view_of(task, node), task)
    assert (status.state, status.err) == (TaskState.ASSIGNED, "node n1 is down")
    problem = problem_of(replace(task, status=status), (failed, task), {node.id: node})
    assert (problem.kind, problem.reason) == ("node-lost", "node n1 is down")


@pytest.mark.parametrize("state", [TaskState.COMPLETE, TaskState.FAILED, TaskState.SHUTDOWN])
async def test_what_had_ended_is_known(state: TaskState) -> None:
    task = a_task("t1", node="n1", service=a_service(), state=state)
    assert known_status(await view_of(task, down(a_node("n1"))), task) == task.status
