"""One object of each kind that cannot be read, or makes no sense: all others converge, and it says so itself."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import Unavailable
from skep.manager.routes import application
from skep.model.ids import ClusterId
from skep.model.network import IPAMConfig, IPAMOptions
from skep.model.service import (
    NetworkAttachmentConfig,
    ReplicatedJob,
    Resources,
    Service,
    ServiceMode,
    TaskSpec,
)
from skep.model.swarm import DEFAULT_SWARM_SPEC, Swarm
from skep.model.task import Task, TaskState
from skep.store import keys
from skep.store.interface import Transaction
from skep.store.memory import MemoryCluster, MemoryStore
from skep.store.proposal import Proposal
from skep.store.schema import SCHEMAS
from tests.builders import a_node, a_service, a_service_spec, a_task, an_overlay
from tests.conformance.manager import a_manager_api
from tests.contract.test_control_loops import leading, wait_for

pytestmark = pytest.mark.timeout(30)


async def damaged(cluster: MemoryCluster, kind: str, id: str, part: str = "") -> MemoryStore:
    """A replica loaded after the head of an object, or another part of it, was damaged."""
    revision = cluster.revision
    damage(cluster, kind, id, part)
    assert cluster.revision == revision + 1
    return MemoryStore(SystemClock(), cluster)


def damage(cluster: MemoryCluster, kind: str, id: str, part: str) -> None:
    cluster.commit(Proposal(puts=((keys.object_key(kind, id, part), b'{"ID": 7, "Spec'),)), None)


async def a_good_service_converges(store: MemoryStore) -> None:
    await store.update(lambda tx: tx.put(a_service("good", replicas=3)))

    def is_assigned() -> bool:
        tasks = store.view().find(Task, service_id="good")
        return sum(task.status.state is TaskState.ASSIGNED for task in tasks) == 3

    await wait_for(store, is_assigned)


def cluster_with(*objects: object) -> MemoryCluster:
    cluster = MemoryCluster()
    store = MemoryStore(SystemClock(), cluster)
    asyncio.run(_put(store, *objects))
    return cluster


async def _put(store: MemoryStore, *objects: object) -> None:
    for one in objects:
        await store.update(lambda tx, one=one: tx.put(one))


@pytest.mark.parametrize("kind", [schema.name for schema in SCHEMAS])
def test_an_object_that_cannot_be_read_stops_nobody_and_says_so(kind: str) -> None:
    cluster = cluster_with(a_node("n1"), a_node("n2"))

    async def live() -> None:
        store = await damaged(cluster, kind, "broken")
        async with leading(store):
            await a_good_service_converges(store)
        (schema,) = (one for one in SCHEMAS if one.name == kind)
        with pytest.raises(Unavailable, match=f"{kind} broken cannot be read: "):
            store.view().resolve(schema.type, "broken")

    asyncio.run(live())


PARTS = [(schema.name, part) for schema in SCHEMAS for part in schema.parts]


def an_object(kind: str, id: str) -> Any:
    match kind:
        case "service":
            return a_service(id, replicas=1)
        case "task":
            return a_task(id, slot=1, node="n1", service=a_service("of-task"))
        case "node":
            return a_node(id)
        case "swarm":
            return Swarm(id=ClusterId(id), spec=DEFAULT_SWARM_SPEC)
    return an_overlay(id)


@pytest.mark.parametrize(("kind", "part"), PARTS)
def test_a_part_that_cannot_be_read_stops_nobody_and_is_told_until_it_is_written_anew(
    kind: str, part: str
) -> None:
    cluster = cluster_with(a_node("n1"), a_node("n2"), an_object(kind, "broken"))

    async def live() -> None:
        store = await damaged(cluster, kind, "broken", part)
        (schema,) = (one for one in SCHEMAS if one.name == kind)
        assert list(store.view().damaged(schema.type)["broken"]) == [part]
        async with leading(store):
            await a_good_service_converges(store)
        fresh, _ = cluster.load()  # whoever loads the store later is told the same
        assert store.view().damaged(schema.type) == fresh.damaged(schema.type)

    asyncio.run(live())


@pytest.mark.parametrize(
    ("kind", "part", "path", "told_in"),
    [
        ("service", "endpoint", "/services/web", "Damage"),
        ("task", "status", "/tasks/t1", "Status.Err"),
        ("task", "status", "/skep/tasks/t1/explain", "Err"),
        ("service", "job", "/skep/services/web/explain", "Summary"),
        ("node", "status", "/nodes/n1", "Status.Message"),
        ("swarm", "freeze", "/swarm", "Damage"),
        ("network", "allocation", "/networks/net1", "Damage"),
    ],
)
async def test_an_object_with_a_part_that_cannot_be_read_says_so_itself(
    kind: str, part: str, path: str, told_in: str
) -> None:
    web = a_service("web")
    task = a_task("t1", slot=1, node="n1", service=web)
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        store = api.store
        assert isinstance(store, MemoryStore)
        await store.update(lambda tx: [tx.put(one) for one in (a_node("n1"), web, task, an_overlay("net1"))])
        (swarm,) = store.view().find(Swarm)
        id = {"service": "web", "task": "t1", "node": "n1", "network": "net1"}.get(kind, swarm.id)

        async def told() -> str:
            answer: Any = await (await client.get(path)).json()
            for name in told_in.split("."):
                answer = answer.get(name, "")
            return str(answer)

        assert "cannot be read" not in await told()
        damage(store.cluster, kind, id, part)
        assert f"its {part} cannot be read: " in await told()
        store.cluster.commit(Proposal(puts=((keys.object_key(kind, id, part), b"{}"),)), None)
        assert "cannot be read" not in await told()


def test_a_service_that_cannot_be_read_keeps_its_tasks() -> None:
    web = a_service("web", replicas=2)
    cluster = cluster_with(a_node("n1"), web, a_task("t1", slot=1, node="n1", service=web))

    async def live() -> None:
        store = await damaged(cluster, "service", "web")
        async with leading(store):
            await a_good_service_converges(store)
            assert [task.id for task in store.view().find(Task, service_id="web") if task.is_wanted] == ["t1"]

    asyncio.run(live())


def test_a_node_that_cannot_be_read_keeps_its_tasks() -> None:
    web = a_service("web", replicas=1)
    everywhere = a_service("everywhere", is_global=True)
    cluster = cluster_with(
        a_node("n1"),
        a_node("n2"),
        web,
        everywhere,
        a_task("t1", slot=1, node="n1", service=web),
        a_task("t2", slot=0, node="n1", service=everywhere),
    )

    async def live() -> None:
        store = await damaged(cluster, "node", "n1")
        async with leading(store):
            await a_good_service_converges(store)
            for id in ("t1", "t2"):
                task = store.view().get(Task, id)
                assert (task.is_wanted, task.status.state) == (True, TaskState.RUNNING)

    asyncio.run(live())


def too_many(tx: Transaction) -> None:
    tx.put(a_service("absurd", replicas=10**9))


def too_many_runs(tx: Transaction) -> None:
    job = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=10**9, total_completions=10**9))
    tx.put(a_service("absurd", spec=replace(a_service_spec("absurd"), mode=job)))


def strange_constraints(tx: Transaction) -> None:
    tx.put(a_service("absurd", constraints=("neither nor",), is_global=True))


def strange_constraints_of_a_replica(tx: Transaction) -> None:
    tx.put(a_service("absurd", constraints=("neither nor",)))


def error_of(service: str) -> Callable[[MemoryStore], str]:
    """What a service or its tasks say about what is wrong."""

    def error(store: MemoryStore) -> str:
        status = store.view().get(Service, service).update_status
        errors = [task.status.err for task in store.view().find(Task, service_id=service)]
        return " ".join([status.message if status is not None else "", *errors])

    return error


@pytest.mark.parametrize(
    ("absurd", "words"),
    [
        (too_many, "at most 100000 tasks, not 1000000000"),
        (too_many_runs, "at most 100000 tasks, not 1000000000"),
        (strange_constraints, "constraint expected one operator"),
        (strange_constraints_of_a_replica, "constraint expected one operator"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_service_that_makes_no_sense_stops_nobody_and_says_so(
    absurd: Callable[[Transaction], None], words: str
) -> None:
    cluster = cluster_with(a_node("n1"))

    async def live() -> None:
        store = MemoryStore(SystemClock(), cluster)
        await store.update(absurd)
        async with leading(store):
            await a_good_service_converges(store)
            await wait_for(store, lambda: words in error_of("absurd")(store))

    asyncio.run(live())


def test_a_network_that_makes_no_sense_stops_nobody_and_its_task_says_so() -> None:
    nonsense = IPAMOptions(configs=(IPAMConfig(subnet="nonsense", gateway="no"),))
    network = an_overlay("bad", subnet="")
    network = replace(network, spec=replace(network.spec, ipam_options=nonsense))
    spec = a_service_spec("absurd")
    attached = replace(spec.task_template, networks=(NetworkAttachmentConfig(target="bad"),))
    cluster = cluster_with(
        a_node("n1"), network, a_service("absurd", spec=replace(spec, task_template=attached))
    )

    async def live() -> None:
        store = MemoryStore(SystemClock(), cluster)
        async with leading(store):
            await a_good_service_converges(store)
            await wait_for(store, lambda: bool(error_of("absurd")(store).strip()))

    asyncio.run(live())


def test_a_node_that_makes_no_sense_gets_nothing_and_stops_nobody() -> None:
    negative = Resources(nano_cpus=-1, memory_bytes=-(10**18))
    cluster = cluster_with(a_node("n1"), a_node("n2", has=negative))

    async def live() -> None:
        store = MemoryStore(SystemClock(), cluster)
        async with leading(store):
            await store.update(
                lambda tx: tx.put(a_service("hungry", replicas=1, reserve=Resources(memory_bytes=1)))
            )
            await wait_for(
                store, lambda: any(task.node_id for task in store.view().find(Task, service_id="hungry"))
            )
            assert {task.node_id for task in store.view().find(Task, service_id="hungry")} == {"n1"}
            await a_good_service_converges(store)

    asyncio.run(live())


def test_a_task_that_makes_no_sense_stops_nobody() -> None:
    """It has no spec, no service and a node that there never was."""
    task = replace(a_task("t1", service="nobody", node="nowhere"), spec=TaskSpec())
    cluster = cluster_with(a_node("n1"), task)

    async def live() -> None:
        store = MemoryStore(SystemClock(), cluster)
        async with leading(store):
            await a_good_service_converges(store)
            await wait_for(store, lambda: store.view().lookup(Task, "t1") is None)

    asyncio.run(live())
