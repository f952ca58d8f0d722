"""What user space serves of the mesh: ``[::1]``, IPv6 to tasks without it, the PROXY protocol."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.networks.mesh_lab import CLIENT, CLIENT_IPV6, LabNode, MeshLab

PORTS = (("tcp", 8080, 80), ("udp", 8080, 80))


@pytest.fixture
async def plain_lab(tmp_path: Path) -> AsyncIterator[MeshLab]:
    """Two nodes whose ingress network has IPv4 only."""
    async with MeshLab(tmp_path, 2, has_ipv6=False).running() as lab:
        yield lab


async def relayed(lab: MeshLab, address: str, port: int = 8080, protocol: str = "tcp") -> str:
    """The answer, as soon as the relay has read what to serve."""
    return await _until_served(lambda: lab.ask(address, port, protocol, timeout_s=1))


async def relayed_on(lab: MeshLab, node: LabNode, address: str, protocol: str = "tcp") -> str:
    return await _until_served(lambda: lab.ask_on(node, address, 8080, protocol, timeout_s=1))


async def _until_served(ask: object) -> str:
    async with asyncio.timeout(10):
        while True:
            try:
                return await ask()  # type: ignore[operator, no-any-return]
            except OSError:
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_the_loopback_address_of_ipv6_answers_too(lab: MeshLab, protocol: str) -> None:
    lab.publish(*PORTS)
    await lab.add_task("t1", lab.nodes[1])
    await lab.spread()
    for node in lab.nodes:
        async with node.relaying():
            assert await relayed_on(lab, node, "::1", protocol) == f"t1 {node.ingress[0]}"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_ipv6_clients_reach_tasks_that_have_ipv4_only(plain_lab: MeshLab, protocol: str) -> None:
    lab = plain_lab
    lab.publish(*PORTS)
    await lab.add_task("t1", lab.nodes[1])
    await lab.spread()
    for node in lab.nodes:
        async with node.relaying():
            assert await relayed(lab, node.address_ipv6, 8080, protocol) == f"t1 {node.ingress[0]}"
            assert await relayed_on(lab, node, "::1", protocol) == f"t1 {node.ingress[0]}"
            assert await lab.ask(node.address, 8080, protocol) == f"t1 {CLIENT}"


async def test_a_relayed_udp_client_goes_to_another_task_when_its_own_serves_no_more(lab: MeshLab) -> None:
    lab.publish(*PORTS)
    node = lab.nodes[0]
    await lab.add_task("t1", lab.nodes[1])
    await lab.spread()
    async with node.relaying():
        await relayed_on(lab, node, "::1", "udp")
        client = await lab.places.run(node.netns, udp_client, "::1")
        with client:
            assert await lab.in_client(say, client) == "t1"
            await lab.add_task("t2", lab.nodes[2])
            lab.tasks[0].is_serving = False
            await lab.spread()
            async with asyncio.timeout(5):
                while await lab.in_client(say, client) != "t2":
                    pass


async def test_the_proxy_protocol_names_the_client_in_both_versions(plain_lab: MeshLab) -> None:
    """The lab's servers repeat the first line, which is the header of version 1."""
    lab = plain_lab
    lab.publish(("tcp", 8080, 80), proxy_protocol=1)
    await lab.add_task("t1", lab.nodes[1])
    await lab.spread()
    node = lab.nodes[0]
    async with node.relaying():
        response = await relayed(lab, node.address)
        assert response.startswith(f"t1 {node.ingress[0]} PROXY TCP4 {CLIENT} {node.address} ")
        assert (await relayed(lab, node.address_ipv6)).startswith(
            f"t1 {node.ingress[0]} PROXY TCP6 {CLIENT_IPV6} {node.address_ipv6} "
        )
        assert " PROXY TCP4 127.0.0.1 127.0.0.1 " in await relayed_on(lab, node, "127.0.0.1")
        lab.publish(("tcp", 8080, 80), proxy_protocol=2)
        await lab.spread()

        async def asked_for_version_2() -> bytes:
            return await lab.in_client(exchange, node.address, b"hello\n")

        async with asyncio.timeout(10):
            while b"PROXY" in (received := await asked_for_version_2()):
                pass
        # the server's lines end where the header does: signature, addresses and ports are in its answer
        addresses = socket.inet_aton(CLIENT) + socket.inet_aton(node.address)
        assert b"QUIT\n" in received
        assert bytes([0x21, 0x11]) + struct.pack("!H", 12) + addresses in received


