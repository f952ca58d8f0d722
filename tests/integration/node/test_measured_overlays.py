"""Overlays follow what was measured: a router with a smaller MTU, a network card that computes wrong checksums."""

import asyncio
from collections.abc import AsyncIterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from skep.dataplane.dataplane import DataPlane
from skep.dataplane.netns.kernel.checksums import offloads, set_offloads
from skep.dataplane.plan.probe import address_of
from skep.model.networks.paths import PathCheck, ProbeTargets
from skep.model.networks.sandbox import Sandbox
from tests.support.networks.overlay_lab import WEB, LabNode, OverlayLab, carry, place, reaches, shell
from tests.support.networks.paths_lab import a_peer, report_until, set_all_targets

TEN_MEGABYTES = 10 << 20
INNER_IP = 8 + 8 + 14
"""Bytes from the outer UDP header to the inner IP header: UDP, VXLAN, Ethernet."""
IP_BYTES, AROUND = 20, 50


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[OverlayLab]:
    async with OverlayLab(tmp_path).running(3) as lab:
        yield lab


async def a_router_between(lab: OverlayLab, apart: LabNode, address: str, mtu: int) -> None:
    """``apart`` moves to a network of its own, behind a router with an MTU of ``mtu`` bytes and no ICMP errors.

    All devices of the nodes say 1500.  Fragments are dropped before a node, as firewalls do.
    """
    wire = apart.home.parent / "wire"
    await shell(apart.home, f"ip addr flush dev under && ip addr add {address}/24 dev under")
    number = apart.id.removeprefix("n")
    gateway = f"{address.rpartition('.')[0]}.254"
    await shell(wire, f"ip link set p{number} nomaster && ip addr add {gateway}/24 dev p{number}")
    await shell(wire, "ip addr add 192.0.2.254/24 dev sw && echo 1 > /proc/sys/net/ipv4/ip_forward")
    await shell(wire, f"ip link set sw mtu {mtu} && ip link set p{number} mtu {mtu}")
    await shell(
        wire,
        "nft 'add table ip silent; add chain ip silent out { type filter hook output priority 0; };"
        " add rule ip silent out icmp type destination-unreachable drop'",
    )
    for node in lab.nodes:
        await shell(
            node.home,
            "nft 'add table ip whole; add chain ip whole in { type filter hook prerouting priority -450; };"
            " add rule ip whole in ip frag-off & 0x3fff != 0 drop'",
        )
    await shell(apart.home, f"ip route add default via {gateway}")
    for node in lab.nodes:
        if node is not apart:
            await shell(node.home, "ip route add default via 192.0.2.254")
    apart.underlay = address


async def mtu_of(end: Sandbox) -> int:
    words = (await shell(end.netns, "ip -o link show eth0")).split()
    return int(words[words.index("mtu") + 1])


async def until_mtu(ends: list[Sandbox], mtu: int) -> None:
    async with asyncio.timeout(30):
        for end in ends:
            while await mtu_of(end) != mtu:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def two_ends(lab: OverlayLab, networks: list[DataPlane], *numbers: int) -> list[Sandbox]:
    ends = [
        await lab.nodes[number].attach(networks[number], place(WEB, f"10.0.1.{5 + number}/24"))
        for number in numbers
    ]
    lab.tell(WEB)
    await lab.apply(networks)
    return ends


@pytest.mark.slow
async def test_a_router_with_a_smaller_mtu_is_found_and_overlays_follow(lab: OverlayLab) -> None:
    """Running containers and new ones; on the nodes in front of it, too; and back when it is gone."""
    await a_router_between(lab, lab.nodes[2], "198.51.100.3", 1400)
    async with lab.networks() as networks:
        ends = await two_ends(lab, networks, 0, 1, 2)
        assert [await mtu_of(end) for end in ends] == [1450] * 3, "nothing was measured yet"
        with pytest.raises(TimeoutError):
            await carry(lab.nodes[0].namespaces, ends[2], ends[0], "10.0.1.7", TEN_MEGABYTES)
        set_all_targets(lab, networks)
        report = await report_until(networks[0], lab.nodes[2], lambda one: one.mtu > 0)
        assert report.mtu == 1400
        assert (await report_until(networks[0], lab.nodes[1], lambda one: one.mtu > 0)).mtu == 1500
        await until_mtu(ends, 1350)
        namespaces = lab.nodes[0].namespaces
        assert await carry(namespaces, ends[2], ends[0], "10.0.1.7", TEN_MEGABYTES) == TEN_MEGABYTES
        assert await carry(namespaces, ends[0], ends[2], "10.0.1.5", TEN_MEGABYTES) == TEN_MEGABYTES
        large = [one for one in report.findings if one.check is PathCheck.LARGE_PACKETS]
        assert not large[0].is_failing
        assert "packets of up to 1400 bytes arrive at host-n3" in large[0].detail
        inside = lab.nodes[0].paths.overlays / WEB.id
        assert "mtu 1350" in await shell(inside, "ip -o link show vx4097")
        assert "mtu 1350" in await shell(inside, "ip -o link show br0")
        later = await lab.nodes[1].attach(networks[1], place(WEB, "10.0.1.9/24"))
        assert await mtu_of(later) == 1350
        await shell(lab.nodes[0].home.parent / "wire", "ip link set sw mtu 1500 && ip link set p3 mtu 1500")
        await until_mtu([*ends, later], 1450)
        assert sum(network.repairs.total for network in networks) == 0


