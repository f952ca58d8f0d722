"""``/skep/services/{id}/explain``: figures of what other services have reserved."""

import asyncio
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.routes import application
from skep.manager.routes.extensions.explain import held_words
from skep.manager.routes.network_answers import describe_network
from skep.model.container import ContainerSpec, Mount
from skep.model.network import Network, NetworkSpec
from skep.model.node import Availability, CutOff
from skep.model.node_reports.node_refusals import NodeRefusal, no_node_text
from skep.model.options.freezes import ChangeFreeze
from skep.model.service import PortConfig, PublishMode, Resources, Service, UpdateState, UpdateStatus
from skep.model.swarm import Swarm
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.model.values.ids import ClusterId, NetworkId, NodeId
from skep.model.values.meta import Driver
from skep.model.values.times import Timestamp
from skep.store.interface import Object
from skep.store.memory import MemoryStore
from tests.conformance.manager import a_manager_api
from tests.support.builders import a_cluster_volume, a_node, a_service, a_task

MIB = 1 << 20
REFUSED = no_node_text(NodeRefusal.RESOURCES.text(2))


def a_pending_task(memory: int, **fields: Any) -> tuple[Object, Task]:
    web = a_service("web", replicas=1, reserve=Resources(memory_bytes=memory), **fields)
    task = a_task("t1", service=web, state=TaskState.PENDING)
    return web, replace(task, status=replace(task.status, err=REFUSED))


async def explained(*objects: Object) -> dict[str, Any]:
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        for node in api.store.view().find(type(a_node("x"))):
            objects = (*objects, replace(node, spec=replace(node.spec, availability=Availability.DRAIN)))
        for one in objects:
            await api.store.update(lambda tx, one=one: tx.put(one))
        async with client.get("/skep/services/web/explain") as response:
            assert response.status == 200
            found: dict[str, Any] = await response.json()
            return found


def test_a_service_that_waits_for_reserved_memory_names_the_node_that_comes_closest() -> None:
    db = a_service("db", reserve=Resources(memory_bytes=600 * MIB))
    small, large = (
        a_node("n1", has=Resources(memory_bytes=1000 * MIB)),
        a_node("n2", has=Resources(memory_bytes=1200 * MIB)),
    )
    used = (a_task("d1", service=db, node="n1"), a_task("d2", service=db, node="n2"))
    found = asyncio.run(explained(small, large, db, *used, *a_pending_task(800 * MIB)))
    words = f"needs 800 MiB of memory; {REFUSED}; n2 comes closest: 600 MiB of memory not reserved"
    assert found["Reason"] == words
    assert found["Summary"] == f"{words}; 0 of 1 tasks run"


def test_figures_are_not_shown_for_nodes_that_other_filters_refuse() -> None:
    db = a_service("db", reserve=Resources(memory_bytes=600 * MIB))
    used = a_task("d1", service=db, node="n1")
    node, waiting = (
        a_node("n1", has=Resources(memory_bytes=1000 * MIB)),
        a_pending_task(800 * MIB, constraints=("node.hostname==n2",)),
    )
    found = asyncio.run(explained(node, db, used, *waiting))
    assert found["Reason"] == f"needs 800 MiB of memory; {REFUSED}"


@pytest.mark.parametrize(
    ("other", "is_stopping", "kind"),
    [("tiny", False, "no-address"), ("tiny", True, "not-allocated"), ("other", True, "no-address")],
)
def test_a_network_without_addresses_is_full_for_good_unless_a_task_on_it_stops(
    other: str, is_stopping: bool, kind: str
) -> None:
    web, db = a_service("web", replicas=1), a_service("db")
    task = a_task("t1", service=web, state=TaskState.NEW)
    err = "no available IPv4 addresses on this network's address pools: tiny (tiny)"
    task = replace(task, status=replace(task.status, err=err), node_id=NodeId(""))
    desired = TaskState.SHUTDOWN if is_stopping else TaskState.RUNNING
    on = replace(
        a_task("d1", service=db, node="n1", desired=desired),
        networks_attachments=(NetworkAttachment(network=Network(id=NetworkId(other))),),
    )
    found = asyncio.run(explained(a_node("n1"), web, db, task, on))
    assert (found["Problem"]["Kind"], found["Reason"]) == (kind, err)
    change = "skep network update --subnet-add SUBNET tiny adds addresses" if kind == "no-address" else ""
    assert found.get("SmallestChange", "") == change


