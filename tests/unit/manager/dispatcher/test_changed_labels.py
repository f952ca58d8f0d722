"""Which nodes are woken when labels of a service change, and in what steps."""

import asyncio
from collections.abc import Iterable

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.aio.time_slices import STEP
from skep.manager.dispatcher.changed_labels import ChangedLabels
from skep.model.options.labels import ON_DISCONNECT
from skep.model.service import Service
from skep.model.task import TaskState
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.times import Timestamp
from skep.store.memory import MemoryStore
from tests.support.builders import a_service, a_task
from tests.support.store.damage_rigs import put_all

WEB = a_service("web")


def labeled(**labels: str) -> Service:
    return replace(WEB, spec=replace(WEB.spec, labels=labels))


class Rig:
    def __init__(self) -> None:
        self.store = MemoryStore(SystemClock())
        self.woken: list[tuple[str, str]] = []
        self.labels = ChangedLabels(self.store, SystemClock(), self._wake)

    def _wake(self, node_id: NodeId, task_ids: Iterable[TaskId]) -> None:
        self.woken += [(node_id, id) for id in task_ids]

    async def run(self) -> None:
        running = asyncio.create_task(self.labels.run())
        for _ in range(20):
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait([running])


async def test_the_nodes_of_tasks_that_have_not_ended_are_woken() -> None:
    rig = Rig()
    await put_all(
        rig.store,
        WEB,
        a_task("t1", node="n1", service=WEB),
        a_task("t2", node="n2", service=WEB, state=TaskState.STARTING),
        a_task("ended", node="n3", service=WEB, state=TaskState.FAILED),
        a_task("pending", service=WEB, state=TaskState.PENDING),
        a_task("other", node="n1", service="db"),
    )
    rig.labels.on_update(WEB, labeled(**{ON_DISCONNECT: "stop"}))
    await rig.run()
    assert sorted(rig.woken) == [("n1", "t1"), ("n2", "t2")]


async def test_tasks_that_become_proxies_of_the_front_door_are_sent_its_certificates() -> None:
    rig = Rig()
    await put_all(rig.store, WEB, a_task("t1", node="n1", service=WEB))
    rig.labels.on_update(WEB, labeled(**{"skep.door": "true"}))
    rig.labels.on_update(labeled(**{"skep.door": "true"}), WEB)
    await rig.run()
    assert rig.woken == [("n1", "t1")]


@pytest.mark.parametrize("labels", [{}, {"tier": "front"}])
async def test_labels_that_nodes_do_not_go_by_wake_none(labels: dict[str, str]) -> None:
    rig = Rig()
    await put_all(rig.store, WEB, a_task("t1", node="n1", service=WEB))
    rig.labels.on_update(WEB, labeled(**labels))
    await rig.run()
    assert rig.woken == []


async def test_very_many_tasks_are_gone_through_in_steps() -> None:
    rig = Rig()
    await put_all(rig.store, WEB)
    await put_all(rig.store, *[a_task(node=f"n{number}", service=WEB) for number in range(STEP + 1)])
    steps = rig.labels.wake_nodes(WEB.id)
    next(steps)
    assert len(rig.woken) == STEP
    assert list(steps) == []
    assert len(rig.woken) == STEP + 1


async def test_a_removed_service_wakes_the_nodes_of_tasks_that_stop_because_it_is_no_longer_drained() -> None:
    rig = Rig()
    removed = replace(WEB, removed_at=Timestamp("2026-01-01T00:00:00Z"))
    await put_all(
        rig.store,
        removed,
        a_task("t1", node="n1", service=WEB),
        a_task("t2", node="n2", service=WEB, desired=TaskState.REMOVE),
    )
    rig.labels.on_update(WEB, removed)
    await rig.run()
    assert rig.woken == [("n2", "t2")]
