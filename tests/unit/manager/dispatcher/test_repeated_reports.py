"""What a node says about a state again and again is written at the pace that it is allowed, its last word too."""

import asyncio
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.manager.dispatcher.node_sessions.sessions import LiveSession
from skep.manager.dispatcher.repeated_reports import AT_ONCE, PER_S, RepeatedReports
from skep.manager.dispatcher.statuses import StatusReport, record_status
from skep.model.node import SessionOwner
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId, SessionId, TaskId
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_task

NODE, SESSION = NodeId("n1"), SessionId("s1")


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    yield loop
    loop.close()


def a_report(state: TaskState, words: str, task: str = "t1") -> StatusReport:
    status = TaskStatus(state=state, message=words)
    return StatusReport(node_id=NODE, session_id=SESSION, task_id=TaskId(task), status=status)


def test_a_node_that_never_ends_to_say_the_same_is_slowed_down_and_its_last_word_is_kept(
    loop: VirtualLoop,
) -> None:
    clock = VirtualClock(loop)
    seconds = 100

    async def live() -> None:
        store = MemoryStore(clock)
        session = LiveSession(NODE, SESSION, lambda: None, deadline=0.0)
        live_sessions: dict[NodeId, LiveSession] = {NODE: session}
        repeats = RepeatedReports(store, live_sessions.get, clock)
        held = SessionOwner(manager_id=NodeId("m1"), session_id=SESSION)
        await store.update(lambda tx: tx.put(replace(a_node("n1"), session=held)))
        await store.update(lambda tx: [tx.put(a_task(id, node="n1")) for id in ("t1", "t2")])
        running = asyncio.create_task(repeats.run())
        before = store.view().revision
        for number in range(seconds * 10):
            due = repeats.due([a_report(TaskState.RUNNING, f"{number}")])
            await store.update_each(record_status, due)
            await asyncio.sleep(0.1)
        written = store.view().revision - before
        assert written <= AT_ONCE + PER_S * seconds + 2
        assert repeats.due([a_report(TaskState.FAILED, "the end", "t2")]) != []  # changes are never delayed
        await asyncio.sleep(3)
        assert store.view().get(Task, "t1").status.message == f"{seconds * 10 - 1}"
        live_sessions.clear()
        await asyncio.sleep(3)
        assert repeats.delayed == {}
        running.cancel()

    loop.run_until_complete(live())


def test_what_is_no_task_of_the_node_is_not_kept(loop: VirtualLoop) -> None:
    store = MemoryStore(VirtualClock(loop))
    loop.run_until_complete(store.update(lambda tx: tx.put(a_task("t1", node="n2"))))
    repeats = RepeatedReports(store, lambda _: None, VirtualClock(loop))
    reports = [a_report(TaskState.RUNNING, f"{number}") for number in range(3 * AT_ONCE)]
    assert repeats.due(reports) == reports
