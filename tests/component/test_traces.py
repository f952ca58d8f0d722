"""Spans reach a collector, in batches and in OTLP's JSON; without one they are dropped, and counted."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from skep.api.telemetry.exposition import render
from skep.api.telemetry.otlp import WAITING_MAX, TraceExporter
from skep.tracing import Span
from tests.support.harness.clocks import FastClock
from tests.support.telemetry.otlp_receiver import Receiver


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    with Receiver(0, tmp_path / "traces") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def a_span(number: int, **more: Any) -> Span:
    return Span(
        trace="a" * 32, id=f"{number:016x}", name=f"step {number}", begin_ns=10**18, end_ns=10**18 + 5, **more
    )


@asynccontextmanager
async def exporting(port: int) -> AsyncIterator[TraceExporter]:
    exporter = TraceExporter(f"http://127.0.0.1:{port}", "node", "m1", FastClock(1000), lambda: 0.0)
    task = asyncio.create_task(exporter.run())
    yield exporter
    task.cancel()
    await asyncio.wait([task])


def counted(exporter: TraceExporter) -> dict[str, int]:
    lines = [line.split() for line in render(exporter.families()).decode().splitlines() if line[0] != "#"]
    return {name.partition("{")[0].split("_")[3]: int(value) for name, value in lines}


async def until(exporter: TraceExporter, **wanted: int) -> None:
    async with asyncio.timeout(20):
        while counted(exporter) != wanted:  # noqa: ASYNC110 - nobody is told
            await asyncio.sleep(0.01)


async def test_spans_arrive_whole(receiver: Receiver) -> None:
    async with exporting(receiver.server_address[1]) as exporter:
        exporter.add(
            [a_span(1), a_span(2, parent="1" * 16, error="refused", attributes={"skep.service": "web"})]
        )
        await until(exporter, sent=2, dropped=0)
    (body,) = map(json.loads, receiver.file.read_text().splitlines())
    (resource,) = body["resourceSpans"]
    about = {one["key"]: one["value"]["stringValue"] for one in resource["resource"]["attributes"]}
    assert (about["service.name"], about["host.name"]) == ("skep-node", "m1")
    first, second = resource["scopeSpans"][0]["spans"]
    assert first == {
        "traceId": "a" * 32,
        "spanId": "0000000000000001",
        "name": "step 1",
        "kind": 1,
        "startTimeUnixNano": "1000000000000000000",
        "endTimeUnixNano": "1000000000000000005",
        "attributes": [],
    }
    assert second["parentSpanId"] == "1" * 16
    assert second["status"] == {"code": 2, "message": "refused"}
    assert second["attributes"] == [{"key": "skep.service", "value": {"stringValue": "web"}}]


async def test_an_overloaded_collector_gets_them_again_and_one_that_refuses_does_not(
    receiver: Receiver,
) -> None:
    receiver.statuses = [503, 200, 400, 200]
    async with exporting(receiver.server_address[1]) as exporter:
        exporter.add([a_span(1)])
        await until(exporter, sent=1, dropped=0)
        exporter.add([a_span(2)])
        await until(exporter, sent=1, dropped=1)
        exporter.add([a_span(3)])
        await until(exporter, sent=2, dropped=1)
    assert len(receiver.file.read_text().splitlines()) == 2


async def test_without_a_collector_what_waits_is_bounded() -> None:
    async with exporting(1) as exporter:
        exporter.add(a_span(number) for number in range(WAITING_MAX + 7))
        await asyncio.sleep(0)
        assert counted(exporter) == {"sent": 0, "dropped": 7}


async def test_a_redirection_and_a_text_that_is_no_unicode_drop_their_spans_only(receiver: Receiver) -> None:
    receiver.statuses = [302, 200]
    async with exporting(receiver.server_address[1]) as exporter:
        exporter.add([a_span(1)])
        await until(exporter, sent=0, dropped=1)
        exporter.add([a_span(2, error="no such file: \udcff")])
        await until(exporter, sent=0, dropped=2)
        exporter.add([a_span(3, error="DB_PASSWORD=hunter2 is wrong")])
        await until(exporter, sent=1, dropped=2)
    assert "hunter2" not in receiver.file.read_text()
