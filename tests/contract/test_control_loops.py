"""The control loops of a leader on either store, without nodes: from a spec to assignments, and its removal."""

import asyncio

import pytest
from msgspec.structs import replace

from skep.model.service import ReplicatedService, Service, ServiceMode
from skep.model.task import Task, TaskState
from skep.model.values.times import Timestamp
from skep.store.interface import NotLeader, Store, Transaction
from tests.support.builders import a_node, a_service, a_task
from tests.support.managers.control_loops import leading, wait_for
from tests.support.store.store_rigs import Rig

REPLICAS = 50


def scale(tx: Transaction, replicas: int) -> None:
    service = tx.get(Service, "web")
    mode = ServiceMode(replicated=ReplicatedService(replicas=replicas))
    tx.put(replace(service, spec=replace(service.spec, mode=mode), previous_spec=service.spec))


def remove(tx: Transaction) -> None:
    tx.put(replace(tx.get(Service, "web"), removed_at=Timestamp("2026-01-01T00:00:00Z")))


def end_all(tx: Transaction) -> None:
    """Every retired task has stopped, as its node would report."""
    for task in tx.find(Task, service_id="web"):
        if task.desired_state > TaskState.RUNNING:
            tx.put(replace(task, status=replace(task.status, state=TaskState.SHUTDOWN)))


async def test_a_service_comes_scales_and_goes(store: Store) -> None:
    def tasks() -> list[Task]:
        return list(store.view().find(Task, service_id="web"))

    def assigned() -> int:
        return sum(task.status.state is TaskState.ASSIGNED for task in tasks())

    for number in (1, 2, 3):
        await store.update(lambda tx, number=number: tx.put(a_node(f"n{number}")))
    async with leading(store):
        await store.update(lambda tx: tx.put(a_service("web", replicas=REPLICAS)))
        await wait_for(store, lambda: assigned() == REPLICAS)
        counts = [sum(task.node_id == f"n{number}" for task in tasks()) for number in (1, 2, 3)]
        assert sorted(counts) == [16, 17, 17]
        await store.update(scale, 5)
        await wait_for(
            store, lambda: sum(t.desired_state is TaskState.REMOVE for t in tasks()) == REPLICAS - 5
        )
        await store.update(end_all)
        await wait_for(store, lambda: len(tasks()) == 5)
        await store.update(remove)
        await wait_for(store, lambda: all(task.desired_state is TaskState.REMOVE for task in tasks()))
        await store.update(end_all)
        await wait_for(store, lambda: store.view().lookup(Service, "web") is None)
    assert tasks() == []


async def test_a_new_leader_ends_tasks_whose_service_is_gone_and_fills_what_others_left(store: Store) -> None:
    await store.update(lambda tx: [tx.put(a_node("n1")), tx.put(a_service("web", replicas=2))])
    await store.update(lambda tx: tx.put(a_task("lost", node="n1", service="gone")))
    async with leading(store):
        await wait_for(store, lambda: store.view().get(Task, "lost").desired_state is TaskState.REMOVE)
        await wait_for(store, lambda: len(store.view().find(Task, service_id="web")) == 2)


async def test_loops_of_a_deposed_leader_end(rig: Rig) -> None:
    await rig.store.update(lambda tx: tx.put(a_node("n1")))

    async def lead_and_be_deposed() -> None:
        async with leading(rig.store):
            await rig.depose()
            await rig.store.update(lambda tx: tx.put(a_service("web", replicas=3)))
            await asyncio.Event().wait()

    with pytest.raises(BaseExceptionGroup) as ended:
        await lead_and_be_deposed()
    assert ended.value.subgroup(NotLeader) is not None
    assert rig.store.view().find(Task, service_id="web") == []
