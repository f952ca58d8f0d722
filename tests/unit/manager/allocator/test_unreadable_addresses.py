"""Addresses that the leader cannot read: no other object is given one of their networks, and the wait has a reason."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from random import Random

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.allocator.allocations import node_owner, service_owner
from skep.manager.allocator.loop import Allocator
from skep.manager.allocator.unreadable_addresses import Unread, check_known, unread_addresses
from skep.model.network import Network
from skep.model.node import Node
from skep.model.service import (
    Endpoint,
    EndpointSpec,
    EndpointVirtualIP,
    NetworkAttachmentConfig,
    PortConfig,
    Service,
    ServiceSpec,
)
from skep.model.task import NetworkAttachment, Task, TaskState, TaskStatus
from skep.model.values.ids import new_id
from skep.store.interface import Store, View
from skep.store.kinds import UNKNOWN_SPEC
from tests.support.builders import a_node, a_service_spec, a_task, an_overlay
from tests.support.managers.control_loops import wait_for
from tests.support.store.damage_rigs import MemoryDamage

NEW, RUNNING, SHUTDOWN = TaskState.NEW, TaskState.RUNNING, TaskState.SHUTDOWN
NET = an_overlay("net1")
OTHER = an_overlay("net2", subnet="10.0.2.0/24")
INGRESS = an_overlay("ingress", subnet="10.0.3.0/24", ingress=True)


def on(network: Network, address: str) -> tuple[NetworkAttachment, ...]:
    return (NetworkAttachment(network=network, addresses=(f"{address}/24",)),)


def a_spec(name: str, network: Network, *, image: str = "app:1") -> ServiceSpec:
    spec = a_service_spec(name, image=image)
    networks = (NetworkAttachmentConfig(target=network.id),)
    return replace(spec, task_template=replace(spec.task_template, networks=networks))


async def put(store: Store, *objects: object) -> None:
    for one in objects:
        await store.update(lambda tx, one=one: tx.put(one))


async def a_task_of(store: Store, spec: ServiceSpec, id: str, **fields: object) -> Task:
    service = await store.update(lambda tx: tx.put(Service(id=spec.name, spec=spec)))
    task = replace(a_task(id, service=service), spec_version=service.spec_version, **fields)
    await put(store, task)
    return task


async def a_rig() -> MemoryDamage:
    """A service ``web`` on net1, its task ``old``, and a node on the ingress network, each with an address."""
    rig = MemoryDamage()
    await put(rig.store, NET, OTHER, INGRESS, replace(a_node("n1"), attachments=on(INGRESS, "10.0.3.2")))
    await a_task_of(
        rig.store,
        a_spec("web", NET),
        "old",
        node_id="n1",
        status=TaskStatus(state=RUNNING),
        networks_attachments=on(NET, "10.0.1.3"),
    )
    virtual = (EndpointVirtualIP(network_id=NET.id, addr="10.0.1.2/24"),)
    web = rig.store.view().get(Service, "web")
    await put(rig.store, replace(web, endpoint=Endpoint(virtual_ips=virtual)))
    return rig


def known(view: View) -> Mapping[str, object]:
    return dict(unread_addresses(view))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ((), {}),
        (("task/old.networks",), {"old": {NET.id}}),
        (("task/old.status", "node/n1.status"), {}),
        (("task/old.networks", "spec/web/{version}"), {"old": {NET.id}}),
        (("service/web.endpoint",), {service_owner("web"): {NET.id}}),
        (("service/web",), {service_owner("web"): {NET.id}}),
        (
            ("service/web", "spec/web/{version}", "task/old.networks"),
            {service_owner("web"): None, "old": None},
        ),
        (("node/n1.attachments",), {node_owner("n1"): {INGRESS.id}}),
    ],
)
async def test_of_which_networks_they_may_be(
    keys: tuple[str, ...], expected: Mapping[str, set[str] | None]
) -> None:
    rig = await a_rig()
    version = rig.store.view().get(Service, "web").spec_version
    assert version is not None
    for key in keys:
        await rig.damage("o/" + key.format(version=version.index))
    assert known(rig.store.view()) == {}, "they were read before"
    view = (await rig.load()).view()
    assert known(view) == expected
    for owner, networks in expected.items():
        for network in (NET, OTHER, INGRESS):
            if len(expected) == 1:
                check_known(view, owner, network)  # its own cannot be another's
            if networks is None or network.id in networks:
                with pytest.raises(Unread, match="are unreadable"):
                    check_known(view, "another", network)


async def test_the_addresses_of_a_task_that_has_ended_are_free() -> None:
    rig = await a_rig()
    old = rig.store.view().get(Task, "old")
    await put(rig.store, replace(old, status=TaskStatus(state=SHUTDOWN)))
    await rig.damage("o/task/old.networks")
    assert known((await rig.load()).view()) == {}


@asynccontextmanager
async def allocating(store: Store) -> AsyncIterator[Allocator]:
    async with asyncio.TaskGroup() as group:
        allocator = Allocator(store, SystemClock(), new_id, Random(1))
        running = group.create_task(allocator.run())
        yield allocator
        running.cancel()


def is_released(store: Store, id: str) -> Callable[[], bool]:
    return lambda: store.view().get(Task, id).status.state is TaskState.PENDING


async def test_a_task_waits_for_an_address_until_the_owner_of_unread_ones_has_ended() -> None:
    rig = await a_rig()
    await rig.damage("o/task/old.networks")
    store = await rig.load()
    async with allocating(store):
        for id, network in (("db", NET), ("elsewhere", OTHER)):
            await a_task_of(store, a_spec(id, network), id, status=TaskStatus(state=NEW))
        await wait_for(store, is_released(store, "elsewhere"))
        await wait_for(store, lambda: bool(store.view().get(Task, "db").status.err))
        db = store.view().get(Task, "db")
        assert (db.status.state, db.networks_attachments) == (NEW, ())
        assert db.status.err == (
            "waits for an address of network net1: the addresses of old are unreadable on the leader"
        )
        old = store.view().get(Task, "old")
        await put(store, replace(old, status=TaskStatus(state=SHUTDOWN)))
        await wait_for(store, is_released(store, "db"))
    assert store.view().get(Task, "db").networks_attachments


async def test_a_task_keeps_the_addresses_that_are_stored_though_it_counts_as_new_and_waits() -> None:
    rig = await a_rig()
    waiting = {"status": TaskStatus(state=TaskState.PENDING), "networks_attachments": on(NET, "10.0.1.4")}
    await a_task_of(rig.store, a_spec("db", NET), "db", **waiting)
    virtual = (EndpointVirtualIP(network_id=NET.id, addr="10.0.1.5/24"),)
    await put(rig.store, replace(rig.store.view().get(Service, "db"), endpoint=Endpoint(virtual_ips=virtual)))
    for key in ("o/task/old.networks", "o/task/db.status"):
        await rig.damage(key)
    store = await rig.load()
    async with allocating(store) as allocator:
        await a_task_of(store, a_spec("next", NET), "next", status=TaskStatus(state=NEW))
        await wait_for(store, lambda: bool(store.view().get(Task, "next").status.err))
        assert allocator.state.allocations.addresses.release("db") == {NET.id}


async def test_unread_addresses_of_services_and_nodes_are_replaced_before_others_get_any() -> None:
    rig = await a_rig()
    for key in ("o/service/web.endpoint", "o/node/n1.attachments"):
        await rig.damage(key)
    store = await rig.load()
    await a_task_of(store, a_spec("db", NET), "db", status=TaskStatus(state=NEW))
    async with allocating(store):
        await wait_for(store, lambda: bool(store.view().get(Service, "web").endpoint.virtual_ips))
        assert store.view().damaged(Service) == {}


async def test_of_several_unread_addresses_none_is_given_to_another_owner() -> None:
    rig = await a_rig()
    held = {"web": "10.0.1.4/24", "db": "10.0.1.5/24"}
    await put(rig.store, Service(id="db", spec=a_spec("db", NET)))
    for id, address in held.items():
        virtual = (EndpointVirtualIP(network_id=NET.id, addr=address),)
        service = rig.store.view().get(Service, id)
        await put(rig.store, replace(service, endpoint=Endpoint(virtual_ips=virtual)))
        await rig.damage(f"o/service/{id}.endpoint")
    store = await rig.load()
    async with allocating(store):
        await wait_for(store, lambda: all(one.endpoint.virtual_ips for one in store.view().find(Service)))
    given = [one.endpoint.virtual_ips[0].addr for one in store.view().find(Service)]
    assert not set(given) & set(held.values())
    assert len(set(given)) == 2


@pytest.mark.parametrize("is_status_read", [True, False])
async def test_a_task_without_a_spec_is_not_released_and_does_not_go_back(is_status_read: bool) -> None:
    rig = MemoryDamage()
    await put(rig.store, NET, OTHER)
    before = TaskStatus(state=NEW if is_status_read else TaskState.PENDING)
    old = await a_task_of(rig.store, a_spec("web", NET), "old", status=before)
    changed = replace(rig.store.view().get(Service, "web"), spec=a_spec("web", NET, image="app:2"))
    await put(rig.store, changed)
    assert old.spec_version is not None
    await rig.damage(f"o/spec/web/{old.spec_version.index}")
    if not is_status_read:
        await rig.damage("o/task/old.status")
    store = await rig.load()
    async with allocating(store):
        if is_status_read:
            await wait_for(store, lambda: store.view().get(Task, "old").status.err == UNKNOWN_SPEC)
        await a_task_of(store, a_spec("db", OTHER), "db", status=TaskStatus(state=NEW))
        await wait_for(store, is_released(store, "db"))
    assert store.view().get(Task, "old").status.state is NEW
    assert ("status" in store.view().damaged(Task).get("old", ())) is not is_status_read


@pytest.mark.parametrize("unread", [INGRESS, NET])
async def test_nothing_is_taken_away_while_a_network_cannot_be_read(unread: Network) -> None:
    rig = await a_rig()
    port = PortConfig(target_port=80, published_port=8080)
    spec = replace(a_spec("web", NET), endpoint_spec=EndpointSpec(ports=(port,)))
    addresses = {INGRESS.id: "10.0.3.3/24", NET.id: "10.0.1.2/24"}
    virtual = tuple(EndpointVirtualIP(network_id=id, addr=one) for id, one in addresses.items())
    endpoint = Endpoint(spec=spec.endpoint_spec, ports=(port,), virtual_ips=virtual)
    web = replace(rig.store.view().get(Service, "web"), spec=spec, endpoint=endpoint)
    await put(rig.store, web)
    node = rig.store.view().get(Node, "n1")
    await rig.damage(f"o/network/{unread.id}")
    store = await rig.load()
    async with allocating(store):
        web = store.view().get(Service, "web")
        next_one = replace(a_task("next", service=web), spec_version=web.spec_version)
        await put(store, replace(next_one, status=TaskStatus(state=NEW)))
        await wait_for(store, lambda: bool(store.view().get(Task, "next").status.err))
        assert unread.id in store.view().get(Task, "next").status.err
        assert sorted(store.view().get(Service, "web").endpoint.virtual_ips, key=str) == sorted(
            virtual, key=str
        )
        assert store.view().get(Node, "n1").attachments == node.attachments
        await put(store, unread)
        await wait_for(store, is_released(store, "next"))
    attached = store.view().get(Task, "next").networks_attachments
    assert [one.network and one.network.id for one in attached] == [INGRESS.id, NET.id]
    assert store.view().get(Service, "web").endpoint.virtual_ips == virtual
