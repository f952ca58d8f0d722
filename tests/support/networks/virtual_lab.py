"""A client of service web, at 10.0.1.2, and three backends, in real namespaces."""

import asyncio
import socket
from collections import Counter

from skep.model.networks.tables import NetworkTable
from tests.support.networks.names_lab import NamesLab
from tests.support.networks.tables import a_network, a_served

VIRTUAL = "10.0.1.2"
BACKENDS = {f"b{number}": f"10.0.1.{number}" for number in (11, 12, 13)}
CLIENT = "10.0.1.5"


def web(*names: str) -> NetworkTable:
    """Return the table of service web with these backends."""
    return a_network(a_served("web", VIRTUAL, [BACKENDS[name] for name in names]))


async def start_web(lab: NamesLab, *names: str) -> None:
    """Start a client that knows web's address, and all backends."""
    for id, address in BACKENDS.items():
        await lab.container(id, address)
        await lab.backend(id, address)
    await lab.container("client", CLIENT)
    await client_has(lab, web(*names))


async def client_has(lab: NamesLab, table: NetworkTable) -> None:
    lab.write(table)
    await lab.serve("client", table)
    assert await (await lab.resolver("client")).addresses("web") == [VIRTUAL]


async def flow(lab: NamesLab, address: str = VIRTUAL, id: str = "client") -> socket.socket:
    """Return a connected UDP socket of the container."""
    opened = await lab.open(id, socket.SOCK_DGRAM, socket.AF_INET6 if ":" in address else socket.AF_INET)
    opened.connect((address, 80))
    return opened


async def say(flow: socket.socket) -> list[str]:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(1):
        await loop.sock_sendall(flow, b"hello")
        return (await loop.sock_recv(flow, 100)).decode().split()


async def who(lab: NamesLab, count: int) -> Counter[str]:
    """Count the backends that respond to that many new connections."""
    found: Counter[str] = Counter()
    for _ in range(count):
        conversation = await lab.connect("client", VIRTUAL)
        found[(await conversation.say())[0]] += 1
        conversation.socket.close()
    return found
