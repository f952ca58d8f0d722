"""What a node reports of its tasks' usage, from counters."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.model.autoscaling import TaskUsage
from skep.model.ids import ContainerId
from skep.node.task_usage import VALID_S, WINDOW_S, Reading, kept, usage_of

CPU = 1_000_000_000


def reading(at: float, cpu_s: float, container: str = "c", memory: int = 5) -> Reading:
    return Reading(container=ContainerId(container), at=at, cpu_ns=round(cpu_s * CPU), memory_bytes=memory)


def after(*readings: Reading) -> tuple[Reading, ...]:
    found: tuple[Reading, ...] = ()
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
