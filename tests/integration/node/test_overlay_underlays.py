"""What lies under an overlay: its MTU, its port, several routed networks, and nodes that change."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from skep.model.networks.sandbox import Sandbox
from skep.model.networks.tables import TableNode
from tests.support.networks.overlay_lab import (
    DUAL,
    INGRESS,
    TWO_SUBNETS,
    WEB,
    OverlayLab,
    carry,
    place,
    reaches,
    shell,
)


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[OverlayLab]:
    async with OverlayLab(tmp_path).running(2) as lab:
        yield lab


async def test_nodes_on_two_routed_networks(lab: OverlayLab) -> None:
    """192.0.2.0/24 and 198.51.100.0/24 with a router between them."""
    first, second = lab.nodes
    wire = first.home.parent / "wire"
    await shell(second.home, "ip addr flush dev under && ip addr add 198.51.100.2/24 dev under")
    await shell(wire, "ip addr add 192.0.2.254/24 dev sw && ip addr add 198.51.100.254/24 dev sw")
    await shell(wire, "echo 1 > /proc/sys/net/ipv4/ip_forward")
    await shell(first.home, "ip route add default via 192.0.2.254")
    await shell(second.home, "ip route add default via 198.51.100.254")
    second.underlay = "198.51.100.2"
    async with lab.networks() as networks:
        one = await first.attach(networks[0], place(WEB, "10.0.1.5/24"))
        other = await second.attach(networks[1], place(WEB, "10.0.1.6/24"))
        lab.tell(WEB)
        await lab.apply(networks)
        assert await reaches(one, "10.0.1.6")
        assert await carry(first.namespaces, other, one, "10.0.1.6", 1 << 20) == 1 << 20


async def test_the_mtu_follows_the_underlay_and_the_option(lab: OverlayLab) -> None:
    for node in lab.nodes:
        await shell(node.home, "ip link set under mtu 1400")
    smaller = msgspec.structs.replace(TWO_SUBNETS, mtu=1200)
    async with lab.networks() as networks:
        end = await lab.nodes[0].attach(networks[0], place(WEB, "10.0.1.5/24"), place(smaller, "10.0.2.5/24"))
        assert "mtu 1450" in await shell(end.netns, "ip link show eth0"), (
            "nothing is known of the underlay yet"
        )
        other = await lab.nodes[1].attach(networks[1], place(WEB, "10.0.1.6/24"))
        lab.tell(WEB)
        lab.tell(smaller)
        await lab.apply(networks)
        assert "mtu 1350" in await shell(end.netns, "ip link show eth0")
        assert "mtu 1200" in await shell(end.netns, "ip link show eth1")
        await shell(end.netns, "busybox ping -c 1 -W 2 -s 1322 10.0.1.6")
        assert await carry(lab.nodes[0].namespaces, other, end, "10.0.1.6", 1 << 20) == 1 << 20


async def test_another_port_and_another_address_of_a_node(lab: OverlayLab) -> None:
    async with lab.networks() as networks:
        one = await lab.nodes[0].attach(networks[0], place(WEB, "10.0.1.5/24"))
        await lab.nodes[1].attach(networks[1], place(WEB, "10.0.1.6/24"))
        lab.tell(WEB)
        await lab.apply(networks)
        assert await reaches(one, "10.0.1.6")
        lab.tell(msgspec.structs.replace(WEB, port=4790))
        await lab.apply(networks)
        assert await reaches(one, "10.0.1.6")
        assert "4790" in await shell(lab.nodes[0].home, "ss -Huan")
        assert "4789" not in await shell(lab.nodes[0].home, "ss -Huan")
        await shell(lab.nodes[1].home, "ip addr add 192.0.2.77/24 dev under")
        moved = TableNode(id=lab.nodes[1].id, underlay="192.0.2.77")
        table = lab.tables[WEB.id]
        lab.tables[WEB.id] = msgspec.structs.replace(table, nodes={**table.nodes, moved.id: moved})
        await lab.apply(networks)
        assert await reaches(one, "10.0.1.6")
        assert "192.0.2.77" in await shell(lab.nodes[0].paths.overlays / WEB.id, "bridge fdb")


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_happens_in_whatever_order_the_end_is_right(lab: OverlayLab, seed: int) -> None:
    """Containers come and go, tables come late or go early, processes are started anew, links are deleted."""
    rng = random.Random(seed)
    heads = (WEB, TWO_SUBNETS, DUAL, INGRESS)
    first, second = lab.nodes
    free = {head.id: list(range(10, 60)) for head in heads}

    def places() -> list[object]:
        chosen = sorted(rng.sample(heads, rng.randint(1, 3)), key=lambda head: not head.is_ingress)
        return [place(head, _address(head.segments[0].subnet, free[head.id].pop())) for head in chosen]

    far_process = second.running()
    far = await far_process.__aenter__()
    try:
        for _ in range(3):
            async with first.running() as near:
                await near.overlays.apply(lab.id_of(near), lab.tables, frozenset(lab.tables))
                for _ in range(8):
                    node, network = rng.choice([(first, near), (second, far)])
                    match rng.choice(("attach", "attach", "detach", "tell", "forget", "break")):
                        case "attach":
                            await node.attach(network, *places())  # type: ignore[arg-type]
                        case "detach" if node.endpoints:
                            await node.detach(network, rng.choice(list(node.endpoints.values())))
                        case "tell":
                            lab.tell(
                                rng.choice(heads), ingress_addresses={"n1": "10.0.0.2", "n2": "10.0.0.3"}
                            )
                            await lab.apply([near, far], *(head.id for head in heads))
                        case "forget":
                            lab.tables.pop(rng.choice(heads).id, None)
                            await lab.apply([near, far], *(head.id for head in heads))
                        case "break" if node.endpoints:
                            end = rng.choice(list(node.endpoints.values()))
                            await shell(end.netns, "ip link del eth0; true")
                        case _:
                            pass
        async with first.running() as near:
            for head in heads:
                lab.tell(head, ingress_addresses={"n1": "10.0.0.2", "n2": "10.0.0.3"})
            await lab.apply([near, far], *(head.id for head in heads))
            for head in heads:
                await _all_reach(lab, head.id)
            for node, network in ((first, near), (second, far)):
                for end in list(node.endpoints.values()):
                    await node.detach(network, end)
                await network.overlays.apply(lab.id_of(network), {}, frozenset(head.id for head in heads))
                async with asyncio.timeout(10):
                    while list(node.paths.overlays.iterdir()) or await _left(node.home):  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
                assert node.namespaces.pinned() == []
    finally:
        await far_process.__aexit__(None, None, None)


async def _all_reach(lab: OverlayLab, id: str) -> None:
    ends: list[tuple[Sandbox, str]] = [
        (end, one.address)
        for node in lab.nodes
        for end in node.endpoints.values()
        for one in end.endpoints
        if one.network_id == id
    ]
    for end, _ in ends:
        for _, address in ends:
            async with asyncio.timeout(10):  # a link that was deleted a moment ago is being made
                while not await reaches(end, address):
                    pass


async def _left(home: Path) -> str:
    """Links of overlays in the node's own namespace, and sockets of VXLAN."""
    return await shell(home, "ip -o link | grep -E 'skep-ingress|skep-vx|: vs'; ss -Huan | grep 4789; true")


def _address(subnet: str, number: int) -> str:
    network, _, length = subnet.partition("/")
    return f"{network.rsplit('.', 1)[0]}.{number}/{length}"


async def test_containers_that_end_many_at_a_time_are_no_deviation(lab: OverlayLab) -> None:
    node = lab.nodes[0]
    async with node.running() as network:
        lab.tell(WEB)
        await network.overlays.apply(lab.id_of(network), lab.tables, frozenset(lab.tables))
        for _ in range(3):
            await asyncio.gather(
                *(
                    node.attach(network, place(INGRESS, f"10.0.0.{one}/24"), place(WEB, f"10.0.1.{one}/24"))
                    for one in range(10, 30)
                )
            )
            ends = list(node.endpoints.values())
            await asyncio.gather(*(node.detach(network, end) for end in ends))
        enough = network.repairs.comparisons + 10
        while network.repairs.comparisons < enough:  # noqa: ASYNC110  # there is no event
            await asyncio.sleep(0.05)
        assert dict(network.repairs.counts) == {}
