"""What a node reports of its tasks' usage, from counters."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.engine.confinement.cgroups import Cgroups
from skep.engine.containers.container import Container, ContainerConfig, ContainerState
from skep.engine.metrics.stats import cpu_and_memory
from skep.model.options.autoscaling import TaskUsage
from skep.model.values.ids import ContainerId, TaskId
from skep.node.telemetry.task_usage import VALID_S, WINDOW_S, TaskUsageMeter, UsageReading, kept, usage_of

CPU = 1_000_000_000


def reading(at: float, cpu_s: float, container: str = "c", memory: int = 5) -> UsageReading:
    return UsageReading(
        container=ContainerId(container), at=at, cpu_ns=round(cpu_s * CPU), memory_bytes=memory
    )


def after(*readings: UsageReading) -> tuple[UsageReading, ...]:
    found: tuple[UsageReading, ...] = ()
    for one in readings:
        found = kept(found, one)
    return found


def test_processor_time_is_averaged_over_the_window_and_memory_is_the_last() -> None:
    readings = after(reading(0, 0), reading(5, 5), reading(10, 5), reading(15, 5), reading(20, 10, memory=9))
    assert usage_of(readings, 20.0) == TaskUsage(nano_cpus=CPU // 2, memory_bytes=9)


def test_one_reading_measures_nothing_nor_do_readings_that_are_old() -> None:
    assert usage_of(after(reading(0, 0)), 0.0) is None
    assert usage_of(after(reading(0, 0), reading(5, 1)), 5 + VALID_S + 1) is None


def test_a_container_that_was_started_again_is_measured_anew() -> None:
    again = after(reading(0, 90), reading(5, 95), reading(10, 1, container="d"))
    assert usage_of(again, 10.0) is None
    backwards = after(reading(0, 90), reading(5, 1))
    assert usage_of(backwards, 5.0) is None


@given(st.lists(st.floats(0.1, 30), min_size=2, max_size=50))
def test_few_readings_are_kept_and_they_span_the_window(pauses: Sequence[float]) -> None:
    now, readings = 0.0, after()
    for pause in pauses:
        now += pause
        readings = kept(readings, reading(now, now))
        if len(readings) > 2:
            assert now - readings[1].at < WINDOW_S
    usage = usage_of(readings, now)
    assert usage is not None
    assert usage.nano_cpus == pytest.approx(CPU, rel=1e-3)


class Hierarchy(Cgroups):
    """Files of one group in a directory, as either version of cgroups has them."""

    def __init__(self, group: Path, *, is_v2: bool) -> None:
        self.parent, self.is_v2, self._group = "skep", is_v2, group

    def directory(self, container: Container, controller: str) -> Path | None:
        return self._group


A_CONTAINER = Container(
    id=ContainerId("c" * 64),
    name="web.1",
    image="w",
    image_id="sha256:0",
    config=ContainerConfig(path="sh"),
    labels={"com.docker.swarm.task.id": "t1"},
    state=ContainerState.RUNNING,
)
FILES = {
    True: {
        "cpu.stat": "usage_usec 2000\nuser_usec 1500\n",
        "memory.current": "1000\n",
        "memory.stat": "anon 5\ninactive_file 300\n",
    },
    False: {
        "cpuacct.usage": "2000000\n",
        "memory.usage_in_bytes": "1000\n",
        "memory.stat": "inactive_file 1\ntotal_inactive_file 300\n",
    },
}


@pytest.mark.parametrize("is_v2", [True, False])
def test_counters_are_read_from_either_version_and_those_of_a_group_that_is_gone_are_none(
    is_v2: bool, tmp_path: Path
) -> None:
    hierarchy = Hierarchy(tmp_path, is_v2=is_v2)
    assert cpu_and_memory(A_CONTAINER, hierarchy) is None
    for name, text in FILES[is_v2].items():
        (tmp_path / name).write_text(text)
    assert cpu_and_memory(A_CONTAINER, hierarchy) == (2_000_000, 700)


async def test_a_meter_measures_what_it_was_asked_about_and_nothing_else(tmp_path: Path) -> None:
    """Virtual time: each reading finds that a processor was used all the time since the one before."""
    clock = Steps()
    for name, text in FILES[True].items():
        (tmp_path / name).write_text(text)

    def use() -> None:
        (tmp_path / "cpu.stat").write_text(f"usage_usec {round(clock.now * 1_000_000) + 1}\n")

    clock.on_sleep = use
    meter = TaskUsageMeter(lambda: [A_CONTAINER], Hierarchy(tmp_path, is_v2=True), clock)
    running = asyncio.create_task(meter.run())
    try:
        await asyncio.sleep(0)
        assert clock.now == 0.0, "nothing is read before a manager asks"
        meter.measure([TaskId("t1")])
        async with asyncio.timeout(20):
            while not meter.present():  # noqa: ASYNC110 -- a meter announces nothing
                await asyncio.sleep(0)
        assert meter.present()[TaskId("t1")].nano_cpus == pytest.approx(CPU, rel=0.01)
        meter.measure([TaskId("other")])
        assert meter.present() == {}
    finally:
        running.cancel()


class Steps:
    """A clock that jumps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.on_sleep = lambda: None

    def now_ns(self) -> int:
        return round(self.now * CPU)

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep()
        await asyncio.sleep(0)
