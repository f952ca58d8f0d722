"""What containers use, for Prometheus."""

import asyncio
import time

from msgspec.structs import replace

from skep.api.telemetry.exposition import render
from skep.engine.confinement.cgroups import Cgroups
from skep.engine.containers.container import Container, ContainerConfig, ContainerState
from skep.engine.metrics.stats import (
    BlkioEntry,
    BlkioStats,
    CPUStats,
    CPUUsage,
    MemoryStats,
    NetworkStats,
    PidsStats,
    Stats,
)
from skep.engine.metrics.usage import REQUESTED_S, ROUND_S, UsagePage, Used, families
from skep.model.values.ids import ContainerId
from skep.model.values.times import Timestamp
from tests.unit.api.test_exposition import read


def a_used(number: int) -> Used:
    container = Container(
        id=ContainerId(f"{number:064x}"),
        name=f"web.{number}.task{number}",
        image="shop/web:1",
        image_id="sha256:0",
        config=ContainerConfig(path="sh"),
        labels={
            "com.docker.swarm.service.name": "web",
            "com.docker.swarm.task.name": f"web.{number}.task{number}",
            "com.docker.stack.namespace": "shop",
        },
        state=ContainerState.RUNNING,
        started_at=Timestamp("2026-01-02T03:04:05Z"),
    )
    moved = (BlkioEntry(8, 0, "Read", 100), BlkioEntry(8, 16, "read", 11), BlkioEntry(8, 0, "Write", 5))
    stats = Stats(
        read=Timestamp("2026-01-02T03:04:06Z"),
        cpu_stats=CPUStats(cpu_usage=CPUUsage(total_usage=1_500_000_000)),
        memory_stats=MemoryStats(usage=1000, stats={"inactive_file": 300}, limit=4096, failcnt=2),
        pids_stats=PidsStats(current=3),
        blkio_stats=BlkioStats(io_service_bytes_recursive=moved),
        networks={"eth0": NetworkStats(rx_bytes=7), "eth1": NetworkStats(rx_bytes=8, tx_dropped=1)},
    )
    return Used(container, stats)


def test_a_label_of_any_length_is_cut_off() -> None:
    used = a_used(1)
    long = replace(used.container, labels={"com.docker.stack.namespace": "x" * 1_000_000})
    assert len(render(families([used._replace(container=long)]))) < 20_000


def test_a_container_is_named_by_its_service_task_and_stack() -> None:
    found = read(render(families([a_used(1)])))
    own = {
        "name": "web.1.task1",
        "image": "shop/web:1",
        "service": "web",
        "task": "web.1.task1",
        "stack": "shop",
    }
    labels = tuple(sorted(own.items()))
    assert found["container_cpu_usage_seconds_total"] == {labels: 1.5}
    assert found["container_memory_working_set_bytes"] == {labels: 700}
    assert found["container_memory_limit_hits_total"] == {labels: 2}
    assert found["container_threads"] == {labels: 3}
    assert found["container_fs_reads_bytes_total"] == {labels: 111}
    assert found["container_fs_writes_bytes_total"] == {labels: 5}
    assert found["container_start_time_seconds"] == {labels: 1_767_323_045}
    received = found["container_network_receive_bytes_total"]
    assert {dict(key)["interface"]: value for key, value in received.items()} == {"eth0": 7, "eth1": 8}


def test_a_round_is_rendered_beside_the_request_in_proportion_to_its_containers() -> None:
    used = [a_used(number) for number in range(1000)]
    begun = time.process_time()
    text = render(families(used))
    print(f"{len(text) >> 10} KiB of 1,000 containers rendered in {time.process_time() - begun:.3f} s")
    assert text.count(b"\n") == 1000 * (12 + 12) + 2 * 18


class Steps:
    """A clock whose sleeps take no time."""

    def __init__(self) -> None:
        self.at = 0.0
        self.has_passed = asyncio.Event()

    def monotonic(self) -> float:
        return self.at

    def now_ns(self) -> int:
        return 0

    async def sleep(self, seconds: float) -> None:
        self.at += seconds
        if self.at > REQUESTED_S:
            self.has_passed.set()
        await asyncio.sleep(0)


async def test_containers_are_read_in_rounds_while_there_are_requests_and_never_by_a_request() -> None:
    rounds: list[float] = []
    clock = Steps()

    def containers() -> list[Container]:
        rounds.append(clock.at)
        return [a_used(1).container]

    usage = UsagePage(containers, Cgroups("none"), clock)  # type: ignore[arg-type]  # no more of a clock is used
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        running = group.create_task(usage.run())
        await asyncio.sleep(0)
        assert rounds == []
        assert b'container_threads{name="web.1.task1"' in await usage.text()
        await clock.has_passed.wait()
        await asyncio.sleep(0.01)  # whatever could begin has begun
        known = len(rounds)
        assert REQUESTED_S / ROUND_S <= known <= REQUESTED_S / ROUND_S + 2
        assert await usage.text() != b""  # what was known is too old: another round
        assert len(rounds) > known
        running.cancel()
