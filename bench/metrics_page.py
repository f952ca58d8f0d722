"""The time for ``/metrics`` of a node with 1,000 containers, from the request to the last byte.

::

    .venv/bin/python -m bench.metrics_page            # kept in results/
    .venv/bin/python -m bench.metrics_page --dry      # only printed

The page and its server are the node's own.  The kernel's files about the containers are not read, because requests
never read them.
"""

import asyncio
import socket
import statistics
import time
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import msgspec

from bench.run import figures_page, measure_alone
from skep.aio.clock import SystemClock
from skep.aio.event_loop.gc_settings import configure_gc
from skep.configuration.configuration import Configuration
from skep.engine.confinement.cgroups import Cgroups
from skep.engine.containers.container import Container, ContainerConfig, ContainerState
from skep.engine.metrics.stats import CPUStats, CPUUsage, MemoryStats, NetworkStats, PidsStats, Stats
from skep.engine.metrics.usage import UsagePage, Used
from skep.model.values.ids import ContainerId
from skep.model.values.times import Timestamp
from skep.node.telemetry import metrics as node_metrics
from skep.node.telemetry.metrics import NodeMetrics, Sources
from skep.node.telemetry.metrics_server import serving_metrics

CONTAINERS = 1000
REQUESTS = 15
APART_S = node_metrics.KEPT_S + 0.2


class Result(msgspec.Struct, kw_only=True):
    """Times in milliseconds."""

    bytes: int
    request_ms: list[float]
    processor_ms: float


class _Known(UsagePage):
    """Usage of containers with known numbers."""

    def _read(self, containers: Iterable[Container]) -> list[Used]:
        return [Used(one, _stats(number)) for number, one in enumerate(containers)]


def main() -> None:
    """Measure, and keep the result."""
    measure_alone(__doc__ or "", "metrics-page", _measure, _text)


async def _measure() -> Result:
    containers = [_container(number) for number in range(CONTAINERS)]
    clock = SystemClock()
    usage = _Known(lambda: containers, Cgroups("none"), clock)
    page = NodeMetrics(_sources(usage), clock)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    configure_gc()
    async with (
        serving_metrics(Configuration(metrics_addr=("127.0.0.1", port)), page),
        asyncio.TaskGroup() as group,
    ):
        running = group.create_task(page.run())
        await _request_s(port)  # the first request reads the containers
        took, size, processor = [], 0, time.process_time()
        for _ in range(REQUESTS):
            await asyncio.sleep(APART_S)
            seconds, size = await _request_s(port)
            took.append(seconds * 1e3)
        spent = time.process_time() - processor
        running.cancel()
    return Result(bytes=size, request_ms=took, processor_ms=spent / REQUESTS * 1e3)


async def _request_s(port: int) -> tuple[float, int]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    began = time.perf_counter()
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")
    content = await reader.read()
    writer.close()
    assert content.count(b"container_threads{") == CONTAINERS, content[:200]
    return time.perf_counter() - began, len(content)


def _sources(usage: UsagePage) -> Sources:
    nothing = cast("Any", None)
    return Sources(
        node=nothing, events=nothing, conditions=nothing, session=nothing, load=nothing,
        data_plane=None, usage=usage, reads=nothing, membership=cast("Any", SimpleNamespace(is_manager=False)),
        engine=None, exporter=None, disks=nothing, reports=nothing,
    )  # fmt: skip


@contextmanager
def _containers_alone() -> Any:
    """Leave out the node's own values, some fifty lines, because they need a whole node."""
    own = NodeMetrics._own
    NodeMetrics._own = lambda _self: []  # type: ignore[method-assign]
    try:
        yield
    finally:
        NodeMetrics._own = own  # type: ignore[method-assign]


def _container(number: int) -> Container:
    labels: Mapping[str, str] = {
        "com.docker.swarm.service.name": f"shop_web{number % 40}",
        "com.docker.swarm.task.name": f"shop_web{number % 40}.{number}.{number:025}",
        "com.docker.stack.namespace": "shop",
    }
    return Container(
        id=ContainerId(f"{number:064x}"),
        name=labels["com.docker.swarm.task.name"],
        image="registry.example/shop/web:1.27",
        image_id="sha256:0",
        config=ContainerConfig(path="sh"),
        labels=labels,
        state=ContainerState.RUNNING,
        started_at=Timestamp("2026-01-02T03:04:05Z"),
    )


def _stats(number: int) -> Stats:
    return Stats(
        read=Timestamp("2026-01-02T03:04:06Z"),
        cpu_stats=CPUStats(cpu_usage=CPUUsage(total_usage=1_500_000_007 * number)),
        memory_stats=MemoryStats(usage=1000 * number, stats={"inactive_file": 300}, limit=4096, failcnt=2),
        pids_stats=PidsStats(current=3),
        networks={"eth0": NetworkStats(rx_bytes=7), "eth1": NetworkStats(rx_bytes=8, tx_dropped=1)},
    )


def _text(result: Result, busy: float) -> str:
    ordered = sorted(result.request_ms)
    rows = (
        ("bytes", f"{result.bytes:,}"),
        ("request, ms: median", f"{statistics.median(ordered):.1f}"),
        ("request, ms: smallest, the least disturbed one", f"{ordered[0]:.1f}"),
        ("request, ms: largest", f"{ordered[-1]:.1f}"),
        (
            "processor of a request with its share of the rounds, and its reader, ms",
            f"{result.processor_ms:.1f}",
        ),
    )
    return figures_page(f"/metrics of a node with {CONTAINERS:,} containers", busy, rows)


if __name__ == "__main__":
    with _containers_alone():
        main()
