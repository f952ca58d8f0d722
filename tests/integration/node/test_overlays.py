"""Overlay networks between nodes: containers' namespaces that reach each other over VXLAN."""

import asyncio
import select
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from ipaddress import IPv4Address
from pathlib import Path

import msgspec
import pytest

from skep.dataplane.addresses import mac_of
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.repair_counts import Repairs
from skep.dataplane.netns.state import NamespaceState
from skep.dataplane.overlays import node_reconciler
from skep.dataplane.plan.overlay import INGRESS_BRIDGE
from skep.errors import AlreadyExists, FailedPrecondition, SkepError
from skep.model.networks.sandbox import PublishedPort, Sandbox
from skep.model.networks.tables import TableEndpoint, TableService
from skep.model.service import PublishMode
from skep.model.values.ids import NetworkId, ServiceId, TaskId, new_container_id
from tests.support.networks.overlay_lab import (
    DUAL,
    INGRESS,
    TWO_SUBNETS,
    WEB,
    OverlayLab,
    a_container,
    carry,
    place,
    reaches,
    shell,
    try_shell,
)

TEN_MEGABYTES = 10 << 20


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[OverlayLab]:
    async with OverlayLab(tmp_path).running(3) as lab:
        yield lab


async def test_containers_of_three_nodes_reach_each_other(lab: OverlayLab) -> None:
    async with lab.networks() as networks:
        ends = [
            await node.attach(network, place(WEB, f"10.0.1.{number}/24"))
            for number, (node, network) in enumerate(zip(lab.nodes, networks, strict=True), 5)
        ]
        near = await lab.nodes[0].attach(networks[0], place(WEB, "10.0.1.9/24"))
        assert await reaches(near, "10.0.1.5"), "on one node they need no table"
        lab.tell(WEB)
        await lab.apply(networks)
        for end in (*ends, near):
            for other in (*ends, near):
                assert await reaches(end, other.endpoints[0].address)
        namespaces = lab.nodes[0].namespaces
        assert await carry(namespaces, ends[2], ends[0], "10.0.1.7", TEN_MEGABYTES) == TEN_MEGABYTES
        assert "mtu 1450" in await shell(ends[0].netns, "ip link show eth0")


async def test_interfaces_are_in_the_order_of_the_places_and_the_gateway_is_last(lab: OverlayLab) -> None:
    async with lab.networks() as networks:
        end = await lab.nodes[0].attach(networks[0], place(INGRESS, "10.0.0.7/24"), place(WEB, "10.0.1.5/24"))
        assert [(one.interface, one.network_name, one.address) for one in end.endpoints] == [
            ("eth0", "ingress", "10.0.0.7"),
            ("eth1", "web", "10.0.1.5"),
        ]
        assert [one.mac_address for one in end.endpoints] == ["02:42:0a:00:00:07", "02:42:0a:00:01:05"]
        assert end.interface == "eth2"
        addresses = await shell(end.netns, "ip -o -4 addr")
        for line in (
            "eth0    inet 10.0.0.7/24",
            "eth1    inet 10.0.1.5/24",
            f"eth2    inet {end.address}/16",
        ):
            assert line in addresses
        assert f"default via {end.gateway} dev eth2" in await shell(end.netns, "ip route")


async def test_internal_networks_alone_have_no_way_out(lab: OverlayLab) -> None:
    inside = msgspec.structs.replace(WEB, is_internal=True)
    async with lab.networks() as networks:
        end = await lab.nodes[0].attach(networks[0], place(inside, "10.0.1.5/24"))
        assert (end.address, end.gateway, end.port) == ("", "", "")
        assert "default" not in await shell(end.netns, "ip route")
        both = await lab.nodes[0].attach(
            networks[0], place(inside, "10.0.1.6/24"), place(TWO_SUBNETS, "10.0.2.6/24")
        )
        assert "default" in await shell(both.netns, "ip route")


async def test_an_encrypted_network_is_refused_and_leaves_nothing(lab: OverlayLab) -> None:
    secret = msgspec.structs.replace(WEB, is_encrypted=True)
    async with lab.networks() as networks:
        with pytest.raises(FailedPrecondition, match="encrypted, and this node cannot encrypt"):
            await lab.nodes[0].attach(networks[0], place(secret, "10.0.1.5/24"))
        assert lab.nodes[0].namespaces.pinned() == []


