"""Documents of containers: one container that waits for its own keeps no other waiting."""

import asyncio
import socket

import pytest

from skep.aio.clock import SystemClock
from skep.model.permissions.access import Identity
from skep.model.permissions.rights import ApiAccess
from skep.model.values.ids import ContainerId
from skep.node.container_apis.exchange import Exchanges

A, B = ContainerId("a" * 64), ContainerId("b" * 64)
DOCUMENT = b'HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{"Env":["A=x"]}'


async def test_documents_that_do_not_come_keep_no_other_container_waiting() -> None:
    silent: list[socket.socket] = []
    asked = asyncio.Event()

    def dispatch(connected: socket.socket, _: Identity) -> None:
        """Answers nothing until the test's flag is set, and every request after it."""
        if responses:
            connected.sendall(DOCUMENT)
            connected.shutdown(socket.SHUT_WR)
        silent.append(connected)
        asked.set()

    responses = False
    exchanges = Exchanges(dispatch, SystemClock())

    async def ask(id: ContainerId) -> bytes:
        ours, theirs = socket.socketpair()
        serving = asyncio.create_task(exchanges.carry_out(theirs, id, ApiAccess.READ))
        reader, writer = await asyncio.open_connection(sock=ours)
        writer.write(b"GET /services HTTP/1.1\r\nHost: d\r\n\r\n")
        try:
            return await reader.read()
        finally:
            writer.close()
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    waiting = [asyncio.create_task(ask(A)) for _ in range(32)]
    async with asyncio.timeout(10):
        await asked.wait()
        responses = True
        assert (await ask(B)).endswith(b'{"Env":["A="]}')
    assert len(silent) == 3, "two of A were asked for, and one of B"
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    for one in silent:
        one.close()


@pytest.mark.parametrize(("access", "is_marked"), [(ApiAccess.READ, True), (ApiAccess.INSPECT, False)])
async def test_a_stream_of_events_is_asked_for_as_one_of_a_container_that_only_reads(
    access: ApiAccess, is_marked: bool
) -> None:
    asked = asyncio.Queue[socket.socket]()
    exchanges = Exchanges(lambda connected, _: asked.put_nowait(connected), SystemClock())
    ours, theirs = socket.socketpair()
    serving = asyncio.create_task(exchanges.carry_out(theirs, A, access))
    _, writer = await asyncio.open_connection(sock=ours)
    writer.write(b"GET /events HTTP/1.1\r\nHost: d\r\n\r\n")
    reader, answering = await asyncio.open_connection(sock=await asked.get())
    head = await reader.readuntil(b"\r\n\r\n")
    assert (b"X-Skep-Reader: 1" in head) is is_marked
    for one in (writer, answering):
        one.close()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


@pytest.mark.parametrize("access", [ApiAccess.READ, ApiAccess.INSPECT])
async def test_a_request_with_a_body_is_refused_without_full_access(access: ApiAccess) -> None:
    """Another request could hide in it."""
    asked = list[socket.socket]()
    exchanges = Exchanges(lambda connected, _: asked.append(connected), SystemClock())
    ours, theirs = socket.socketpair()
    serving = asyncio.create_task(exchanges.carry_out(theirs, A, access))
    reader, writer = await asyncio.open_connection(sock=ours)
    hidden = b"POST /swarm/leave HTTP/1.1\r\nHost: d\r\n\r\n"
    writer.write(b"GET /events HTTP/1.1\r\nHost: d\r\nContent-Length: %d\r\n\r\n%s" % (len(hidden), hidden))
    async with asyncio.timeout(10):
        assert (await reader.readline()).startswith(b"HTTP/1.1 400")
    assert asked == []
    writer.close()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
