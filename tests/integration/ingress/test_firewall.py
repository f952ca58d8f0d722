"""Beside others' rules: ours come back, theirs are never touched; ports that the node's own servers have are theirs."""

import asyncio
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.integration.node.conftest import eventually
from tests.support.networks.mesh_lab import CLIENT, CLIENT_IPV6, LabNode, MeshLab

PORTS = (("tcp", 8080, 80), ("udp", 8080, 80))

OTHERS = """
table ip filter {
  chain INPUT { type filter hook input priority 0; policy accept; jump ufw-input; }
  chain ufw-input { tcp dport 22 accept; }
  chain FORWARD { type filter hook forward priority 0; policy accept; oifname "docker0" ct state established accept; }
}
table ip nat {
  chain DOCKER { iifname "docker0" return; tcp dport 9000 dnat to 172.17.0.2:80; }
  chain PREROUTING { type nat hook prerouting priority -100; fib daddr type local jump DOCKER; }
  chain POSTROUTING { type nat hook postrouting priority 100; ip saddr 172.17.0.0/16 oifname != "docker0" masquerade; }
}
table inet firewalld {
  set trusted { type ipv4_addr; elements = { 198.51.100.7 }; }
  chain filter_FORWARD { type filter hook forward priority 10; policy accept; ct state established,related accept; }
}
table ip skep_of_somebody_else {
  chain pre { type filter hook prerouting priority -300; }
}
"""


async def published(lab: MeshLab) -> LabNode:
    lab.publish(*PORTS)
    await lab.add_task("t1", lab.nodes[1])
    await lab.spread()
    return lab.nodes[0]


async def tables_of(node: LabNode) -> list[str]:
    """All tables, in an order of their own: which of two is repaired first is chance."""
    return sorted(re.split(r"(?m)^(?=table )", await node.nft("list ruleset")))


async def others_rules(node: LabNode) -> str:
    """All that is not ours, as it was written."""
    listing = await node.nft("list ruleset")
    tables = re.split(r"(?m)^(?=table )", listing)
    return "".join(one for one in tables if "skep_ingress {" not in one.partition("\n")[0])


async def test_others_rules_stay_byte_for_byte_while_ours_come_change_and_go(lab: MeshLab) -> None:
    node = lab.nodes[0]
    await node.nft(OTHERS)
    before = await node.nft("list ruleset")
    await published(lab)
    assert await others_rules(node) == before
    assert await lab.ask(node.address, 8080) == f"t1 {CLIENT}"
    await lab.add_task("t2", lab.nodes[0])
    await lab.spread()
    assert await others_rules(node) == before
    await node.home.heal()
    assert await others_rules(node) == before
    lab.publish()
    await lab.spread()
    assert await node.nft("list ruleset") == before


@pytest.mark.parametrize(
    "harm",
    [
        "flush ruleset",
        "delete table ip skep_ingress",
        "flush chain ip skep_ingress pre",
        "delete element ip skep_ingress ports { tcp . 8080 }",
        "insert rule ip skep_ingress forward drop",
        "flush map ip skep_ingress backends",
    ],
)
async def test_foreign_changes_of_the_tables_are_repaired_within_5_s(lab: MeshLab, harm: str) -> None:
    node = await published(lab)
    async with node.healing():
        await node.home.heal()  # what it was when it began
        good = await tables_of(node)
        repairs = node.repairs.total
        began = time.monotonic()
        await node.nft(harm)
        while await tables_of(node) != good:
            assert time.monotonic() - began < 5
        await eventually(lambda: node.repairs.total > repairs, "the repair is counted")
        assert await lab.ask(node.address, 8080) == f"t1 {CLIENT}"


async def test_after_a_flush_by_another_program_both_sets_of_rules_exist(lab: MeshLab) -> None:
    """As ``systemctl reload nftables`` does."""
    node = await published(lab)
    async with node.healing():
        repairs = node.repairs.total
        await node.nft("flush ruleset\n" + OTHERS)
        await eventually(lambda: node.repairs.total > repairs, "our tables are back")
        assert await lab.ask(node.address, 8080) == f"t1 {CLIENT}"
        kept = await others_rules(node)
        for name in ("table ip filter", "table ip nat", "table inet firewalld", "skep_of_somebody_else"):
            assert name in kept


