"""Tasks whose spec the leader cannot read: what they hold is not free, and what they need is not guessed."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.scheduler.loop import Scheduler
from skep.manager.scheduler.nodes.accounting import HoldingsCache, usage_in
from skep.model.service import PortConfig, PublishMode, Resources, Service, ServiceSpec
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import new_id
from skep.store.interface import Store
from skep.store.kinds import UNKNOWN_SPEC, has_unknown_spec
from tests.support.builders import a_node, a_service_spec, a_task
from tests.support.managers.control_loops import wait_for
from tests.support.store.damage_rigs import MemoryDamage

PENDING, RUNNING = TaskState.PENDING, TaskState.RUNNING
PORTS = (PortConfig(target_port=80, published_port=8081, publish_mode=PublishMode.HOST),)
RESERVE = Resources(memory_bytes=1 << 20)


async def a_leader_with_an_unreadable_version(spec: ServiceSpec, **fields: object) -> Store:
    """On one node; the task ``old``, with ``fields``, was made from ``spec``, which has another version now."""
    rig = MemoryDamage()
    await rig.store.update(lambda tx: tx.put(a_node("n1")))
    web = await rig.store.update(lambda tx: tx.put(Service(id="web", spec=spec)))
    old = replace(a_task("old", service=web), spec_version=web.spec_version, **fields)
    await rig.store.update(lambda tx: tx.put(old))
    other = replace(spec, task_template=a_service_spec("web", image="other:2").task_template)
    await rig.store.update(lambda tx: tx.put(replace(tx.get(Service, "web"), spec=other)))
    await rig.damage(f"o/spec/web/{web.spec_version.index}")
    store = await rig.load()
    assert has_unknown_spec(store.view(), store.view().get(Task, "old"))
    return store


@asynccontextmanager
async def scheduling(store: Store) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        running = group.create_task(Scheduler(store, SystemClock(), new_id, Random(1)).run())
        yield
        running.cancel()


def shows(store: Store, id: str, condition: Callable[[Task], object]) -> Callable[[], bool]:
    return lambda: bool(condition(store.view().get(Task, id)))


@pytest.mark.parametrize("wanted", [a_service_spec("db", ports=PORTS), a_service_spec("db", reserve=RESERVE)])
async def test_a_node_with_such_a_task_gets_none_that_needs_ports_or_resources(wanted: ServiceSpec) -> None:
    store = await a_leader_with_an_unreadable_version(
        a_service_spec("web", ports=PORTS, reserve=RESERVE), node_id="n1", status=TaskStatus(state=RUNNING)
    )
    for spec in (wanted, a_service_spec("plain")):
        service = await store.update(lambda tx, spec=spec: tx.put(Service(id=spec.name, spec=spec)))
        task = replace(a_task(spec.name, service=service, state=PENDING), spec_version=service.spec_version)
        await store.update(lambda tx, task=task: tx.put(task))
    async with scheduling(store):
        await wait_for(store, shows(store, "plain", lambda task: task.node_id))
        await wait_for(store, shows(store, "db", lambda task: task.status.err))
        db = store.view().get(Task, "db")
        assert (db.node_id, db.status.err) == (
            "",
            "no suitable node (unreadable task specs on 1 node)",
        )
        ended = replace(store.view().get(Task, "old"), status=TaskStatus(state=TaskState.SHUTDOWN))
        await store.update(lambda tx: tx.put(ended))
        await wait_for(store, shows(store, "db", lambda task: task.node_id))


async def test_such_a_task_that_waits_is_given_no_node() -> None:
    store = await a_leader_with_an_unreadable_version(a_service_spec("web"), status=TaskStatus(state=PENDING))
    async with scheduling(store):
        await wait_for(store, shows(store, "old", lambda task: task.status.err))
        old = store.view().get(Task, "old")
        assert (old.node_id, old.status.err) == ("", UNKNOWN_SPEC)


async def test_a_task_gets_a_node_once_its_service_can_be_read() -> None:
    rig = MemoryDamage()
    await rig.store.update(lambda tx: tx.put(a_node("n1")))
    spec = a_service_spec("web")
    web = await rig.store.update(lambda tx: tx.put(Service(id="web", spec=spec)))
    task = replace(a_task("new", service=web, state=PENDING), spec_version=web.spec_version)
    await rig.store.update(lambda tx: tx.put(task))
    await rig.damage("o/service/web")
    store = await rig.load()
    async with scheduling(store):
        await wait_for(store, shows(store, "new", lambda task: task.status.err))
        # Another manager has read it before, and writes it again.
        labeled = replace(spec, labels={"a": "b"})
        await rig.store.update(lambda tx: tx.put(replace(tx.get(Service, "web"), spec=labeled)))
        await wait_for(store, shows(store, "new", lambda task: task.node_id))


async def test_the_present_version_is_known_by_its_service() -> None:
    store = await a_leader_with_an_unreadable_version(
        a_service_spec("web", ports=PORTS), node_id="n1", status=TaskStatus(state=RUNNING)
    )
    service, old = store.view().get(Service, "web"), store.view().get(Task, "old")
    present = replace(old, spec_version=service.spec_version)
    assert usage_in(store.view(), old).is_unknown
    assert HoldingsCache().of(present, store.view()) == usage_in(store.view(), present)
    assert usage_in(store.view(), present).host_ports == (("tcp", 8081),)
    assert not usage_in(store.view(), present).is_unknown
