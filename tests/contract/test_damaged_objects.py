"""One object of each kind that cannot be read, or makes no sense: all others converge, and it says so itself."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import AlreadyExists, InvalidArgument, Unavailable
from skep.manager.control.networks import create_network
from skep.manager.control.services import create_service
from skep.manager.control.tasks import damage_of
from skep.manager.dispatcher.assignments import everything
from skep.manager.dispatcher.node_sessions.registration import Registration, take_session
from skep.manager.dispatcher.statuses import StatusReport, record_status
from skep.manager.membership.service import resign
from skep.manager.routes import application
from skep.manager.routes.warnings import damage_warnings
from skep.model.container import ContainerSpec, SecretReference
from skep.model.network import Network, NetworkSpec
from skep.model.node import (
    Availability,
    ManagerStatus,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    Reachability,
    SessionOwner,
)
from skep.model.secret import Secret, SecretSpec
from skep.model.service import PortConfig, PublishMode, Service
from skep.model.swarm import DEFAULT_SWARM_SPEC, Swarm
from skep.model.task import Task, TaskState
from skep.model.values.ids import ClusterId, NetworkId, NodeId, SecretId, SessionId
from skep.model.values.meta import Driver
from skep.model.values.times import ZERO_TIME
from skep.store import keys
from skep.store.interface import Deleted, InUse, Transaction
from skep.store.memory import MemoryCluster, MemoryStore
from skep.store.schema import SCHEMAS
from skep.store.transactions.proposal import Proposal
from tests.conformance.manager import a_manager_api
from tests.support.builders import a_node, a_service, a_service_spec, a_task, an_overlay
from tests.support.managers.control_loops import leading, wait_for
from tests.support.store.damage_rigs import (
    DamageRig,
    a_good_service_converges,
    cluster_with,
    damage,
    etcd_damage,
    memory_damage,
    put_all,
)

pytestmark = pytest.mark.timeout(30)


async def damaged(cluster: MemoryCluster, kind: str, id: str, part: str = "") -> MemoryStore:
    """A replica loaded after the head of an object, or another part of it, was damaged."""
    revision = cluster.revision
    damage(cluster, kind, id, part)
    assert cluster.revision == revision + 1
    return MemoryStore(SystemClock(), cluster)


@pytest.mark.parametrize("kind", [schema.name for schema in SCHEMAS])
def test_an_unreadable_object_shows_its_error_and_affects_no_other(kind: str) -> None:
    cluster = cluster_with(a_node("n1"), a_node("n2"))

    async def live() -> None:
        store = await damaged(cluster, kind, "broken")
        async with leading(store):
            await a_good_service_converges(store)
        (schema,) = (one for one in SCHEMAS if one.name == kind)
        if schema.has_placeholder:
            assert damage_of(store.view(), schema.type, "broken").startswith("it cannot be read: ")
            return
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
def test_an_unreadable_part_affects_no_other_and_is_reported_until_it_is_rewritten(
    kind: str, part: str
) -> None:
    cluster = cluster_with(a_node("n1"), a_node("n2"), an_object(kind, "broken"))

    async def live() -> None:
        store = await damaged(cluster, kind, "broken", part)
        (schema,) = (one for one in SCHEMAS if one.name == kind)
        assert list(store.view().damaged(schema.type)["broken"]) == [part]
        async with leading(store):
            await a_good_service_converges(store)
        fresh, _ = cluster.load()  # a later load of the store reports the same
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

        async def reported() -> str:
            response: Any = await (await client.get(path)).json()
            for name in told_in.split("."):
                response = response.get(name, "")
            return str(response)

        assert "cannot be read" not in await reported()
        damage(store.cluster, kind, id, part)
        assert f"its {part} cannot be read: " in await reported()
        store.cluster.commit(Proposal(puts=((keys.object_key(kind, id, part), b"{}"),)), None)
        assert "cannot be read" not in await reported()


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.needs("etcd", "setpriv"))])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[DamageRig]:
    async with memory_damage() if request.param == "memory" else etcd_damage(tmp_path) as rig:
        yield rig


async def test_a_service_that_cannot_be_read_keeps_its_tasks(rig: DamageRig) -> None:
    web = a_service("web", replicas=2)
    await put_all(rig.store, a_node("n1"), web, a_task("t1", slot=1, node="n1", service=web))
    await rig.damage("o/service/web")
    store = await rig.load()
    assert list(store.view().unreadable(Service)) == ["web"]
    async with leading(store):
        await a_good_service_converges(store)
        assert [task.id for task in store.view().find(Task, service_id="web") if task.is_wanted] == ["t1"]
    with pytest.raises(Unavailable, match="service web cannot be read"):
        await store.update(lambda tx: tx.delete(Service, "web"))
    with pytest.raises(AlreadyExists, match="belongs to service web, which cannot be read"):
        await store.update(lambda tx: tx.put(a_service("web", id="second")))


async def test_a_port_of_a_service_that_cannot_be_read_is_refused_as_of_any_other(rig: DamageRig) -> None:
    await put_all(rig.store, a_service("web", ports=(PortConfig(target_port=80, published_port=8080),)))
    await rig.damage("o/service/web")
    store = await rig.load()
    with pytest.raises(InvalidArgument, match="8080 belongs to service web, which cannot be read"):
        await store.update(
            lambda tx: tx.put(a_service("other", ports=(PortConfig(target_port=80, published_port=8080),)))
        )


async def test_a_manager_that_cannot_read_a_node_does_not_overwrite_its_spec_when_it_leaves(
    rig: DamageRig,
) -> None:
    status = ManagerStatus(addr="10.0.0.1:2377", reachability=Reachability.REACHABLE)
    await put_all(rig.store, replace(a_node("n1"), manager_status=status), a_node("n2"))
    await rig.damage("o/node/n1")
    store = await rig.load()
    with pytest.raises(Unavailable, match="the record of node n1 is unreadable on this manager"):
        await store.update(resign, NodeId("n1"))


async def test_a_node_that_cannot_be_read_keeps_its_tasks_its_session_and_its_role(rig: DamageRig) -> None:
    web, everywhere = a_service("web", replicas=1), a_service("everywhere", is_global=True)
    status = ManagerStatus(addr="10.0.0.1:2377", reachability=Reachability.REACHABLE)
    session = SessionOwner(manager_id=NodeId("m1"), session_id=SessionId("s1"))
    n1 = replace(a_node("n1"), manager_status=status, session=session)
    t1 = a_task("t1", slot=1, node="n1", service=web)
    t2 = a_task("t2", slot=0, node="n1", service=everywhere)
    await put_all(rig.store, n1, a_node("n2"), web, everywhere, t1, t2)
    await rig.damage("o/node/n1")
    store = await rig.load()
    node = store.view().get(Node, "n1")
    assert (node.spec.role, node.spec.availability) == (NodeRole.MANAGER, Availability.PAUSE)
    assert (node.status, node.session, node.description) == (n1.status, session, n1.description)
    async with leading(store):
        await a_good_service_converges(store)
        for id in ("t1", "t2"):
            task = store.view().get(Task, id)
            assert (task.is_wanted, task.status.state) == (True, TaskState.RUNNING)
        await store.update(_register, "n1")  # it can begin another session
        await store.update(lambda tx: tx.put(replace(tx.get(Node, "n1"), spec=NodeSpec(name="again"))))
    assert (store.view().get(Node, "n1").spec.name, store.view().unreadable(Node)) == ("again", {})


def _register(tx: Transaction, id: str) -> None:
    take_session(
        tx,
        Registration(
            node_id=NodeId(id),
            manager_id=NodeId("m2"),
            session_id=SessionId("s2"),
            description=NodeDescription(hostname=id),
            address="10.0.0.9",
        ),
    )


async def test_a_status_that_cannot_be_read_loses_no_task_and_is_mended_by_the_nodes_next_report(
    rig: DamageRig,
) -> None:
    web = a_service("web", replicas=1)
    session = SessionOwner(manager_id=NodeId("m1"), session_id=SessionId("s1"))
    node = replace(a_node("n1"), session=session)
    await put_all(rig.store, node, web, a_task("t1", slot=1, node="n1", service=web))
    running = rig.store.view().get(Task, "t1").status
    assert running.state is TaskState.RUNNING
    await rig.damage("o/task/t1.status")
    store = await rig.load()
    async with leading(store):
        await a_good_service_converges(store)
        (task,) = store.view().find(Task, service_id="web")
        assert (task.id, task.is_wanted, task.status.state) == ("t1", True, TaskState.ASSIGNED)
        report = StatusReport(
            node_id=NodeId("n1"), session_id=session.session_id, task_id=task.id, status=running
        )
        assert await store.update(record_status, report)
    assert store.view().get(Task, "t1").status == running
    assert store.view().damaged(Task) == {}


async def test_what_was_known_before_it_was_damaged_goes_on_through_a_load_of_the_whole_store(
    rig: DamageRig,
) -> None:
    web = a_service("web", replicas=2)
    task = a_task("t1", slot=1, node="n1", service=web)
    await put_all(rig.store, a_node("n1"), web, task)
    before = [rig.store.view().get(kind, id) for kind, id in KNOWN]
    for key in ("o/node/n1", "o/service/web", "o/task/t1", "o/task/t1.status", "o/node/n1.status"):
        await rig.damage(key)
    await rig.store.barrier()
    assert "status" in rig.store.view().damaged(Node)["n1"]
    async with rig.store.watch() as watch:
        await rig.reload()
        await rig.store.update(lambda tx: tx.put(a_node("n2")))
        async for commit in watch:
            assert not any(isinstance(event, Deleted) for event in commit.events)
            if rig.store.view().lookup(Node, "n2") is not None:
                break
    assert [rig.store.view().get(kind, id) for kind, id in KNOWN] == before
    assert list(rig.store.view().unreadable(Service)) == ["web"]


KNOWN: tuple[tuple[type[Any], str], ...] = ((Node, "n1"), (Service, "web"), (Task, "t1"))


async def test_names_and_uses_that_cannot_be_read_hold_all_the_same_and_are_mended(rig: DamageRig) -> None:
    secret = Secret(id=SecretId("s1"), spec=SecretSpec(name="key"))
    reference = SecretReference(secret_id=secret.id, secret_name="key")
    spec = a_service_spec("web")
    container = replace(spec.task_template.container_spec or ContainerSpec(), secrets=(reference,))
    spec = replace(spec, task_template=replace(spec.task_template, container_spec=container))
    await put_all(rig.store, secret, a_service("web", spec=spec))
    for prefix in ("n/", "r/"):
        for key in await rig.keys(prefix):
            await rig.damage(key)
    store = await rig.load()
    with pytest.raises(InUse):
        await store.update(lambda tx: tx.delete(Secret, secret.id))
    with pytest.raises(AlreadyExists):
        await store.update(lambda tx: tx.put(a_service("web", id="second")))
    labeled = replace(spec, labels={"a": "b"})
    await store.update(lambda tx: tx.put(replace(tx.get(Service, "web"), spec=labeled)))
    again = await rig.load()
    with pytest.raises(AlreadyExists):
        await again.update(lambda tx: tx.put(a_service("web", id="second")))


async def test_an_ingress_network_that_cannot_be_read_is_not_taken_for_missing(rig: DamageRig) -> None:
    spec = NetworkSpec(name="ingress", driver_configuration=Driver(name="overlay"), ingress=True)
    await put_all(rig.store, Network(id=NetworkId("net1"), spec=spec))
    await rig.damage("o/network/net1")
    store = await rig.load()
    new_id = partial(next, iter(("one", "two", "three", "four")))
    port = PortConfig(target_port=80, published_port=90, publish_mode=PublishMode.INGRESS)
    web = a_service_spec("web", ports=(port,))
    with pytest.raises(Unavailable, match="net1 cannot be read"):
        await store.update(partial(create_service, new_id=new_id, new_name=new_id, now=ZERO_TIME), web)
    another = replace(spec, name="another")
    with pytest.raises(Unavailable, match="net1 cannot be read"):
        await store.update(partial(create_network, new_id=new_id, now=ZERO_TIME), another)


async def test_with_everything_damaged_nothing_is_taken_away(rig: DamageRig) -> None:
    web = a_service("web", replicas=2)
    tasks = [a_task(f"t{slot}", slot=slot, node="n1", service=web) for slot in (1, 2)]
    await put_all(rig.store, a_node("n1"), web, *tasks)
    for key in [*await rig.keys("o/"), *await rig.keys("n/")]:
        await rig.damage(key)
    store = await rig.load()
    stored = await rig.keys("o/")
    async with leading(store):
        await store.update(lambda tx: tx.put(a_node("n2")))
        change, _ = everything(store.view(), NodeId("n1"))
        assert (change.complete, change.removed_tasks) == (False, ())
        await wait_for(store, lambda: store.view().lookup(Node, "n2") is not None)
    assert set(stored) <= set(await rig.keys("o/"))
    warnings = list(damage_warnings(store.view()))
    assert any("task t1" in warning and "cannot be read" in warning for warning in warnings)
    assert len(warnings) <= 11
