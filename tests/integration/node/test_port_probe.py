"""The results for a port that is closed, silent, or another program's."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from skep.aio.clock import SystemClock
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.probe.packets import Outcome
from skep.dataplane.probe.port_probe import TRIES, PortProbe


class Answering(asyncio.Protocol):
    """Answers every client with bytes that are no TLS."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")


class Closing(Answering):
    """Listens, and ends the connection."""

    def data_received(self, data: bytes) -> None:
        self._transport.close()


@pytest.fixture
async def probing(tmp_path: Path) -> AsyncIterator[PortProbe]:
    namespaces = Namespaces(tmp_path)
    yield PortProbe(namespaces, SystemClock(), lambda: 7)
    namespaces.close()


def refused(error: str) -> Outcome:
    return Outcome(sent=TRIES, answered=0, error=error)


@pytest.mark.parametrize(
    ("server", "error"),
    [(Answering, "the response is not TLS"), (Closing, "the connection is closed without a response")],
)
async def test_a_port_without_tls_is_no_manager(
    probing: PortProbe, server: type[asyncio.Protocol], error: str
) -> None:
    async with await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        assert await probing.tls_hello("127.0.0.1", port) == refused(error)
        assert (await probing.connect("127.0.0.1", port)).arrived


async def test_a_silent_port_times_out_and_a_closed_one_refuses(probing: PortProbe) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and does not read
        assert await probing.tls_hello("127.0.0.1", silent.getsockname()[1]) == refused("no response")
    port = silent_port()
    assert await probing.tls_hello("127.0.0.1", port) == refused("connection refused")
    assert await probing.connect("127.0.0.1", port) == refused("connection refused")


async def test_a_tunnels_end_answers_and_one_that_is_not_there_does_not(probing: PortProbe) -> None:
    here = Path("/proc/self/ns/net")
    assert (await probing.tunnel(here, "::1")).answered == 1
    assert (await probing.tunnel(here, "fd73:6b65:7065:6e63::1")).answered == 0


def silent_port() -> int:
    """A port without a listener, neither TCP nor UDP."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port