async def test_an_established_connection_outlives_a_flush(lab: MeshLab) -> None:
    node = await published(lab)
    async with node.healing():
        with await lab.in_client(socket.create_connection, (node.address, 8080), 3) as connection:
            assert await lab.in_client(say, connection) == "t1"
            repairs = node.repairs.total
            await node.nft("flush ruleset")
            await eventually(lambda: node.repairs.total > repairs, "our tables are back")
            assert await lab.in_client(say, connection) == "t1"


async def test_our_own_changes_are_no_harm(lab: MeshLab) -> None:
    node = await published(lab)
    async with node.healing():
        repairs = node.repairs.total
        for number in range(2, 6):
            await lab.add_task(f"t{number}", lab.nodes[number % 3])
            await lab.spread()
        await node.nft(
            "add table ip somebody; delete table ip somebody; add rule ip skep_ingress refuse drop"
        )
        await eventually(lambda: node.repairs.total == repairs + 1, "the one repair")


@asynccontextmanager
async def running(node: LabNode) -> AsyncIterator[None]:
    """All that the mesh does by itself."""
    working = asyncio.create_task(node.mesh.run())
    try:
        yield
    finally:
        working.cancel()
        await asyncio.wait([working])


@pytest.mark.parametrize(
    "harm",
    [
        "nft flush ruleset",
        "nft delete table ip skep_return",
        "nft flush chain ip6 skep_return departure",
        "ip rule del priority 1042",
        "ip route flush table 167772361",
        "ip -6 rule del priority 32999",
        "ip -6 route flush table 1042",
        # the address is the overlay's to heal
        "ip link set eth0 down; ip link set eth0 up; ip addr add fd00:1::10/64 dev eth0 nodad",
    ],
)
async def test_foreign_changes_of_the_reply_routing_in_a_container_are_repaired_within_5_s(
    lab: MeshLab, harm: str
) -> None:
    await published(lab)
    node = lab.nodes[1]
    async with node.healing():
        repairs = node.repairs.total
        await lab.shell("t1", harm)
        began = time.monotonic()
        await eventually(lambda: node.repairs.total > repairs, "the repair is counted", within_s=5)
        for address, protocol, peer in (
            (lab.nodes[0].address, "tcp", CLIENT),
            (lab.nodes[0].address, "udp", CLIENT),
            (lab.nodes[0].address_ipv6, "tcp", CLIENT_IPV6),
            (lab.nodes[0].address_ipv6, "udp", CLIENT_IPV6),
        ):
            assert await lab.ask(address, 8080, protocol) == f"t1 {peer}"
        assert time.monotonic() - began < 5


async def test_a_firewall_that_forbids_forwarding_is_named_until_it_makes_an_exception(lab: MeshLab) -> None:
    """ufw's way: iptables-nft with a policy.  Docker writes into the same chain; this is its owner's to do here."""
    node = await published(lab)
    await lab.shell("n1", "iptables-nft -P FORWARD DROP")
    with pytest.raises(TimeoutError):
        await lab.ask(node.address, 8080, timeout_s=1)
    async with running(node):
        await eventually(lambda: node.mesh.warnings(), "the chain is named")
    (warning,) = node.mesh.warnings()
    assert warning.startswith("chain FORWARD of nftables table ip filter forbids forwarding")
    for direction in ("-i", "-o"):
        await lab.shell("n1", f"iptables-nft -A FORWARD {direction} skep-ingress -j ACCEPT")
    assert await lab.ask(node.address, 8080) == f"t1 {CLIENT}"
    async with running(node):
        await eventually(lambda: not node.mesh.warnings(), "nothing is in the way")


