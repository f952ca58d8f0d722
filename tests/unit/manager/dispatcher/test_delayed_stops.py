"""Whose stop is held back, and for how long."""

import asyncio

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import InvalidArgument
from skep.manager.dispatcher.delayed_stops import drain_of
from skep.model.ids import NodeId
from skep.model.labels import check_service_labels
from skep.model.meta import Driver
from skep.model.network import Network
from skep.model.node import Node
from skep.model.service import Service
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.model.times import Timestamp
from skep.store.memory import MemoryStore
from tests.support.builders import a_docker_node, a_node, a_service, a_task, an_overlay

NET = an_overlay("net1")
WEB = a_service("web")


def on(network: Network | None, **requested: object) -> Task:
    task = a_task("t1", node="n1", service=WEB, **requested)  # type: ignore[arg-type]
    place = NetworkAttachment(network=network, addresses=("10.0.1.2/24",))
    return replace(task, networks_attachments=(place,)) if network else task


def drain(
    new: Task, service: Service | None = WEB, node: Node | None = None, old: Task | None = None
) -> float:
    async def run() -> float:
        store = MemoryStore(SystemClock())
        there = [one for one in (service, node or a_node("n1")) if one is not None]
        await store.update(lambda tx: [tx.put(one) for one in there])
        return drain_of(store.view(), old or replace(new, desired_state=TaskState.RUNNING), new)

    return asyncio.run(run())


def labelled(seconds: str) -> Service:
    return replace(WEB, spec=replace(WEB.spec, labels={"skep.drain": seconds}))


@pytest.mark.parametrize("desired", [TaskState.SHUTDOWN, TaskState.REMOVE])
def test_the_stop_of_a_serving_task_is_held_back_for_a_second_or_as_its_service_says(
    desired: TaskState,
) -> None:
    task = on(NET, desired=desired)
    assert drain(task) == 1.0
    assert drain(task, labelled("5s")) == 5.0
    assert drain(task, labelled("0s")) == 0.0
    assert drain(task, labelled("nonsense")) == 1.0


def test_a_task_without_traffic_stops_at_once() -> None:
    task = on(NET, desired=TaskState.SHUTDOWN)
    host = replace(NET, driver_state=Driver(name="host"))
    removed = replace(WEB, removed_at=Timestamp("2026-01-01T00:00:00Z"))
    engine = replace(a_docker_node("d1"), id=NodeId("n1"))
    assert drain(on(None, desired=TaskState.SHUTDOWN)) == 0.0
    assert drain(on(host, desired=TaskState.SHUTDOWN)) == 0.0
    assert drain(on(NET, desired=TaskState.SHUTDOWN, state=TaskState.STARTING)) == 0.0
    assert drain(on(NET, desired=TaskState.SHUTDOWN, state=TaskState.FAILED)) == 0.0
    assert drain(task, removed) == 0.0
    assert drain(task, None) == 0.0
    assert drain(task, node=engine) == 0.0
    assert drain(task, node=a_node("another")) == 0.0


def test_a_task_that_was_to_stop_already_waits_no_second_time() -> None:
    before = on(NET, desired=TaskState.SHUTDOWN)
    assert drain(on(NET, desired=TaskState.REMOVE), old=before) == 0.0
    assert drain(on(NET, desired=TaskState.RUNNING)) == 0.0


def test_a_label_that_cannot_be_read_is_refused() -> None:
    for word in ("soon", "-1s", "9000h"):
        with pytest.raises(InvalidArgument, match=f"invalid label skep.drain={word}"):
            check_service_labels({"skep.drain": word})
    check_service_labels({"skep.drain": "250ms"})
