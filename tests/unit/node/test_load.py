"""How busy a node says it is."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.aio.clock import SystemClock
from skep.engine.confinement.cgroups import Cgroups
from skep.node.host.machine import this_machine
from skep.node.telemetry.load import (
    SAMPLE_S,
    TIME_CONSTANT_S,
    LoadMeter,
    LoadReading,
    Measured,
    Smoothing,
    measured,
    reader_of,
    reading_of_machine,
    share,
    smoothed,
)

STAT = "cpu  100 20 30 700 50 5 5 90 11 2\ncpu0 1 2 3 4 5 6 7 8 9 10\nctxt 12\n"
MEMINFO = (
    "MemTotal:        1000 kB\nMemFree:          100 kB\nMemAvailable:     600 kB\nHugePages_Total:   0\n"
)

SHARES = st.floats(0, 1)
TIMES = st.floats(0, 1000)


def test_waiting_is_idle_stolen_time_is_not_and_guests_count_once() -> None:
    reading = reading_of_machine(STAT, MEMINFO)
    assert (reading.busy, reading.capacity) == (250, 1000)
    assert reading.memory == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("stat", "meminfo"), [("", MEMINFO), ("cpu a b\n", MEMINFO), (STAT, "MemTotal: 5 kB\n")]
)
def test_files_that_look_otherwise_are_refused(stat: str, meminfo: str) -> None:
    with pytest.raises((ValueError, LookupError)):
        reading_of_machine(stat, meminfo)


def test_the_tighter_resource_counts() -> None:
    before = LoadReading(busy=10, capacity=100, memory=0.9)
    assert share(before, LoadReading(busy=60, capacity=200, memory=0.2)) == 0.5
    assert share(before, LoadReading(busy=60, capacity=200, memory=0.7)) == 0.7


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), SHARES)
def test_a_share_is_a_share_whatever_the_counters_do(busy: float, capacity: float, memory: float) -> None:
    before = LoadReading(busy=0, capacity=0, memory=0)
    assert 0 <= share(before, LoadReading(busy=busy, capacity=capacity, memory=memory)) <= 1


@given(SHARES, SHARES, TIMES, TIMES)
def test_an_average_does_not_depend_on_how_often_it_was_measured(
    average: float, part: float, first_s: float, second_s: float
) -> None:
    at_once = smoothed(average, part, first_s + second_s)
    in_two = smoothed(smoothed(average, part, first_s), part, second_s)
    assert in_two == pytest.approx(at_once, abs=1e-9)
    assert min(average, part) - 1e-9 <= at_once <= max(average, part) + 1e-9


def test_after_one_time_constant_a_change_is_known_to_63_percent() -> None:
    assert smoothed(0.0, 1.0, TIME_CONSTANT_S) == pytest.approx(1 - 1 / math.e)


@given(st.lists(st.tuples(st.floats(0.1, 100), SHARES, SHARES), min_size=1, max_size=20))
def test_the_reported_load_lies_between_measured_values(steps: list[tuple[float, float, float]]) -> None:
    now, state, parts = 0.0, measured(None, LoadReading(busy=0, capacity=0, memory=0), 0.0), []
    busy = capacity = 0.0
    assert state.load is None
    for elapsed_s, processors, memory in steps:
        now += elapsed_s
        busy, capacity = busy + processors * elapsed_s, capacity + elapsed_s
        state = measured(state, LoadReading(busy=busy, capacity=capacity, memory=memory), now)
        parts.append(max(processors, memory))
        assert state.load is not None
        assert min(parts) - 1e-6 <= state.load <= max(parts) + 1e-6
        assert (state.reported(now) is None) == (now < TIME_CONSTANT_S)


class HandClock(SystemClock):
    """A manually advanced clock."""

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


class Counters:
    """A node with a configurable load."""

    def __init__(self) -> None:
        self.busy = 0.0
        self.part = 0.0
        self.read_at = 0.0
        self.readings = 0
        self.is_broken = False

    def read(self, now: float) -> LoadReading:
        if self.is_broken:
            raise OSError("gone")
        self.readings += 1
        self.busy += (now - self.read_at) * self.part
        self.read_at = now
        return LoadReading(busy=self.busy, capacity=now, memory=0.0)


def beats(meter: LoadMeter, clock: HandClock, seconds: float) -> list[float | None]:
    """What the heartbeats of some time say, three a second."""
    output = []
    for _ in range(round(seconds * 3)):
        clock.advance(1 / 3)
        output.append(meter.load())
    return output


def test_no_load_is_reported_at_first_and_then_the_lasting_one() -> None:
    clock, counters = HandClock(), Counters()
    meter = LoadMeter(counters.read, clock)
    assert meter.load() is None
    assert set(beats(meter, clock, TIME_CONSTANT_S - 1)) == {None}
    assert beats(meter, clock, 10)[-1] == 0.0
    counters.part = 0.8
    burst = beats(meter, clock, 5 + SAMPLE_S)[-1]
    assert burst is not None
    assert 0.1 < burst < 0.3
    lasting = beats(meter, clock, 4 * TIME_CONSTANT_S)[-1]
    assert lasting == pytest.approx(0.8, abs=0.02)


def test_the_load_is_measured_less_often_than_reported() -> None:
    clock, counters = HandClock(), Counters()
    beats(LoadMeter(counters.read, clock), clock, 60)
    assert counters.readings <= 60 / SAMPLE_S + 1


def test_an_unreadable_load_is_not_reported_and_measuring_restarts() -> None:
    clock, counters = HandClock(), Counters()
    meter = LoadMeter(counters.read, clock)
    counters.part = 0.5
    assert beats(meter, clock, 2 * TIME_CONSTANT_S)[-1] == pytest.approx(0.5)
    counters.is_broken = True
    assert beats(meter, clock, SAMPLE_S + 1)[-1] is None
    counters.is_broken = False
    assert beats(meter, clock, TIME_CONSTANT_S / 2)[-1] is None
    assert beats(meter, clock, TIME_CONSTANT_S)[-1] == pytest.approx(0.5)


def test_the_machine_can_be_read() -> None:
    reading = reader_of(this_machine(), Cgroups("nobody-is-in-there"))(0.0)
    assert 0 < reading.busy < reading.capacity
    assert 0 < reading.memory < 1


def undamped(average: float, share: float, elapsed_s: float) -> float:
    """A wrong twin: the last measurement is all that counts."""
    return share


def per_sample(average: float, share: float, elapsed_s: float) -> float:
    """A wrong twin: every sample weighs the same, however long it stands for."""
    return average + (share - average) / 6


@pytest.mark.parametrize("twin", [undamped, per_sample])
def test_wrong_twins_are_rejected(twin: Smoothing) -> None:
    state: Measured = measured(None, LoadReading(busy=0, capacity=0, memory=0), 0.0, twin)
    state = measured(state, LoadReading(busy=0, capacity=30, memory=0), 30.0, twin)
    state = measured(state, LoadReading(busy=1, capacity=31, memory=0), 31.0, twin)
    assert state.load != pytest.approx(-math.expm1(-1 / TIME_CONSTANT_S))