@pytest.mark.parametrize("last", ["", "iptables-nft -A DOCKER-USER -j RETURN &&"])
async def test_a_docker_engine_that_forbids_forwarding_gets_exceptions_in_its_chain_for_them(
    lab: MeshLab, last: str
) -> None:
    """It sets the policy when it enables forwarding.  Its program iptables has to be able to read the exceptions.

    Older engines end the chain with a return.
    """
    node = await published(lab)
    await lab.shell(
        "n1",
        f"iptables-nft -N DOCKER-USER && {last} iptables-nft -I DOCKER-USER -s 203.0.113.0/24 -j DROP && "
        "iptables-nft -A FORWARD -j DOCKER-USER && iptables-nft -P FORWARD DROP",
    )
    with pytest.raises(TimeoutError):
        await lab.ask(node.address, 8080, timeout_s=1)
    async with running(node):
        assert await lab.ask(node.address, 8080, timeout_s=10) == f"t1 {CLIENT}"
    assert node.mesh.warnings() == ()
    await lab.shell("n1", 'saved=$(iptables-nft-save) && echo "$saved" | iptables-nft-restore')
    async with running(node):
        assert await lab.ask(node.address, 8080, timeout_s=10) == f"t1 {CLIENT}"
    listing = await node.nft("list chain ip filter DOCKER-USER")
    rules = [
        re.sub(r"counter packets \d+ bytes \d+ ", "", line.strip()) for line in listing.splitlines()[2:-2]
    ]
    accepted = [
        f'{way} "{bridge}" accept' for bridge in ("skep-ingress", "skep-gw") for way in ("iifname", "oifname")
    ]
    first, *added = rules
    assert (first, sorted(added[:4])) == ("ip saddr 203.0.113.0/24 drop", sorted(accepted))
    assert added[4:] == (["return"] if last else [])


async def test_a_firewall_on_iptables_is_left_byte_for_byte(lab: MeshLab) -> None:
    node = lab.nodes[0]
    await lab.shell(
        "n1",
        "iptables-nft -A FORWARD -i docker0 -j ACCEPT && iptables-nft -t nat -A POSTROUTING -s 172.17.0.0/16 "
        "! -o docker0 -j MASQUERADE",
    )
    before = await node.nft("list ruleset")
    await published(lab)
    assert await others_rules(node) == before
    assert await lab.ask(node.address, 8080) == f"t1 {CLIENT}"


async def test_a_port_that_the_nodes_own_server_has_stays_its_own_until_it_is_free(lab: MeshLab) -> None:
    node = lab.nodes[0]
    server = await lab.places.run(node.netns, socket.create_server, ("0.0.0.0", 8080))
    retries = asyncio.create_task(node.mesh.run())
    try:
        with server:
            await published(lab)
            (warning,) = node.mesh.warnings()
            assert warning == (
                "port 8080/tcp is not published on this node: "
                "Bind for 0.0.0.0:8080 failed: port is already allocated"
            )
            with await lab.in_client(socket.create_connection, (node.address, 8080), 3):
                accepted, _ = server.accept()
                accepted.close()
            assert await lab.ask(node.address, 8080, "udp") == f"t1 {CLIENT}"
            assert await lab.ask(lab.nodes[1].address, 8080) == f"t1 {CLIENT}"
        await eventually(lambda: not node.mesh.warnings(), "the port is published", within_s=20)
        async with asyncio.timeout(5):
            while (response := await asked(lab, node)) == "refused":
                pass
        assert response == f"t1 {CLIENT}"
    finally:
        retries.cancel()
        await asyncio.wait([retries])


async def asked(lab: MeshLab, node: LabNode) -> str:
    try:
        return await lab.ask(node.address, 8080)
    except ConnectionRefusedError:
        return "refused"


async def test_a_published_port_cannot_be_bound_on_the_node(lab: MeshLab) -> None:
    node = await published(lab)
    with pytest.raises(OSError, match="in use"):
        await lab.places.run(node.netns, socket.create_server, ("0.0.0.0", 8080))
    with pytest.raises(OSError, match="in use"):
        await lab.places.run(node.netns, socket.create_server, ("127.0.0.1", 8080))


async def test_the_bridge_gets_its_settings_whenever_it_is_made(lab: MeshLab) -> None:
    node = await published(lab)
    async with node.healing():
        await lab.batch("n1", "link del skep-ingress", "link add skep-ingress type bridge")

        def setting() -> str:
            with open("/proc/sys/net/ipv4/conf/skep-ingress/route_localnet") as file:
                return file.read().strip()

        async with asyncio.timeout(5):
            while await lab.places.run(node.netns, setting) != "1":
                pass


def say(connection: socket.socket) -> str:
    connection.send(b"hello\n")
    return connection.recv(100).decode().partition(" ")[0]
