"""Addresses on the ingress network, for published ports: of services, their tasks, and every node, on either store."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from random import Random

from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.control.networks import remove_network
from skep.manager.control_loops.loops import loops
from skep.model.network import Network
from skep.model.node import Node, NodeState
from skep.model.service import NetworkAttachmentConfig, PortConfig, PublishMode, Service
from skep.model.swarm import DEFAULT_SWARM_SPEC, Swarm
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.model.values.ids import NetworkId, new_id
from skep.model.values.times import Timestamp
from skep.store.interface import Store, View
from tests.support.builders import a_docker_node, a_node, a_service, an_overlay
from tests.support.store.store_rigs import FIRST

MESH = PortConfig(target_port=80, published_port=8080)
HOST = PortConfig(target_port=81, published_port=8081, publish_mode=PublishMode.HOST)


@asynccontextmanager
async def leading(store: Store, *, ingress: str = "") -> AsyncIterator[None]:
    """The loops run within, in a cluster with two skep nodes and an ingress network (of the subnet ``ingress``)."""
    network = an_overlay("ingress", subnet=ingress, ingress=True)
    swarm = Swarm(
        id=new_id(),  # type: ignore[arg-type]
        spec=DEFAULT_SWARM_SPEC,
        default_addr_pool=("10.0.0.0/8",),
        subnet_size=24,
    )
    await store.update(lambda tx: [tx.put(one) for one in (swarm, network, a_node("n1"), a_node("n2"))])
    term = await anext(aiter(store.terms(FIRST, "127.0.0.1:2377")))
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(loop.run()) for loop in loops(term, SystemClock(), new_id, Random(1))]
        yield
        for task in running:
            task.cancel()


async def wait_for(store: Store, condition: Callable[[View], object]) -> None:
    """Look after each commit until ``condition``."""
    async with asyncio.timeout(20), store.watch() as watch:
        if condition(store.view()):
            return
        async for _ in watch:
            if condition(store.view()):
                return


def places(attachments: Sequence[NetworkAttachment]) -> dict[str, str]:
    """Network -> address."""
    return {one.network.spec.name: one.addresses[0] for one in attachments if one.network is not None}


def assigned(view: View, service: str) -> list[Task]:
    tasks = view.find(Task, service_id=service)
    return [task for task in tasks if task.status.state >= TaskState.ASSIGNED]


async def test_a_published_port_brings_service_tasks_and_nodes_to_the_ingress_network(store: Store) -> None:
    async with leading(store):
        await store.update(lambda tx: tx.put(a_service("plain", replicas=2, ports=(HOST,))))
        await wait_for(store, lambda view: len(assigned(view, "plain")) == 2)
        view = store.view()
        (ingress,) = view.find(Network)
        assert ingress.ipam_options is not None
        assert ingress.ipam_options.configs[0].subnet == "10.0.0.0/24"
        assert [places(task.networks_attachments) for task in assigned(view, "plain")] == [{}, {}]
        assert [node.attachments for node in view.find(Node)] == [(), ()]

        await store.update(lambda tx: tx.put(a_service("web", replicas=3, ports=(MESH,))))
        await wait_for(store, lambda view: len(assigned(view, "web")) == 3)
        await wait_for(store, lambda view: all(node.attachments for node in view.find(Node)))
        view = store.view()
        own = [places(node.attachments)["ingress"] for node in view.find(Node)]
        tasks = [places(task.networks_attachments)["ingress"] for task in assigned(view, "web")]
        (virtual_ip,) = view.get(Service, "web").endpoint.virtual_ips
        assert virtual_ip.network_id == ingress.id
        assert len({*own, *tasks, virtual_ip.addr}) == 6
        assert all(address.endswith("/24") for address in (*own, *tasks, virtual_ip.addr))


async def test_a_node_comes_to_the_ingress_network_when_it_is_ready_of_whatever_kind_it_is(
    store: Store,
) -> None:
    async with leading(store):
        await store.update(lambda tx: tx.put(a_service("web", ports=(MESH,))))
        unseen = a_node("n3", state=NodeState.UNKNOWN)
        await store.update(lambda tx: [tx.put(unseen), tx.put(a_docker_node("d1"))])
        await wait_for(store, lambda view: view.get(Node, "d1").attachments)
        assert store.view().get(Node, "n3").attachments == ()
        await store.update(lambda tx: tx.put(replace(unseen, status=a_node("n3").status)))
        await wait_for(store, lambda view: view.get(Node, "n3").attachments)
        down = replace(store.view().get(Node, "n3"), status=a_node("n3", state=NodeState.DOWN).status)
        await store.update(lambda tx: tx.put(down))
        await store.update(lambda tx: tx.put(a_node("n4")))
        await wait_for(store, lambda view: view.get(Node, "n4").attachments)
        assert store.view().get(Node, "n3").attachments == down.attachments


async def test_beside_its_own_network_a_task_is_on_the_ingress_network_first(store: Store) -> None:
    async with leading(store):
        net = an_overlay("net1", subnet="10.0.7.0/24", plane="skep")
        template = replace(a_service().spec.task_template, networks=(NetworkAttachmentConfig(target=net.id),))
        web = a_service("web", ports=(MESH,))
        web = replace(web, spec=replace(web.spec, task_template=template))
        await store.update(lambda tx: [tx.put(net), tx.put(web)])
        await wait_for(
            store, lambda view: [t for t in view.find(Task, service_id="web") if t.networks_attachments]
        )
        (task,) = store.view().find(Task, service_id="web")
        assert list(places(task.networks_attachments)) == ["ingress", "net1"]


async def test_a_full_ingress_network_has_tasks_wait_and_say_so(store: Store) -> None:
    """Six addresses: the gateway's, the service's, two nodes', and two for tasks."""
    async with leading(store, ingress="10.0.0.0/29"):
        await store.update(lambda tx: tx.put(a_service("web", replicas=6, ports=(MESH,))))

        def waiting(view: View) -> list[str]:
            return [task.status.err for task in view.find(Task, service_id="web") if task.status.err]

        await wait_for(store, waiting)
        assert (
            "no available IPv4 addresses on this network's address pools: ingress" in waiting(store.view())[0]
        )
        await wait_for(store, lambda view: len(assigned(view, "web")) == 2)
        await store.update(lambda tx: tx.put(a_service("other", ports=(HOST,))))
        await wait_for(store, lambda view: assigned(view, "other"))


