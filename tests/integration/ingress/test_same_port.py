"""A client may use one of its ports towards several nodes: the connections meet at one task, and stay apart."""

import socket

import pytest

from tests.support.networks.mesh_lab import CLIENT, CLIENT_IPV6, MeshLab

PORT = 40_000


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
async def test_connections_from_one_port_through_every_node_reach_the_only_task(
    lab: MeshLab, family: socket.AddressFamily
) -> None:
    lab.publish(("tcp", 8080, 80))
    await lab.add_task("t1", lab.nodes[2])
    await lab.spread()
    nodes = [node.address if family is socket.AF_INET else node.address_ipv6 for node in lab.nodes]
    own = CLIENT if family is socket.AF_INET else CLIENT_IPV6
    opened = await lab.in_client(open_from_one_port, family, nodes)
    try:
        for turn in range(3):
            for connection in opened:
                assert await lab.in_client(say, connection, turn) == f"t1 {own} {turn}"
    finally:
        for connection in opened:
            connection.close()


def open_from_one_port(family: socket.AddressFamily, addresses: list[str]) -> list[socket.socket]:
    opened = []
    for address in addresses:
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        connection.settimeout(3)
        connection.bind(("", PORT))
        connection.connect((address, 8080))
        opened.append(connection)
    return opened


def say(connection: socket.socket, word: int) -> str:
    connection.sendall(f"{word}\n".encode())
    return connection.recv(1000).decode().strip()