async def test_subnets_of_one_network_reach_each_other(lab: OverlayLab) -> None:
    async with lab.networks() as networks:
        first = await lab.nodes[0].attach(networks[0], place(TWO_SUBNETS, "10.0.2.5/24"))
        near = await lab.nodes[0].attach(networks[0], place(TWO_SUBNETS, "10.0.3.5/24"))
        far = await lab.nodes[1].attach(networks[1], place(TWO_SUBNETS, "10.0.3.6/24"))
        lab.tell(TWO_SUBNETS)
        await lab.apply(networks)
        assert await reaches(first, "10.0.3.5")
        assert await reaches(first, "10.0.3.6")
        assert await reaches(far, "10.0.2.5")
        assert await reaches(near, "10.0.3.1"), "the gateway is there, as in Docker"


@pytest.mark.parametrize("is_v6", [False, True], ids=["IPv4 between nodes", "IPv6 between nodes"])
async def test_both_versions_of_ip(tmp_path: Path, is_v6: bool) -> None:
    async with OverlayLab(tmp_path, is_v6=is_v6).running(2) as lab, lab.networks() as networks:
        one = await lab.nodes[0].attach(networks[0], place(DUAL, "10.0.4.5/24", "fd04::5/64"))
        other = await lab.nodes[1].attach(networks[1], place(DUAL, "10.0.4.6/24", "fd04::6/64"))
        lab.tell(DUAL)
        await lab.apply(networks)
        assert await reaches(one, "10.0.4.6")
        assert await reaches(one, "fd04::6")
        namespaces = lab.nodes[0].namespaces
        assert await carry(namespaces, other, one, "fd04::6", TEN_MEGABYTES) == TEN_MEGABYTES
        assert f"mtu {1430 if is_v6 else 1450}" in await shell(one.netns, "ip link show eth0")


async def test_the_ingress_network_is_in_the_nodes_own_namespace(lab: OverlayLab) -> None:
    own = {"n1": "10.0.0.2", "n2": "10.0.0.3", "n3": "10.0.0.4"}
    async with lab.networks() as networks:
        end = await lab.nodes[1].attach(networks[1], place(INGRESS, "10.0.0.7/24"))
        lab.tell(INGRESS, ingress_addresses=own)
        await lab.apply(networks)
        assert "inet 10.0.0.2/24" in await shell(lab.nodes[0].home, f"ip addr show {INGRESS_BRIDGE}")
        for node in lab.nodes:
            await shell(node.home, "busybox ping -c 2 -W 2 10.0.0.7")
        assert await reaches(end, "10.0.0.4")


async def test_a_task_removed_from_the_table_is_unreachable_and_a_moved_one_is_reached(
    lab: OverlayLab,
) -> None:
    async with lab.networks() as networks:
        asking = await lab.nodes[0].attach(networks[0], place(WEB, "10.0.1.5/24"))
        moving = await lab.nodes[1].attach(networks[1], place(WEB, "10.0.1.6/24"))
        lab.tell(WEB)
        await lab.apply(networks)
        assert await reaches(asking, "10.0.1.6")
        await lab.nodes[1].detach(networks[1], moving)
        lab.tell(WEB)
        await lab.apply(networks)
        assert not await reaches(asking, "10.0.1.6")
        await lab.nodes[2].attach(networks[2], place(WEB, "10.0.1.6/24"))
        lab.tell(WEB)
        await lab.apply(networks)
        assert await reaches(asking, "10.0.1.6")