@pytest.mark.slow
async def test_the_next_process_begins_with_what_was_measured(lab: OverlayLab) -> None:
    """No other node answers it, and no manager tells it anything."""
    await a_router_between(lab, lab.nodes[2], "198.51.100.3", 1400)
    async with lab.networks() as networks:
        ends = await two_ends(lab, networks, 0, 2)
        set_all_targets(lab, networks)
        await until_mtu(ends, 1350)
    async with lab.nodes[0].running() as network:
        await network.overlays.apply(lab.id_of(network), lab.tables, frozenset())
        assert await mtu_of(ends[0]) == 1350
        report = await report_until(network, lab.nodes[2], lambda one: bool(one.failing))
        assert report.mtu == 1400
        network.prober.set_targets(None)
        async with asyncio.timeout(10):
            while lab.nodes[0].paths.measured_paths.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.05)


@pytest.mark.slow
async def test_a_network_without_the_node_behind_the_router_keeps_its_mtu(lab: OverlayLab) -> None:
    await a_router_between(lab, lab.nodes[2], "198.51.100.3", 1400)
    async with lab.networks() as networks:
        set_all_targets(lab, networks)
        await report_until(networks[0], lab.nodes[2], lambda one: one.mtu == 1400)
        await report_until(networks[1], lab.nodes[2], lambda one: one.mtu == 1400)
        apart = lab.nodes.pop()
        try:
            ends = await two_ends(lab, networks[:2], 0, 1)
            assert [await mtu_of(end) for end in ends] == [1450] * 2
        finally:
            lab.nodes.append(apart)


# --- a network card that computes wrong checksums -------------------------------------------------------------


def seeds(one: str, other: str, protocol: int, most: int) -> str:
    """What the kernel leaves in the checksum of a packet whose checksum a card shall compute, by length outside.

    It is the sum of the pseudo header (RFC 793): addresses, protocol and length.  Elements of an nftables set.
    """
    words = [
        int.from_bytes(IPv4Address(address).packed[at : at + 2], "big")
        for address in (one, other)
        for at in (0, 2)
    ]
    found = []
    for inner in range(8, most):
        total = sum(words) + protocol + inner
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        found.append(f"{inner + IP_BYTES + AROUND} . {total:#06x}")
    return ", ".join(found)


async def break_the_card(node: LabNode, pairs: list[tuple[str, str]]) -> None:
    """The card of ``node`` computes wrong checksums inside VXLAN between these pairs of addresses, and of nothing else.

    What it is to compute is recognized by the kernel's seed in the place of the checksum; TCP's large segments are
    there only while a card is to cut them.  Behind that the real work is done in software, so a receiver looks at the
    checksum: between namespaces nobody would.
    """
    await node.namespaces.run(node.home, set_offloads, "under", False)
    commands = [
        "add table ip card",
        "add chain ip card out { type filter hook postrouting priority 300; }",
    ]
    for name, protocol, offset in (("of_tcp", 6, 16), ("of_udp", 17, 6)):
        at = f"@th,{(INNER_IP + IP_BYTES + offset) * 8},16"
        commands.append(f"add set ip card {name} {{ typeof ip length . {at}; }}")
        for one, other in pairs:
            commands.append(f"add element ip card {name} {{ {seeds(one, other, protocol, 1460)} }}")
        inner = f"udp dport 4789 @th,{(INNER_IP + 9) * 8},8 {protocol}"
        commands.append(f"add rule ip card out {inner} ip length . {at} @{name} {at} set 0xdead")
        commands.append(f"add rule ip card out {inner} ip length > 1500 {at} set 0xdead")
    path = node.paths.run / "card.nft"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(commands) + "\n")
    await shell(node.home, f"nft -f {path}")


@pytest.mark.slow
async def test_a_card_that_computes_wrong_checksums_is_found_and_asked_no_more(lab: OverlayLab) -> None:
    first, second, third = lab.nodes
    probes = [(address_of(first.id), address_of(one.id)) for one in (second, third)]
    async with lab.networks() as networks:
        ends = await two_ends(lab, networks, 0, 1)
        await break_the_card(first, [("10.0.1.5", "10.0.1.6"), *probes])
        namespaces = first.namespaces
        assert await reaches(ends[0], "10.0.1.6"), "pings have checksums of their own"
        with pytest.raises(TimeoutError):
            await carry(namespaces, ends[1], ends[0], "10.0.1.6", TEN_MEGABYTES)
        set_all_targets(lab, networks)
        report = await report_until(
            networks[0], second, lambda one: any("wrong checksums" in f.detail for f in one.findings)
        )
        assert report.failing == ()
        device = first.paths.overlays / WEB.id
        async with asyncio.timeout(10):
            while await namespaces.run(device, offloads, "vx4097"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert await carry(namespaces, ends[1], ends[0], "10.0.1.6", TEN_MEGABYTES) == TEN_MEGABYTES
        assert await carry(namespaces, ends[0], ends[1], "10.0.1.5", TEN_MEGABYTES) == TEN_MEGABYTES
        assert networks[0].prober.warnings()
        assert networks[1].prober.warnings() == ()
        assert await namespaces.run(second.paths.overlays / WEB.id, offloads, "vx4097")
    async with first.running() as network:
        await network.overlays.apply(lab.id_of(network), lab.tables, frozenset())
        network.prober.set_targets(ProbeTargets(node=a_peer(first), peers=(a_peer(second),)))
        async with asyncio.timeout(10):
            while not network.prober.warnings():  # noqa: ASYNC110  # it is seen at the device, nothing is tried anew
                await asyncio.sleep(0.05)
        assert not await namespaces.run(device, offloads, "vx4097")
        assert network.repairs.total == 0
