"""``metrics-addr``: who opens connections there and asks nothing does not keep Prometheus out."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from skep.node import metrics_server
from skep.node.metrics_server import serving_metrics
from tests.support.log_receivers import free_port


async def test_connections_that_ask_nothing_give_way_and_pages_in_the_making_do_not(monkeypatch):
    monkeypatch.setattr(metrics_server, "_CONNECTIONS_MAX", 4)
    may_answer, asked = asyncio.Event(), 0

    async def text() -> bytes:
        nonlocal asked
        asked += 1
        await may_answer.wait()
        return b"page 1\n"

    port = free_port()

    async def ask() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        try:
            return await reader.read()
        finally:
            writer.close()

    metrics = cast("Any", SimpleNamespace(text=text))
    async with serving_metrics(("127.0.0.1", port), metrics), asyncio.timeout(10):
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(10)]
        pages = []
        for number in range(1, 5):
            pages.append(asyncio.create_task(ask()))
            while asked < number:  # noqa: ASYNC110 - the request arrives
                await asyncio.sleep(0.01)
        assert await ask() == b"", "all that may be open are busy"
        may_answer.set()
        assert all([(await page).endswith(b"page 1\n") for page in pages])
        for _, writer in idle:
            writer.close()