async def test_a_restarted_process_interrupts_nothing_and_removes_unowned_interfaces(lab: OverlayLab) -> None:
    async with AsyncExitStack() as stack:
        first, second = lab.nodes[:2]
        far_network = await stack.enter_async_context(second.running())
        async with first.running() as network:
            near = await first.attach(network, place(WEB, "10.0.1.5/24"))
            far = await second.attach(far_network, place(WEB, "10.0.1.6/24"), place(INGRESS, "10.0.0.6/24"))
            gone = await first.attach(
                network, place(TWO_SUBNETS, "10.0.2.5/24"), place(INGRESS, "10.0.0.5/24")
            )
            lab.tell(WEB)
            lab.tell(TWO_SUBNETS)
            lab.tell(INGRESS, ingress_addresses={"n1": "10.0.0.2", "n2": "10.0.0.3"})
            await lab.apply([network, far_network])
            assert await reaches(near, "10.0.1.6")
            before = await shell(
                first.paths.overlays / WEB.id, "ip -o link; bridge fdb | sort; ip neigh | sort"
            )
        first.endpoints = {id: one for id, one in first.endpoints.items() if one == near}
        assert await reaches(near, "10.0.1.6"), "no process is needed"
        async with first.running() as network:
            assert await reaches(near, "10.0.1.6"), "nothing is removed before the tables have come"
            lab.tables = {WEB.id: lab.tables[WEB.id]}
            await network.overlays.apply(lab.id_of(network), lab.tables, frozenset())
            after = await shell(
                first.paths.overlays / WEB.id, "ip -o link; bridge fdb | sort; ip neigh | sort"
            )
            assert after == before
            assert await reaches(near, "10.0.1.6")
            assert [path.name for path in first.paths.overlays.iterdir()] == [WEB.id]
            assert not Path(gone.netns).exists()
            assert "skep-" not in (await shell(first.home, "ip -o link")).replace("skep-gw", "")
            later = await first.attach(network, place(WEB, "10.0.1.8/24"))
            lab.tell(WEB)
            await lab.apply([network, far_network], WEB.id)
            assert await reaches(later, "10.0.1.6")
            assert far.endpoints


async def test_the_next_process_takes_the_ingress_network_over_as_it_is(lab: OverlayLab) -> None:
    """A bridge that is made anew has another number, and has lost the packets of a moment."""
    node = lab.nodes[0]
    kinds = ("bridge", "vxlan", "veth")
    listing = "; ".join(f"ip -o link show type {kind} | sed 's/ state.*//'" for kind in kinds)
    listing += "; bridge fdb show | sort"
    async with node.running() as network:
        await node.attach(network, place(INGRESS, "10.0.0.5/24"))
        lab.tell(INGRESS, ingress_addresses={"n1": "10.0.0.2", "n2": "10.0.0.3"})
        await lab.apply([network])
        before = await shell(node.home, listing)
        assert INGRESS_BRIDGE in before
    await shell(
        node.home, f"ip link add stray type veth peer name far && ip link set stray master {INGRESS_BRIDGE}"
    )
    async with node.running() as network:
        await lab.apply([network])
        assert await shell(node.home, listing) == before, "only unowned interfaces are removed"


