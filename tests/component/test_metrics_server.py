"""``metrics-addr``: who opens connections there and asks nothing does not keep Prometheus out."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from skep.configuration.configuration import Configuration
from skep.node.telemetry.metrics_server import MetricsLimits, serving_metrics
from tests.support.engine.log_receivers import free_port


async def test_connections_that_ask_nothing_give_way_and_pages_in_the_making_do_not():
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
    configuration, limits = Configuration(metrics_addr=("127.0.0.1", port)), MetricsLimits(connections=4)
    async with serving_metrics(configuration, metrics, limits), asyncio.timeout(10):
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


async def text_of_a_page() -> bytes:
    return b"page\n"


METRICS = cast("Any", SimpleNamespace(text=text_of_a_page))


async def ask(port: int, head: bytes, local: str = "127.0.0.1") -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(local, 0))
    writer.write(head)
    try:
        return await reader.read()
    finally:
        writer.close()


async def test_one_address_takes_only_its_share_of_the_places() -> None:
    port = free_port()
    configuration = Configuration(metrics_addr=("127.0.0.1", port))
    limits = MetricsLimits(connections_per_address=2)
    async with serving_metrics(configuration, METRICS, limits), asyncio.timeout(10):
        greedy = [
            await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.0.7", 0)) for _ in range(3)
        ]
        assert await greedy[0][0].read() == b"", "the oldest of its own makes room"
        assert (await ask(port, b"GET /metrics HTTP/1.0\r\n\r\n")).endswith(b"page\n")
        for _, writer in greedy:
            writer.close()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"127.0.0.1:9323", 200),
        (b"[fd00::1]:9323", 200),
        (b"w1", 200),
        (b"w1:9323", 200),
        (b"host.docker.internal:9323", 200),
        (b"W1.local", 200),
        (b"node1.example.com:9323", 200),
        (b"rebound.attacker.example:9323", 403),
        (b"node1.example.com.attacker.example", 403),
        (b"127.0.0.1.attacker.example", 403),
        (b"", 403),
        (b"a:b:c", 403),
        (b"w1:99999999", 403),
    ],
)
async def test_a_page_of_a_name_that_anyone_can_register_reads_nothing(host: bytes, status: int) -> None:
    port = free_port()
    async with (
        serving_metrics(
            Configuration(metrics_addr=("127.0.0.1", port), metrics_hosts=("node1.example.com",)), METRICS
        ),
        asyncio.timeout(10),
    ):
        got = await ask(port, b"GET /metrics HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
    assert got.startswith(f"HTTP/1.1 {status} ".encode()), got
    assert (b"page" in got) is (status == 200)
    if status == 403 and b".example" in host:
        assert b"add the name to metrics-hosts" in got
