"""A container's name server when the process is short of descriptors."""

import asyncio
import errno
import random
import socket

from skep.aio.clock import SystemClock
from skep.dataplane.dns.resolution import Decision, Missing
from skep.dataplane.dns.server import ACCEPT_PAUSE_S, ContainerServer, DnsSockets, Forwarding, Services
from skep.dataplane.dns.upstream import QueryForwarder
from skep.model.networks.dns_messages import Query

WAIT_S = 5.0
QUESTION = b"\x00\x07\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00" + b"\x03web\x05front\x00" + b"\x00\x01\x00\x01"


class Nothing:
    """Knows no name."""

    def resolve(self, query: Query) -> Decision:
        return Missing()

    def is_loaded(self, virtual: Services) -> bool:
        return True

    async def load(self, virtual: Services) -> None:
        pass


class Scarce(socket.socket):
    """Takes a connection only when there are descriptors again."""

    refusals = 3
    tries = 0

    def __init__(self) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_STREAM)
        self.was_tried = asyncio.Event()

    def accept(self) -> tuple[socket.socket, object]:
        self.tries += 1
        self.was_tried.set()
        if self.tries <= self.refusals:
            raise OSError(errno.EMFILE, "too many open files")
        return super().accept()


async def unused(kind: socket.SocketKind, family: socket.AddressFamily) -> socket.socket:
    raise AssertionError("no upstream server is asked")


async def test_a_connection_that_finds_no_descriptor_is_taken_later_and_not_tried_without_end() -> None:
    tcp = Scarce()
    tcp.bind(("127.0.0.1", 0))
    tcp.listen()
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    async with asyncio.TaskGroup() as group:
        forwarder = QueryForwarder(SystemClock(), lambda: random.randrange(1 << 16))
        server = ContainerServer(
            "c1",
            DnsSockets(udp, tcp),
            Nothing(),
            forwarder,
            Forwarding((), unused),
            lambda work: group.create_task(work),  # type: ignore[arg-type]
        )
        server.start()
        began = asyncio.get_running_loop().time()
        reader, writer = await asyncio.open_connection(*tcp.getsockname())
        writer.write(len(QUESTION).to_bytes(2, "big") + QUESTION)
        async with asyncio.timeout(WAIT_S):
            answer = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
        assert answer[:2] == QUESTION[:2]
        assert forwarder.counts.questions == {"A": 1}
        assert forwarder.counts.responses == {("network", "NXDOMAIN"): 1}
        assert tcp.tries == Scarce.refusals + 1
        assert asyncio.get_running_loop().time() - began >= 0.9 * Scarce.refusals * ACCEPT_PAUSE_S
        writer.close()
        server.stop()
    server.sockets.close()


async def test_a_server_that_is_stopped_meanwhile_takes_nothing_more() -> None:
    tcp = Scarce()
    tcp.bind(("127.0.0.1", 0))
    tcp.listen()
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    forwarder = QueryForwarder(SystemClock(), lambda: 1)
    server = ContainerServer(
        "c1", DnsSockets(udp, tcp), Nothing(), forwarder, Forwarding((), unused), asyncio.ensure_future
    )
    server.start()
    _, writer = await asyncio.open_connection(*tcp.getsockname())
    async with asyncio.timeout(WAIT_S):
        await tcp.was_tried.wait()
    server.stop()
    await asyncio.sleep(2 * ACCEPT_PAUSE_S)
    assert tcp.tries == 1
    writer.close()
    server.sockets.close()
