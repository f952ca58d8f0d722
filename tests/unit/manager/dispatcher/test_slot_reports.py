"""A node reports volumes of the slots only whose tasks managers have seen there."""

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.dispatcher.node_sessions.registration import Registration, describe_node, take_session
from skep.model.node import EngineDescription, Node, NodeDescription
from skep.model.options.slot_volumes import SLOT_VOLUMES_LABEL, created_ms, slot_user
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, SessionId
from skep.model.values.meta import Version
from skep.store.memory import MemoryStore
from tests.support.builders import a_service, a_task

W1, SESSION = NodeId("w1"), SessionId("s1")


def described(label: str) -> NodeDescription:
    return NodeDescription(hostname="w1", engine=EngineDescription(labels={SLOT_VOLUMES_LABEL: label}))


def registered(label: str) -> Registration:
    return Registration(
        node_id=W1,
        manager_id=NodeId("m1"),
        session_id=SESSION,
        description=described(label),
        address="10.0.0.1",
    )


def believed(store: MemoryStore) -> str:
    return store.view().get(Node, W1).description.engine.labels.get(SLOT_VOLUMES_LABEL, "")


@pytest.fixture
async def store() -> MemoryStore:
    """With w1 and a service, of which slot 2 has a task there."""
    made = MemoryStore(SystemClock())
    service = a_service()
    task = a_task("t1", slot=2, node="w1", service=service, state=TaskState.RUNNING)
    elsewhere = a_task("t2", slot=3, node="w2", service=service)
    for one in (Node(id=W1), service, task, elsewhere):
        await made.update(lambda tx, one=one: tx.put(one))
    return made


async def test_a_slot_that_a_node_never_had_is_not_believed_of_it(store: MemoryStore) -> None:
    """Its tasks, with their secrets, would go there, or wait for it for ever where they keep to their volume."""
    own, others = (created_ms(store.view().get(Task, id)) for id in ("t1", "t2"))
    lies = f"data=web.1@{own} data=web.3@{others} data=web.2@{own - 1} data=other.2@{own}"
    await store.update(take_session, registered(lies))
    assert believed(store) == ""
    await store.update(describe_node, W1, SESSION, described(f"{lies} data=web.2@{own}"))
    assert believed(store) == f"data=web.2@{own}"


async def test_a_slot_of_a_job_has_the_number_that_its_node_knows(store: MemoryStore) -> None:
    task = store.view().get(Task, "t1")
    await store.update(lambda tx: tx.put(replace(task, job_iteration=Version())))
    at = created_ms(task)
    await store.update(take_session, registered(f"data=web.2@{at} data=web.1@{at}"))
    assert believed(store) == f"data=web.1@{at}"


async def test_the_first_slot_of_a_job_is_reported_and_believed_and_a_global_job_has_no_slots(
    store: MemoryStore,
) -> None:
    task = replace(store.view().get(Task, "t1"), job_iteration=Version(), slot=1)
    await store.update(lambda tx: tx.put(task))
    report = f"data={slot_user('web', replace(task, slot=task.shown_slot))}@{created_ms(task)}"
    await store.update(take_session, registered(report))
    assert believed(store) == report == f"data=web.0@{created_ms(task)}"
    await store.update(take_session, registered(""))
    await store.update(lambda tx: tx.put(replace(task, slot=0)))
    await store.update(take_session, registered(report))
    assert believed(store) == ""
    assert slot_user("web", replace(task, slot=0, job_iteration=None)) == ""


async def test_what_was_believed_once_is_believed_without_the_task(store: MemoryStore) -> None:
    at = created_ms(store.view().get(Task, "t1"))
    await store.update(take_session, registered(f"data=web.2@{at}"))
    await store.update(lambda tx: tx.delete(Task, "t1"))
    await store.update(describe_node, W1, SESSION, described(f"data=web.2@{at + 5} more=web.2@{at}"))
    assert believed(store) == f"data=web.2@{at}", "nor is it newer, or in another volume"
    await store.update(take_session, registered(""))
    assert believed(store) == ""


async def test_a_use_by_a_task_that_is_gone_counts_as_one_by_the_task_before_it(store: MemoryStore) -> None:
    """A task may be rejected after it has had its volumes, and is deleted before the node's report."""
    at = created_ms(store.view().get(Task, "t1"))
    await store.update(take_session, registered(f"data=web.2@{at + 5}"))
    assert believed(store) == f"data=web.2@{at}"


async def test_a_later_task_makes_it_later(store: MemoryStore) -> None:
    first = store.view().get(Task, "t1")
    at = created_ms(first)
    await store.update(take_session, registered(f"data=web.2@{at}"))
    later = replace(a_task("t3", slot=2, node="w1"), service_id=first.service_id)
    await store.update(lambda tx: tx.put(later))
    await store.update(describe_node, W1, SESSION, described(f"data=web.2@{created_ms(later)}"))
    assert believed(store) == f"data=web.2@{created_ms(later)}"
