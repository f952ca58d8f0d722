"""Networks as the leader's loops serve them: room that comes back, room that is added, subnets that are held."""

import asyncio
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from skep.api.formats.service_form import settled
from skep.manager.control.networks import add_subnets, create_network, remove_network
from skep.manager.control.services import create_service, remove_service
from skep.model.network import IPAMConfig, IPAMOptions, Network, NetworkSpec
from skep.model.node import EngineDescription, EnginePlugin
from skep.model.service import NetworkAttachmentConfig, ReplicatedService, Service, ServiceMode
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, new_id
from skep.model.values.meta import Driver
from skep.model.values.times import Timestamp
from skep.store.interface import Store
from skep.store.memory import MemoryStore
from skep.store.transactions.proposal import Proposal
from tests.support.builders import a_node, a_service_spec
from tests.support.managers.control_loops import leading
from tests.support.store.store_rigs import memory_rig

NOW = Timestamp("2026-01-02T03:04:05Z")


@pytest.fixture
async def store():
    async with memory_rig() as rig:
        assert isinstance(rig.store, MemoryStore)
        node = a_node("n1")
        plugins = (EnginePlugin(type="Network", name="overlay"),)
        engine = EngineDescription(engine_version="1", labels={"skep.node": "true"}, plugins=plugins)
        able = replace(node, description=replace(node.description, engine=engine))
        await rig.store.update(lambda tx: tx.put(able))
        yield rig.store


async def wait_for(store: Store, condition: Callable[[], bool]) -> None:
    """Look after each commit until ``condition``."""
    async with store.watch(Service, Task, Network) as watch:
        if condition():
            return
        async for _ in watch:
            if condition():
                return


async def a_network(store: Store, name: str, subnet: str) -> Network:
    ipam = IPAMOptions(driver=Driver(name="default"), configs=(IPAMConfig(subnet=subnet),))
    spec = NetworkSpec(name=name, driver_configuration=Driver(name="overlay"), ipam_options=ipam)
    return await store.update(create_network, spec, new_id=new_id, now=NOW)


async def a_service_on(store: Store, network: Network, replicas: int) -> Service:
    spec = a_service_spec("web")
    template = replace(spec.task_template, networks=(NetworkAttachmentConfig(target=network.id),))
    mode = ServiceMode(replicated=ReplicatedService(replicas=replicas))
    requested = settled(replace(spec, task_template=template, mode=mode))
    return await store.update(create_service, requested, new_id=new_id, new_name=str, now=NOW)


def addresses(store: Store) -> list[str]:
    return [
        address
        for task in store.view().find(Task)
        if task.status.state > TaskState.NEW
        for one in task.networks_attachments
        for address in one.addresses
    ]


def waiting(store: Store) -> list[str]:
    return [task.status.err for task in store.view().find(Task) if task.status.err]


async def end(store: Store, *states: TaskState) -> None:
    """Every task has stopped, as its node would report."""

    def stop(tx):
        for task in tx.find(Task):
            if task.desired_state > TaskState.RUNNING:
                tx.put(replace(task, status=replace(task.status, state=TaskState.SHUTDOWN)))

    await store.update(stop)


async def test_tasks_without_an_address_say_so_and_go_on_when_the_network_grows(store: Store) -> None:
    async with leading(store):
        network = await a_network(store, "tiny", "10.9.0.0/29")
        await a_service_on(store, network, 6)
        await wait_for(store, lambda: (len(addresses(store)), len(waiting(store))) == (4, 2))
        assert waiting(store)[0].startswith(
            "no available IPv4 addresses on this network's address pools: tiny"
        )
        await store.update(add_subnets, network.id, [IPAMConfig(subnet="10.9.1.0/29")])
        await wait_for(store, lambda: len(addresses(store)) == 6)
    assert len(set(addresses(store))) == 6
    assert sum(one.startswith("10.9.1.") for one in addresses(store)) == 2


async def test_a_subnet_is_given_again_when_the_last_task_of_a_removed_network_has_ended(
    store: Store,
) -> None:
    async with leading(store):
        first = await a_network(store, "first", "10.9.0.0/29")
        service = await a_service_on(store, first, 2)
        await wait_for(
            store, lambda: [task.node_id for task in store.view().find(Task)] == [NodeId("n1"), NodeId("n1")]
        )
        await store.update(remove_service, service.id, now=NOW)
        await store.update(remove_network, first.id)  # right after: who uses it is going
        second = await a_network(store, "second", "10.9.0.0/29")
        await wait_for(
            store, lambda: all(task.desired_state is TaskState.REMOVE for task in store.view().find(Task))
        )
        assert store.view().get(Network, second.id).ipam_options is None
        await end(store)
        await wait_for(store, lambda: store.view().get(Network, second.id).ipam_options is not None)
    assert store.view().get(Network, second.id).driver_state.name == "overlay"


async def test_networks_from_before_their_claims_get_them_and_claims_of_none_are_free(
    store: MemoryStore,
) -> None:
    """A leader that knows of no such claims allocates without them, and leaves them when it removes a network."""
    subnet = "i/10.0.0.0%2F24"
    claims = ("v/4096", subnet)
    async with leading(store):
        first = await a_network(store, "first", "10.0.0.0/24")
        await wait_for(store, lambda: store.view().get(Network, first.id).driver_state.options)
    store.cluster.commit(Proposal(deletes=claims), None)
    async with leading(store):
        await wait_for_keys(store, claims, f"network/{first.id}")
    await store.update(remove_network, first.id)
    await wait_for(store, lambda: store.view().lookup(Network, first.id) is None)
    claims = ("v/4097", subnet)  # ids go round
    store.cluster.commit(Proposal(puts=tuple((claim, b"network/gone") for claim in claims)), None)
    async with leading(store):
        second = await a_network(store, "second", "10.0.0.0/24")
        await wait_for_keys(store, claims, f"network/{second.id}")


async def wait_for_keys(store: MemoryStore, names: tuple[str, ...], value: str) -> None:
    while {entry.value for name in names if (entry := store.cluster.log.get(name))} != {value.encode()}:  # noqa: ASYNC110 - no object shows a claim
        await asyncio.sleep(0.01)
