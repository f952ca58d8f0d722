"""Containers on the gateway bridge: a way out, and published ports of the node as a way in."""

import asyncio
import socket
import textwrap
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from skep.dataplane.gateway import BRIDGE
from skep.dataplane.netns.kernel import nft
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.ports import AddressNotHere
from skep.engine.containers.container import Container
from skep.engine.engine import Engine
from skep.errors import AlreadyExists
from skep.model.networks.sandbox import PublishedPort
from skep.model.service import PublishMode
from tests.integration.node.conftest import Runner
from tests.support.engine.runc_lab import Lab

SERVE = ("httpd", "-f", "-p", "80", "-h", "/etc")


def host_port(published: int = 0, protocol: str = "tcp", host_ip: str = "") -> PublishedPort:
    return PublishedPort(
        protocol=protocol,
        target_port=80,
        published_port=published,
        publish_mode=PublishMode.HOST,
        host_ip=host_ip,
    )


def published(container: Container) -> int:
    assert container.sandbox is not None
    return container.sandbox.ports[0].published_port


async def fetch(lab: Lab, address: str, port: int) -> bytes:
    """Ask a web server from the node's own namespace."""
    namespaces = Namespaces(lab.paths.netns, lab.home)

    def ask() -> bytes:
        with socket.create_connection((address, port), timeout=3) as connection:
            connection.sendall(b"GET /group HTTP/1.0\r\n\r\n")
            response = b""
            while piece := connection.recv(4096):
                response += piece
            return response

    try:
        return await namespaces.run(lab.home, ask)
    finally:
        namespaces.close()


async def eventually_served(lab: Lab, address: str, port: int) -> bytes:
    for _ in range(200):
        try:
            return await fetch(lab, address, port)
        except OSError:
            await asyncio.sleep(0.02)
    raise AssertionError(f"no answer at {address}:{port}")


async def test_containers_have_an_address_a_gateway_and_loopback(run: Runner) -> None:
    container = await run.create("sh", "-c", "ip -o -4 addr; ip route")
    endpoint = container.sandbox
    assert endpoint is not None
    await run.engine.start(container.id)
    await run.engine.wait(container.id)
    output = await run.logs(container)
    assert f"{endpoint.address}/{endpoint.prefix_length}" in output
    assert "127.0.0.1/8" in output
    assert f"default via {endpoint.gateway} dev eth0" in output


async def test_containers_reach_each_other_and_the_node(run: Runner, engine: Engine) -> None:
    server = await run.start(*SERVE)
    assert server.sandbox is not None
    url = f"http://{server.sandbox.address}/group"
    command = f"for i in $(seq 100); do wget -q -O - {url} && break; sleep 0.05; done"
    assert "staff" in await run.output("sh", "-c", command)


async def test_a_published_port_is_reached_from_the_node_and_by_loopback(lab: Lab, run: Runner) -> None:
    server = await run.start(*SERVE, ports=(host_port(8080),))
    assert server.sandbox is not None
    assert b"staff" in await eventually_served(lab, "127.0.0.1", 8080)
    assert b"staff" in await fetch(lab, server.sandbox.gateway, 8080)


async def test_a_container_reaches_a_published_port_of_another_by_the_nodes_address(
    lab: Lab, run: Runner
) -> None:
    server = await run.start(*SERVE, ports=(host_port(8080),))
    assert server.sandbox is not None
    await eventually_served(lab, "127.0.0.1", 8080)
    url = f"http://{server.sandbox.gateway}:8080/group"
    assert "staff" in await run.output("wget", "-q", "-O", "-", url)


async def test_outside_machines_reach_published_ports_and_nothing_else(lab: Lab, run: Runner) -> None:
    """Another namespace, joined by a cable, plays the outside world."""
    outside = Namespaces(lab.paths.run / "outside")
    path = await outside.create("machine", {})
    try:
        await _cable(outside, lab.home, path)
        server = await run.start(*SERVE, ports=(host_port(8080),))
        assert server.sandbox is not None
        await eventually_served(lab, "127.0.0.1", 8080)

        def ask(address: str, port: int) -> str:
            with socket.create_connection((address, port), timeout=2) as connection:
                connection.sendall(b"GET /group HTTP/1.0\r\n\r\n")
                return connection.recv(4096).decode()

        assert "200 OK" in await outside.run(path, ask, "192.0.2.1", 8080)
        with pytest.raises(TimeoutError):
            await outside.run(path, ask, server.sandbox.address, 80)
        # The way out: the node's address is what the outside sees.
        listener = await outside.run(path, lambda: socket.create_server(("192.0.2.2", 99)))
        with listener:
            client = await run.start("sh", "-c", "echo hello | nc 192.0.2.2 99")
            connection, peer = await asyncio.to_thread(listener.accept)
            with connection:
                assert (connection.recv(100), peer[0]) == (b"hello\n", "192.0.2.1")
        await run.engine.wait(client.id)
    finally:
        await outside.destroy("machine")
        outside.close()


