"""A failed handshake ends neither other connections nor the accept loop."""

import asyncio
import os
import resource
import socket
import ssl

from structlog.testing import capture_logs

from skep.aio.connections.handshakes import Handshakes


async def test_a_handshake_that_meets_a_bug_ends_alone() -> None:
    tried: list[asyncio.Protocol] = []

    def new_protocol() -> asyncio.Protocol:
        tried.append(asyncio.Protocol())
        if len(tried) == 1:
            raise ValueError("a name that is none")
        return tried[-1]

    with socket.create_server(("127.0.0.1", 0)) as listener, capture_logs() as logs:
        listener.setblocking(False)
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            accepting = group.create_task(Handshakes(new_protocol, context).accept(listener, group))
            for number in (1, 2):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                while len(tried) < number:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                writer.close()
            accepting.cancel()
    assert [one["event"] for one in logs if one["log_level"] == "error"] == ["handshake failed"]


async def test_without_a_free_descriptor_connections_wait_until_there_is_one() -> None:
    accepted = asyncio.Event()

    def new_protocol() -> asyncio.Protocol:
        accepted.set()
        return asyncio.Protocol()

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.create_server(("127.0.0.1", 0)) as listener, capture_logs() as logs:
        listener.setblocking(False)
        with socket.create_connection(listener.getsockname()):
            async with asyncio.timeout(30), asyncio.TaskGroup() as group:
                free = os.dup(listener.fileno())  # the lowest one, which an accepted connection would get
                os.close(free)
                resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
                try:
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                    server = Handshakes(new_protocol, context)
                    accepting = group.create_task(server.accept(listener, group))
                    while not logs:  # noqa: ASYNC110
                        await asyncio.sleep(0.001)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                await accepted.wait()
                accepting.cancel()
    assert logs[0]["event"] == "connection not accepted"