async def test_nothing_is_left_at_the_end(lab: OverlayLab) -> None:
    node = lab.nodes[0]
    listing = (
        "ip -o link | grep -v skep-gw | sed 's/mode.*//'; ip -o -4 addr | grep -v skep-gw;"
        " bridge fdb | grep -v skep-gw; nft list table bridge skep; ss -uan | grep 4789; true"
    )
    async with node.running() as network:
        before = await shell(node.home, listing)
        for _ in range(3):
            for number in range(5, 9):
                await node.attach(
                    network, place(INGRESS, f"10.0.0.{number}/24"), place(WEB, f"10.0.1.{number}/24")
                )
            lab.tell(WEB)
            lab.tell(INGRESS, ingress_addresses={"n1": "10.0.0.2", "n2": "10.0.0.3"})
            await lab.apply([network])
            assert node.paths.overlays.joinpath(WEB.id).exists()
            for endpoint in list(node.endpoints.values()):
                await node.detach(network, endpoint)
            assert node.paths.overlays.joinpath(WEB.id).exists(), "its table is still there"
            await network.overlays.apply(lab.id_of(network), {}, frozenset(lab.tables))
        async with asyncio.timeout(10):
            while await shell(node.home, listing) != before or list(node.paths.overlays.iterdir()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert dict(network.repairs.counts) == {}
        assert list(node.paths.netns.iterdir()) == []


async def test_a_container_cannot_pretend_to_be_another(lab: OverlayLab) -> None:
    """It takes another's address, and another's MAC, and tells others that an address is its own."""
    async with lab.networks() as networks:
        bad = await lab.nodes[0].attach(networks[0], place(WEB, "10.0.1.5/24"))
        near = await lab.nodes[0].attach(networks[0], place(WEB, "10.0.1.6/24"))
        far = await lab.nodes[1].attach(networks[1], place(WEB, "10.0.1.7/24"))
        lab.tell(WEB)
        await lab.apply(networks)
        for target in ("10.0.1.6", "10.0.1.7"):
            assert await reaches(bad, target)
        await shell(bad.netns, "ip addr add 10.0.1.77/24 dev eth0")
        for target in ("10.0.1.6", "10.0.1.7"):
            assert (await try_shell(bad.netns, f"busybox ping -c 1 -W 1 -I 10.0.1.77 {target}"))[0] != 0
            assert await reaches(bad, target), "under its own address it does"
        # It answers for an unused address; no other container receives that.
        assert not await reaches(near, "10.0.1.77")
        assert not await reaches(far, "10.0.1.77")
        mac = mac_of(IPv4Address("10.0.1.6"))
        await shell(bad.netns, f"ip addr del 10.0.1.77/24 dev eth0; ip link set eth0 address {mac}")
        assert (await try_shell(bad.netns, "busybox ping -c 1 -W 1 10.0.1.7"))[0] != 0
        assert await reaches(near, "10.0.1.7"), "who has that address is not disturbed"


async def test_on_the_front_doors_network_only_its_tasks_open_connections(lab: OverlayLab) -> None:
    """A request of another task would pass the options of a route, such as the allowed clients."""
    head = msgspec.structs.replace(WEB, is_door=True)
    door = ServiceId("door")
    async with lab.networks() as networks:
        proxy = await lab.nodes[0].attach(networks[0], place(head, "10.0.1.5/24"))
        bad = await lab.nodes[0].attach(networks[0], place(head, "10.0.1.6/24"))
        far = await lab.nodes[1].attach(networks[1], place(head, "10.0.1.7/24"))
        table = lab.tell(head)
        endpoints = {
            id: msgspec.structs.replace(one, service_id=door) if "10.0.1.5" in one.addresses else one
            for id, one in table.endpoints.items()
        }
        services = {door: TableService(id=door, name="skep-door", labels={"skep.door": "true"})}
        lab.tables[head.id] = msgspec.structs.replace(table, endpoints=endpoints, services=services)
        await lab.apply(networks)
        namespaces = lab.nodes[0].namespaces
        for task, address in ((bad, "10.0.1.6"), (far, "10.0.1.7")):
            assert await carry(namespaces, task, proxy, address, TEN_MEGABYTES) == TEN_MEGABYTES
        for source, target, address in (
            (bad, far, "10.0.1.7"),
            (far, bad, "10.0.1.6"),
            (bad, proxy, "10.0.1.5"),
            (far, proxy, "10.0.1.5"),
        ):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                assert not await opens(namespaces, source, target, address, kind), f"a task reached {address}"
        assert await opens(namespaces, proxy, far, "10.0.1.7", socket.SOCK_STREAM), "the proxy still does"


async def opens(
    namespaces: Namespaces, source: Sandbox, target: Sandbox, address: str, kind: socket.SocketKind
) -> bool:
    """Return whether a connection or a datagram of ``source`` arrives at ``address`` of ``target``."""

    def listen() -> socket.socket:
        found = socket.socket(socket.AF_INET, kind)
        found.bind((address, 7001))
        if kind is socket.SOCK_STREAM:
            found.listen()
        return found

    def send() -> None:
        with socket.socket(socket.AF_INET, kind) as client, suppress(TimeoutError):
            client.settimeout(1.5)
            client.connect((address, 7001))
            client.send(b"x")

    with await namespaces.run(Path(target.netns), listen) as listener:
        await namespaces.run(Path(source.netns), send)
        return bool(select.select([listener], [], [], 0.5)[0])


async def test_strangers_and_containers_send_no_vxlan(lab: OverlayLab) -> None:
    """A machine that is in no table sends frames of the network; so does a container by its way out."""
    async with AsyncExitStack() as stack:
        networks = [await stack.enter_async_context(node.running()) for node in lab.nodes[:2]]
        end = await lab.nodes[0].attach(networks[0], place(WEB, "10.0.1.5/24"))
        sender = await lab.nodes[1].attach(networks[1], place(WEB, "10.0.1.6/24"))
        stranger = lab.nodes.pop()
        lab.tell(WEB)
        try:
            await lab.apply(networks)
            target = lab.nodes[0].underlay
            forged = (
                "ip link add vx type vxlan id 4097 dstport 4789 remote {to} {local} && ip addr add 10.0.1.99/24 dev vx"
                " && ip link set vx address 02:42:0a:00:01:63 up"
                " && ip neigh replace 10.0.1.5 lladdr 02:42:0a:00:01:05 dev vx nud permanent"
                " && for i in 1 2 3; do busybox ping -c 1 -W 1 -I vx 10.0.1.5; done"
            )
            received = "cat /proc/net/dev | grep eth0 | awk '{print $3}'"
            await shell(stranger.home, "ip link set lo up")
            before = int(await shell(end.netns, received))
            await try_shell(stranger.home, forged.format(to=target, local=f"local {stranger.underlay}"))
            await try_shell(sender.netns, forged.format(to=target, local=""))
            assert int(await shell(end.netns, received)) - before == 0
            assert await reaches(sender, "10.0.1.5"), "the nodes' own frames pass"
        finally:
            lab.nodes.append(stranger)


async def test_what_is_wanted_later_is_looked_at_first(lab: OverlayLab) -> None:
    """The sysctls are set also if the first state is applied before the gateway is requested."""
    node = lab.nodes[0]
    namespaces, repairs = node.namespaces, Repairs()
    home = node_reconciler(namespaces, repairs)
    await home.apply()
    home.set_part("gateway", NamespaceState(sysctls={"net/ipv4/ip_forward": "1"}))
    await home.apply()
    assert (await shell(node.home, "cat /proc/sys/net/ipv4/ip_forward")).strip() == "1"
    assert await home.heal() == 0


async def test_one_table_that_makes_no_sense_keeps_no_other_network_from_working(lab: OverlayLab) -> None:
    async with lab.networks() as networks:
        one = await lab.nodes[0].attach(networks[0], place(WEB, "10.0.1.5/24"))
        await lab.nodes[1].attach(networks[1], place(WEB, "10.0.1.6/24"))
        lab.tell(WEB)
        nonsense = TableEndpoint(task_id=TaskId("t"), node_id=lab.nodes[1].id, addresses=("10.0.2.x",))
        bad = msgspec.structs.replace(lab.tell(TWO_SUBNETS), endpoints={nonsense.task_id: nonsense})
        outside = NetworkId("../../etc")
        elsewhere = msgspec.structs.replace(bad, head=msgspec.structs.replace(TWO_SUBNETS, id=outside))
        lab.tables |= {TWO_SUBNETS.id: bad, outside: elsewhere}
        for network in networks[:2]:
            with pytest.raises(SkepError, match="invalid"):
                await network.overlays.apply(lab.id_of(network), lab.tables, frozenset(lab.tables))
        assert await reaches(one, "10.0.1.6")
        del lab.tables[outside]
        lab.tell(TWO_SUBNETS)
        await lab.apply(networks[:2])


async def test_a_container_that_cannot_have_its_port_leaves_nothing(lab: OverlayLab) -> None:
    node = lab.nodes[0]
    port = PublishedPort(protocol="tcp", target_port=80, published_port=8080, publish_mode=PublishMode.HOST)
    async with node.running() as network:
        await network.overlays.apply(lab.id_of(network), {}, frozenset())
        first = new_container_id()
        node.endpoints[first] = await network.containers.attach(
            a_container(first, (place(WEB, "10.0.1.5/24"),), ports=(port,))
        )
        with pytest.raises(AlreadyExists, match="port is already allocated"):
            await network.containers.attach(
                a_container(new_container_id(), (place(TWO_SUBNETS, "10.0.2.5/24"),), ports=(port,))
            )
        assert node.namespaces.pinned() == [first]
        async with asyncio.timeout(10):
            while sorted(path.name for path in node.paths.overlays.iterdir()) != [WEB.id]:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await network.containers.detach(first, node.endpoints.pop(first))
        second = new_container_id()
        node.endpoints[second] = await network.containers.attach(
            a_container(second, (place(WEB, "10.0.1.5/24"),), ports=(port,))
        )
        assert node.endpoints[second].ports[0].published_port == 8080


async def test_what_is_deleted_while_no_process_runs_is_made_by_the_next(lab: OverlayLab) -> None:
    first, second = lab.nodes[:2]
    async with second.running() as far_network:
        far = await second.attach(far_network, place(WEB, "10.0.1.6/24"))
        async with first.running() as network:
            near = await first.attach(network, place(WEB, "10.0.1.5/24"))
            lab.tell(WEB)
            await lab.apply([network, far_network])
            assert await reaches(far, "10.0.1.5")
        await shell(near.netns, "ip link del eth0")
        await shell(first.paths.overlays / WEB.id, "ip link del br0")
        async with first.running() as network:
            await lab.apply([network])
            async with asyncio.timeout(10):
                while not await reaches(far, "10.0.1.5"):
                    pass
