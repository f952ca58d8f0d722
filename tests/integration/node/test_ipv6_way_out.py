"""Containers on networks with IPv6 reach machines outside by IPv6."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path

import msgspec
import pytest

from skep.agent.executor.oci import OciExecutor
from skep.dataplane.gateway import BRIDGE
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.engine.containers.container import MountPoint
from skep.model.door.settings import KEYS_DIRECTORY
from skep.model.networks.sandbox import EndpointConfig, Sandbox
from skep.model.networks.tables import NetworkHead, Segment
from skep.model.values.ids import NetworkId
from tests.integration.node.conftest import Runner
from tests.integration.node.test_container_network import host_port
from tests.support.engine.runc_lab import Lab

DUAL = NetworkHead(
    id=NetworkId("dualnet"),
    name="dual",
    segments=(Segment("10.0.1.0/24", "10.0.1.1", 4097), Segment("fd01:2::/64", "fd01:2::1", 4097)),
)
NODE, OUTSIDE = "2001:db8::1", "2001:db8::2"
WAIT_S = 10.0


def places(number: int = 5) -> tuple[EndpointConfig, ...]:
    return (EndpointConfig(head=DUAL, addresses=(f"10.0.1.{number}/24", f"fd01:2::{number}/64")),)


def internal_places() -> tuple[EndpointConfig, ...]:
    """No way out by the only network with IPv6, and one by another."""
    (dual,) = places(7)
    plain = NetworkHead(
        id=NetworkId("plainnet"), name="plain", segments=(Segment("10.0.2.0/24", "10.0.2.1", 4098),)
    )
    inside = msgspec.structs.replace(dual, head=msgspec.structs.replace(DUAL, is_internal=True))
    return (inside, EndpointConfig(head=plain, addresses=("10.0.2.7/24",)))


@pytest.fixture
async def outside(lab: Lab) -> AsyncIterator[Path]:
    """Another machine, on a cable of the node; it knows the way to all unique local networks by the node."""
    machines = Namespaces(lab.paths.run / "outside")
    path = await machines.create("machine", {"net/ipv6/conf/default/accept_dad": "0"})
    for command in (
        "sysctl -q -w net.ipv6.conf.default.accept_dad=0",
        f"ip link add wan type veth peer name eth0 netns {path}",
        f"ip addr add {NODE}/64 dev wan",
        "ip link set wan up",
        f"nsenter --net={path} ip addr add {OUTSIDE}/64 dev eth0",
        f"nsenter --net={path} ip link set eth0 up",
        f"nsenter --net={path} ip route add fd00::/8 via {NODE}",
    ):
        assert await lab.in_home("sh", "-c", command) == ""
    yield path
    await machines.destroy("machine")
    machines.close()


async def heard_outside(lab: Lab, outside: Path, run: Runner) -> tuple[bytes, str]:
    """What the machine outside receives from a container, and the source address."""
    spaces = Namespaces(lab.paths.run / "spaces", outside)
    listener = await spaces.run(outside, lambda: socket.create_server((OUTSIDE, 99), family=socket.AF_INET6))
    spaces.close()
    listener.settimeout(WAIT_S)
    with listener:
        client = await run.start("sh", "-c", f"echo hello | nc {OUTSIDE} 99", endpoints=places())
        connection, peer = await asyncio.to_thread(listener.accept)
        with connection:
            connection.settimeout(WAIT_S)
            said = await asyncio.to_thread(connection.recv, 100)
        await run.engine.wait(client.id)
        return said, peer[0]


async def wait_tables(lab: Lab, expected: str) -> None:
    """Waits until the node has ``expected`` tables for IPv6."""
    deadline = time.monotonic() + WAIT_S
    while (found := (await lab.in_home("nft", "list", "tables", "ip6")).strip()) != expected:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.05)


async def test_a_container_gets_out_by_ipv6_under_the_nodes_address(lab: Lab, outside: Path) -> None:
    executor = lab.executor()
    async with executor.running():
        run = Runner(lab, executor.engine)
        assert await lab.in_home("nft", "list", "tables", "ip6") == "", "IPv6 is not used yet"
        assert await heard_outside(lab, outside, run) == (b"hello\n", NODE)
        accepted = await lab.in_home("cat", "/proc/sys/net/ipv6/conf/wan/accept_ra")
        assert accepted == "2\n", "the node goes on hearing of its own routes"
        # Foreign changes are repaired.
        await run.start("sleep", "1000", endpoints=places(6))
        await lab.in_home("nft", "delete", "table", "ip6", "skep")
        await wait_tables(lab, "table ip6 skep")
        assert await heard_outside(lab, outside, run) == (b"hello\n", NODE)
        for container in executor.engine.list():
            await executor.engine.remove(container.id, force=True)
        await wait_tables(lab, "")


async def test_the_front_doors_proxies_see_the_addresses_of_ipv6_clients(
    lab: Lab, outside: Path, tmp_path: Path
) -> None:
    script = "printf '#!/bin/sh\\necho; echo $REMOTE_ADDR\\n' > whoami; chmod +x whoami"
    serve = f"mkdir -p /www/cgi-bin; cd /www/cgi-bin; {script}; exec httpd -f -p [::]:80 -h /www"
    keys = MountPoint(type="bind", source=str(tmp_path), destination=KEYS_DIRECTORY, internal=True)

    def ask(port: int) -> str:
        with socket.create_connection((NODE, port), timeout=3) as connection:
            connection.sendall(b"GET /cgi-bin/whoami HTTP/1.0\r\n\r\n")
            return b"".join(iter(lambda: connection.recv(4096), b"")).decode().split()[-1]

    executor = lab.executor()
    async with executor.running():
        run = Runner(lab, executor.engine)
        await run.start("sh", "-c", serve, ports=(host_port(8080),), mounts=(keys,))
        await run.start("sh", "-c", serve, ports=(host_port(8081),))
        listed = await lab.in_home("nft", "list", "map", "ip6", "skep", "host_ports")
        assert "8080" in listed
        assert "8081" not in listed, "other containers may listen for IPv4 alone"
        spaces = Namespaces(lab.paths.run / "spaces", outside)
        deadline = time.monotonic() + WAIT_S
        try:
            while True:
                try:
                    assert await spaces.run(outside, ask, 8080) == f"[{OUTSIDE}]"
                    break
                except OSError:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.05)
        finally:
            spaces.close()


async def test_the_node_alone_reaches_a_container_by_its_unique_local_address(
    lab: Lab, outside: Path
) -> None:
    executor = lab.executor()
    async with executor.running():
        run = Runner(lab, executor.engine)
        server = await run.start("httpd", "-f", "-p", "80", "-h", "/etc", endpoints=places())
        address = endpoint_of(server.sandbox).address6
        assert IPv6Address(address) in IPv6Network("fd00::/8")
        ask = f"printf 'GET /group HTTP/1.0\\r\\n\\r\\n' | nc -w 2 {address} 80"
        until_it_serves = f"for i in $(seq 100); do {ask} && break; sleep 0.05; done"
        assert "staff" in await lab.in_home("busybox", "sh", "-c", until_it_serves)
        try_once = f"{ask} || echo nobody"
        neighbor = await run.output("sh", "-c", try_once, endpoints=places(6))
        stranger = await lab.in_home("nsenter", f"--net={outside}", "busybox", "sh", "-c", try_once)
        for received in (neighbor, stranger):
            assert "nobody" in received
            assert "staff" not in received


async def test_networks_without_ipv6_or_without_a_way_out_leave_the_node_as_it_was(lab: Lab) -> None:
    executor = lab.executor()
    async with executor.running():
        run = Runner(lab, executor.engine)
        for given in ((), internal_places()):
            container = await run.create("ip", "-6", "route", endpoints=given)
            assert endpoint_of(container.sandbox).address6 == ""
            await run.engine.start(container.id)
            await run.engine.wait(container.id)
            assert "default" not in await run.logs(container)
        assert await lab.in_home("nft", "list", "tables", "ip6") == ""
        assert await lab.in_home("cat", "/proc/sys/net/ipv6/conf/all/forwarding") == "0\n"


async def test_where_ipv6_is_turned_off_containers_start_without_it(lab: Lab) -> None:
    await lab.in_home("sysctl", "-q", "-w", "net.ipv6.conf.all.disable_ipv6=1")
    executor = lab.executor()
    async with executor.running():
        run = Runner(lab, executor.engine)
        container = await run.start("sleep", "1000", endpoints=places())
        assert endpoint_of(container.sandbox).address6 == ""
        assert await lab.in_home("cat", "/proc/sys/net/ipv6/conf/all/forwarding") == "0\n"


async def test_a_new_process_keeps_the_subnet_and_the_way_out(lab: Lab, outside: Path) -> None:
    first = lab.executor()
    async with first.running():
        server = await Runner(lab, first.engine).start("sleep", "1000", endpoints=places(6))
    before = endpoint_of(server.sandbox)
    second = lab.executor()
    async with second.running():
        assert endpoint_of(second.engine.get(server.id).sandbox) == before
        later = await Runner(lab, second.engine).create("true", endpoints=places(7))
        assert endpoint_of(later.sandbox).gateway6 == before.gateway6
        assert f"inet6 {before.gateway6}/64" in await lab.in_home("ip", "addr", "show", "dev", BRIDGE)
        assert await heard_outside(lab, outside, Runner(lab, second.engine)) == (b"hello\n", NODE)


async def test_the_subnet_avoids_the_machines_routes(lab: Lab) -> None:
    taken = await _gateway_of(lab.executor(), lab)
    await lab.in_home("ip", "link", "del", BRIDGE)
    await lab.in_home("ip", "link", "add", "taken", "type", "bridge")
    await lab.in_home("ip", "addr", "add", f"{taken}/60", "dev", "taken")
    await lab.in_home("ip", "link", "set", "taken", "up")
    assert await _gateway_of(lab.executor(), lab) != taken


async def _gateway_of(executor: OciExecutor, lab: Lab) -> str:
    async with executor.running():
        container = await Runner(lab, executor.engine).create("true", endpoints=places())
        return endpoint_of(container.sandbox).gateway6


def endpoint_of(endpoint: Sandbox | None) -> Sandbox:
    assert endpoint is not None
    return endpoint
