"""A published port takes nothing from a program of the machine that listens on it, whatever its service says."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from tests.integration.node.conftest import eventually
from tests.support.networks.mesh_lab import CLIENT, CLIENT_IPV6, LabNode, MeshLab

_PORT = 22


@asynccontextmanager
async def program(node: LabNode, address: str) -> AsyncIterator[socket.socket]:
    """A server of the machine on port 22 of ``address``, of one address family."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET

    def listen() -> socket.socket:
        return socket.create_server((address, _PORT), family=family)

    with await node.lab.places.run(node.netns, listen) as server:
        server.settimeout(3)
        yield server


async def answers(lab: MeshLab, server: socket.socket, address: str) -> None:
    """A client's connection reaches ``server``."""
    with await lab.in_client(socket.create_connection, (address, _PORT), 3) as connection:
        accepted, peer = server.accept()
        accepted.close()
        assert peer[0] == connection.getsockname()[0]


async def answer_of_the_mesh(lab: MeshLab, address: str) -> str:
    """The task's answer, as soon as the port is published on ``address``."""
    async with asyncio.timeout(20):
        while True:
            with suppress(OSError):
                return await lab.ask(address, _PORT, timeout_s=1)


@pytest.mark.parametrize("options", [{}, {"proxy_protocol": 1}, {"host_ip": "0.0.0.0"}, {"host_ip": "::"}])
@pytest.mark.parametrize("replicas", [0, 1])
async def test_a_service_on_the_port_of_a_program_leaves_the_program_alone(
    lab: MeshLab, options: dict[str, object], replicas: int
) -> None:
    node = lab.nodes[0]
    for number in range(replicas):
        await lab.add_task(f"t{number}", lab.nodes[1])
    lab.publish(("tcp", _PORT, 80), **options)
    async with program(node, "0.0.0.0") as ipv4, program(node, "::") as ipv6, node.relaying():
        await lab.spread()
        await answers(lab, ipv4, node.address)
        await answers(lab, ipv6, node.address_ipv6)
    assert "Bind for " in node.mesh.warnings()[0]
    assert "port is already allocated" in node.mesh.warnings()[0]


async def test_a_program_that_listens_by_ipv6_alone_keeps_the_port_until_it_ends(lab: MeshLab) -> None:
    node = lab.nodes[0]
    await lab.add_task("t1", lab.nodes[1])
    lab.publish(("tcp", _PORT, 80))
    async with program(node, "::") as ipv6:
        await lab.spread()
        await answers(lab, ipv6, node.address_ipv6)
        with pytest.raises(ConnectionRefusedError):
            await lab.ask(node.address, _PORT, timeout_s=1)
        reason = "Bind for [::]:22 failed: port is already allocated"
        assert node.mesh.warnings() == (f"port 22/tcp is not published on this node: {reason}",)
    await lab.spread()
    assert await lab.ask(node.address_ipv6, _PORT) == f"t1 {CLIENT_IPV6}"
    assert await lab.ask(node.address, _PORT) == f"t1 {CLIENT}"


async def test_a_virtual_address_that_moves_here_is_published_but_not_over_a_program(lab: MeshLab) -> None:
    first, second = lab.nodes[:2]
    await lab.add_task("t1", lab.nodes[2])
    lab.publish(("tcp", _PORT, 80), host_ip="192.0.2.50")
    async with program(first, "0.0.0.0") as ipv4:
        await lab.spread()
        async with first.following(), second.following():
            await lab.batch(first.id, "addr add 192.0.2.50/24 dev eth0")
            await eventually(lambda: bool(first.mesh.warnings()), "the port is found to be in use")
            await answers(lab, ipv4, "192.0.2.50")
            await lab.batch(first.id, "addr del 192.0.2.50/24 dev eth0")
            await lab.batch(second.id, "addr add 192.0.2.50/24 dev eth0")
            await lab.batch("client", "neigh flush all")
            assert await answer_of_the_mesh(lab, "192.0.2.50") == f"t1 {CLIENT}"