@pytest.mark.parametrize("has_volume", [False, True])
def test_a_cluster_volume_that_does_not_exist_is_named(has_volume: bool) -> None:
    refused = no_node_text(NodeRefusal.CLUSTER_VOLUMES.text(1))
    mount = Mount(type="cluster", source="cv", target="/d")
    web = a_service("web", replicas=1)
    template = replace(web.spec.task_template, container_spec=ContainerSpec(image="w", mounts=(mount,)))
    web = replace(web, spec=replace(web.spec, task_template=template))
    task = a_task("t1", service=web, state=TaskState.PENDING)
    task = replace(task, status=replace(task.status, err=refused))
    volumes = (a_cluster_volume("cv"),) if has_volume else ()
    found = asyncio.run(explained(a_node("n1"), web, task, *volumes))
    missing = "" if has_volume else "; the cluster has no volume cv"
    assert found["Reason"] == f"needs the volume cv; {refused}{missing}"


async def test_a_freeze_is_no_cause_of_an_update_which_it_does_not_hold_back() -> None:
    swarm = Swarm(
        id=ClusterId("c"), change_freezes={"": ChangeFreeze(until=Timestamp("2100-01-01T00:00:00Z"))}
    )
    store = MemoryStore(SystemClock())
    await store.update(lambda tx: tx.put(swarm))
    web = a_service("web")
    assert held_words(store.view(), web).startswith("the cluster is frozen until")
    for state in (UpdateState.UPDATING, UpdateState.ROLLBACK_STARTED):
        assert held_words(store.view(), replace(web, update_status=UpdateStatus(state=state))) == ""
    done = UpdateStatus(state=UpdateState.COMPLETED)
    assert held_words(store.view(), replace(web, update_status=done)) != ""


@pytest.mark.parametrize(("encrypted", "check"), [(True, "encrypted"), (False, "overlay")])
def test_a_service_and_its_network_name_the_nodes_that_are_cut_off_on_it(encrypted: bool, check: str) -> None:
    options = {"encrypted": ""} if encrypted else {}
    driver = Driver(name="overlay", options=options)
    network = Network(
        id=NetworkId("net"), spec=NetworkSpec(name="net", driver_configuration=driver), driver_state=driver
    )
    cut_off = tuple(
        CutOff(check=one, port=port, peers=("n1",))
        for one, port in (("overlay", "4789/udp"), ("encrypted", "4799/udp"))
    )
    here = (NetworkAttachment(network=network, addresses=("10.0.9.2/24",)),)
    nodes = (a_node("n1"), replace(a_node("n2"), cut_off=cut_off, attachments=here))
    web = a_service("web", replicas=3)
    tasks = [
        replace(
            a_task(f"t{slot}", service=web, slot=slot, node=node, state=TaskState.RUNNING),
            networks_attachments=here,
        )
        for slot, node in ((1, "n1"), (2, "n2"), (3, "n2"))
    ]
    failing = next(one for one in cut_off if one.check == check)
    words = f"is cut off on {failing.networks}: {failing.port} fails between this node and n1"
    found = asyncio.run(explained(*nodes, network, web, *tasks))
    assert found["Summary"] == f"3 of 3 tasks run: healthy; 2 tasks on n2, which {words}"
    store = MemoryStore(SystemClock())
    asyncio.run(store.update(lambda tx: [tx.put(one) for one in (*nodes, network, web, *tasks)]))
    shown = asyncio.run(describe_network(store.view(), network, verbose=False))
    assert shown["Warnings"][-1] == f"n2 {words}"


async def test_a_service_that_waits_for_a_host_mode_port_names_the_services_that_have_it() -> None:
    port = PortConfig(target_port=80, published_port=9090, publish_mode=PublishMode.HOST)
    refused = no_node_text(NodeRefusal.HOST_PORT.text(1))
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        view = api.store.view()
        drained = [
            replace(node, spec=replace(node.spec, availability=Availability.DRAIN))
            for node in view.find(type(a_node("x")))
        ]
        services = [a_service("db", ports=(port,)), a_service("web", replicas=1, ports=(port,))]
        await api.store.update(lambda tx: [tx.put(one) for one in (*drained, a_node("n1"), *services)])
        db, web = (api.store.view().find(Service, name=name)[0] for name in ("db", "web"))
        pending = a_task("t1", service=web, state=TaskState.PENDING)
        pending = replace(pending, status=replace(pending.status, err=refused))
        held = a_task("d1", service=db, node="n1", state=TaskState.RUNNING)
        await api.store.update(lambda tx: [tx.put(one) for one in (pending, held)])
        async with client.get("/skep/services/web/explain") as response:
            found = await response.json()
    assert found["Reason"] == f"needs port 9090/tcp; {refused}; 9090/tcp is in use by db"