async def test_a_port_in_host_mode_is_bound_to_one_address(lab: Lab, run: Runner) -> None:
    first = await run.start(*SERVE, ports=(host_port(8080, host_ip="127.0.0.1"),))
    assert first.sandbox is not None
    assert b"staff" in await eventually_served(lab, "127.0.0.1", 8080)
    with pytest.raises(ConnectionRefusedError):
        await fetch(lab, first.sandbox.gateway, 8080)
    second = await run.start(*SERVE, ports=(host_port(8080, host_ip=first.sandbox.gateway),))
    assert second.sandbox is not None, "another address is another port"
    assert b"staff" in await eventually_served(lab, first.sandbox.gateway, 8080)
    with pytest.raises(AlreadyExists, match=r"Bind for 127\.0\.0\.1:8080 failed: port is already allocated"):
        await run.create("true", ports=(host_port(8080, host_ip="127.0.0.1"),))
    with pytest.raises(AddressNotHere, match="cannot assign requested address"):
        await run.create("true", ports=(host_port(8081, host_ip="192.0.2.77"),))


async def test_the_node_picks_a_port_where_none_is_named(lab: Lab, run: Runner) -> None:
    server = await run.start(*SERVE, ports=(host_port(0),))
    assert published(server) > 1024
    assert b"staff" in await eventually_served(lab, "127.0.0.1", published(server))


async def test_a_port_has_one_owner_until_it_is_given_back(run: Runner, engine: Engine) -> None:
    first = await run.create("true", ports=(host_port(8080),))
    with pytest.raises(AlreadyExists, match=r"Bind for 0\.0\.0\.0:8080 failed: port is already allocated"):
        await run.create("true", ports=(host_port(8080),))
    await engine.remove(first.id)
    second = await run.start("true", ports=(host_port(8080), host_port(8080, "udp")))
    await engine.wait(second.id)
    await run.create("true", ports=(host_port(8080),))  # ended: its port is free though its record is kept


async def test_after_a_restart_ports_are_served_and_leftovers_are_removed(lab: Lab) -> None:
    first = lab.executor()
    async with first.running():
        run = Runner(lab, first.engine)
        server = await run.start(*SERVE, ports=(host_port(8080),))
        other = await run.start("sleep", "100", ports=(host_port(8081),))
        await eventually_served(lab, "127.0.0.1", 8080)
        assert other.monitor is not None
        address = server.sandbox
    await lab.in_home(
        "nft", "add", "element", "ip", "skep", "host_ports", "{ tcp . 9999 : 172.18.0.99 . 80 }"
    )
    second = lab.executor()
    async with second.running():
        assert second.engine.get(server.id).sandbox == address
        assert b"staff" in await fetch(lab, "127.0.0.1", 8080)
        rules = await lab.in_home("nft", "list", "map", "ip", "skep", "host_ports")
        assert "8080" in rules
        assert "9999" not in rules
        later = await Runner(lab, second.engine).create("true")
        assert later.sandbox is not None
        assert address is not None
        assert later.sandbox.address not in (
            address.address,
            other.sandbox.address if other.sandbox else "",
        )


async def test_the_gateways_subnet_avoids_the_machines_routes(lab: Lab) -> None:
    await lab.in_home("ip", "link", "add", "taken", "type", "bridge")
    await lab.in_home("ip", "addr", "add", "172.18.5.1/24", "dev", "taken")
    await lab.in_home("ip", "link", "set", "taken", "up")
    executor = lab.executor()
    async with executor.running():
        container = await Runner(lab, executor.engine).create("true")
        assert container.sandbox is not None
        subnet = IPv4Network(f"{container.sandbox.gateway}/{container.sandbox.prefix_length}", strict=False)
        assert str(subnet) == "172.19.0.0/16"
    assert f"inet {subnet[1]}/16" in await lab.in_home("ip", "addr", "show", "dev", BRIDGE)


async def test_a_refused_rule_shows_the_parsers_error(lab: Lab) -> None:
    namespaces = Namespaces(lab.paths.netns, lab.home)
    with pytest.raises(nft.NftFailed, match="syntax error"):
        await namespaces.run(lab.home, nft.run, "add nonsense ip skep")
    namespaces.close()


async def _cable(namespaces: Namespaces, home: Path, outside: Path) -> None:
    """192.0.2.1 on the node, 192.0.2.2 outside, with a route to the containers by way of the node."""
    script = textwrap.dedent(f"""
        set -e
        nsenter --net={home} ip link add wan type veth peer name eth0
        nsenter --net={home} ip link set eth0 netns {outside}
        nsenter --net={home} ip addr add 192.0.2.1/24 dev wan
        nsenter --net={home} ip link set wan up
        nsenter --net={outside} ip addr add 192.0.2.2/24 dev eth0
        nsenter --net={outside} ip link set eth0 up
        nsenter --net={outside} ip route add 172.16.0.0/12 via 192.0.2.1
    """)
    process = await asyncio.create_subprocess_exec("sh", "-c", script)
    assert await process.wait() == 0