async def test_a_relayed_connection_is_closed_one_direction_at_a_time(lab: MeshLab) -> None:
    """The client ends its side first; the task's last words arrive all the same."""
    lab.publish(*PORTS)
    node = lab.nodes[0]
    await lab.add_task("t1", lab.nodes[1])
    await lab.spread()
    async with node.relaying():
        await relayed_on(lab, node, "::1")
        received = await lab.places.run(node.netns, half_close, "::1")
        assert received == [f"t1 {node.ingress[0]} hello\n".encode(), b"bye\n"]


async def test_a_relayed_connection_stays_when_its_task_serves_no_more_and_when_the_port_goes(
    lab: MeshLab,
) -> None:
    lab.publish(*PORTS)
    node = lab.nodes[0]
    await lab.add_task("t1", lab.nodes[1])
    await lab.spread()
    async with node.relaying():
        await relayed_on(lab, node, "::1")
        with await lab.places.run(node.netns, socket.create_connection, ("::1", 8080), 3) as connection:
            assert await lab.in_client(say, connection) == "t1"
            lab.tasks[0].is_serving = False
            await lab.spread()
            with pytest.raises(ConnectionRefusedError):
                await lab.ask_on(node, "::1", 8080, timeout_s=1)
            assert await lab.in_client(say, connection) == "t1"
            lab.publish()
            await lab.spread()
            assert await lab.in_client(say, connection) == "t1"


async def test_a_task_that_cannot_be_reached_is_passed_over(plain_lab: MeshLab) -> None:
    lab = plain_lab
    lab.publish(("tcp", 8080, 80))
    await lab.add_task("t1", lab.nodes[0])
    await lab.add_task("t2", lab.nodes[1])
    lab.tasks[0].close()  # its port refuses, as that of a process that has just ended
    await lab.spread()
    node = lab.nodes[0]
    async with node.relaying():
        assert {await relayed(lab, node.address_ipv6) for _ in range(8)} == {f"t2 {node.ingress[0]}"}


async def test_a_port_in_use_is_relayed_as_soon_as_it_is_free(lab: MeshLab) -> None:
    lab.publish(("tcp", 8080, 80))
    await lab.add_task("t1", lab.nodes[1])
    node = lab.nodes[0]
    taken = await lab.places.run(
        node.netns,
        lambda: socket.create_server(("::1", 8080), family=socket.AF_INET6),
    )
    async with node.relaying(), node.following():
        await lab.spread()
        with taken, await lab.places.run(node.netns, socket.create_connection, ("::1", 8080), 3):
            accepted, _ = taken.accept()
            accepted.close()
        assert await relayed_on(lab, node, "::1") == f"t1 {node.ingress[0]}"


def udp_client(address: str) -> socket.socket:
    client = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    client.settimeout(3)
    client.connect((address, 8080))
    return client


def say(connection: socket.socket) -> str:
    connection.send(b"hello\n")
    return connection.recv(100).decode().partition(" ")[0]


def exchange(address: str, question: bytes) -> bytes:
    """All that comes back until the end."""
    with socket.create_connection((address, 8080), timeout=3) as connection:
        connection.sendall(question)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while data := connection.recv(4096):
            received += data
        return received


def half_close(address: str) -> list[bytes]:
    with socket.create_connection((address, 8080), timeout=3) as connection:
        connection.sendall(b"hello\n")
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while data := connection.recv(4096):
            received += data
        return received.splitlines(keepends=True)