async def test_a_task_waits_while_the_ingress_network_has_no_addresses_yet(store: Store) -> None:
    async with leading(store, ingress="10.0.0.0/24"):
        # Removed and made again with a subnet that is taken.
        taken = an_overlay("net1", subnet="10.0.9.0/24")
        await store.update(remove_network, NetworkId("ingress"))
        bare = an_overlay("again", subnet="", ingress=True)
        requested = an_overlay("again", subnet="10.0.9.0/24", ingress=True).ipam_options
        bare = replace(bare, spec=replace(bare.spec, ipam_options=requested))
        await store.update(lambda tx: [tx.put(taken), tx.put(bare)])
        await store.update(lambda tx: tx.put(a_service("web", ports=(MESH,))))

        def reasons(view: View) -> list[str]:
            return [task.status.err for task in view.find(Task, service_id="web") if task.status.err]

        await wait_for(store, reasons)
        assert reasons(store.view())[0].startswith("network again is not allocated: Pool overlaps")
        await store.update(remove_network, taken.id)
        await wait_for(store, lambda view: assigned(view, "web"))
        (task,) = assigned(store.view(), "web")
        assert places(task.networks_attachments)["again"].startswith("10.0.9.")


async def test_without_an_ingress_network_ports_are_published_as_before(store: Store) -> None:
    async with leading(store):
        await store.update(lambda tx: tx.delete(Network, "ingress"))
        await store.update(lambda tx: tx.put(a_service("web", ports=(MESH,))))
        await wait_for(store, lambda view: assigned(view, "web"))
        (task,) = assigned(store.view(), "web")
        assert task.networks_attachments == ()


async def test_nodes_leave_an_ingress_network_that_is_removed(store: Store) -> None:
    async with leading(store):
        await store.update(lambda tx: tx.put(a_service("web", ports=(MESH,))))
        await wait_for(store, lambda view: all(node.attachments for node in view.find(Node)))
        removed = Timestamp("2026-01-01T00:00:00Z")
        await store.update(lambda tx: tx.put(replace(tx.get(Service, "web"), removed_at=removed)))
        kept = [node.attachments for node in store.view().find(Node)]
        await store.update(remove_network, NetworkId("ingress"))
        await wait_for(store, lambda view: not any(node.attachments for node in view.find(Node)))
        assert all(kept)  # until then they stay, though no service publishes a port
