"""How many tasks an autoscaled service gets: single cases, properties, and a closed loop over simulated time."""

from collections.abc import Callable
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.autoscaling.decision import (
    PERIOD_S,
    TOLERANCE,
    Measure,
    Readings,
    Recommendations,
    ScalingDecision,
    decide,
    readings_of,
    shown_reason,
    wanted,
)
from skep.model.options.autoscaling import Autoscaling, TaskUsage, parsed_autoscaling, with_replicas
from skep.model.service import (
    Limits,
    ResourceRequirements,
    Resources,
    Service,
    ServiceSpec,
    UpdateState,
    UpdateStatus,
)
from skep.model.task import Task, TaskState
from tests.support.builders import a_service, a_service_spec, a_task

CPU = 1_000_000_000
WINDOW_S = 300.0
RANGE = Autoscaling(least=2, most=10, cpu=50)


def a_scaled(replicas: int, *, state: UpdateState | None = None) -> Service:
    service = a_service("web", replicas=replicas)
    return replace(service, update_status=UpdateStatus(state=state)) if state is not None else service


def tasks_of(service: Service, running: int | None = None) -> list[Task]:
    count = service.spec.replicas if running is None else running
    return [a_task(slot=slot, service=service, state=TaskState.RUNNING) for slot in range(1, count + 1)]


def decided(
    service: Service,
    percents: list[float | None],
    *,
    scaling: Autoscaling = RANGE,
    history: Recommendations | None = None,
    now: float = 1000.0,
) -> ScalingDecision:
    """The decision when the tasks use so many percent of a processor; None: not measured."""
    tasks = tasks_of(service, len(percents))
    usages = {
        task.id: TaskUsage(nano_cpus=round(percent * CPU / 100), memory_bytes=0)
        for task, percent in zip(tasks, percents, strict=True)
        if percent is not None
    }
    readings = readings_of(service, scaling, tasks, usages)
    return decide(service, scaling, readings, history or Recommendations(service.spec.replicas, 0.0), now)


def test_as_many_tasks_as_the_load_needs_at_the_target() -> None:
    assert decided(a_scaled(4), [90.0, 70.0, 80.0, 70.0]).replicas == 7  # 310 / 50, rounded up


def test_one_step_doubles_at_most() -> None:
    assert decided(a_scaled(2), [400.0, 400.0]).replicas == 4


def test_no_more_than_the_range_has() -> None:
    at_most = decided(a_scaled(10), [90.0] * 10)
    assert at_most.replicas is None
    assert "it is at its maximum number of tasks" in at_most.reason


@pytest.mark.parametrize("percent", [46.0, 50.0, 54.9])
def test_a_small_difference_changes_nothing(percent: float) -> None:
    assert decided(a_scaled(4), [percent] * 4).replicas is None


def test_fewer_tasks_come_when_they_would_have_done_for_a_whole_window() -> None:
    service, history = a_scaled(8), Recommendations(8, 0.0)
    for now in range(15, 300, 15):
        early = decided(service, [10.0] * 8, history=history, now=float(now))
        assert early.replicas is None
        assert "2 would suffice, scaling down after 300 s" in early.reason
    assert decided(service, [10.0] * 8, history=history, now=300.0).replicas == 2


def test_the_highest_need_within_the_window_counts() -> None:
    service, history = a_scaled(8), Recommendations(8, 0.0)
    for now in range(15, 300, 15):
        decided(service, [31.0 if now == 150 else 10.0] * 8, history=history, now=float(now))
    assert decided(service, [10.0] * 8, history=history, now=300.0).replicas == 5


def test_tasks_without_data_count_as_idle_on_the_way_up() -> None:
    assert decided(a_scaled(4), [90.0, None, None, None]).replicas is None
    assert decided(a_scaled(4), [150.0, 150.0, None, None]).replicas == 6


def test_tasks_that_do_not_run_yet_count_as_busy_on_the_way_down() -> None:
    held = decided(a_scaled(4), [0.0], history=Recommendations(4, 0.0))
    assert held.replicas == 3, "one idle task, and three that may need what they have"


def test_a_running_task_that_is_not_measured_holds_the_number() -> None:
    assert decided(a_scaled(4), [0.0, 0.0, 0.0, None], history=Recommendations(4, 0.0)).replicas is None
    nothing = decided(a_scaled(4), [None] * 4)
    assert nothing.replicas is None
    assert nothing.reason == "none of its 4 tasks is measured"


def test_a_task_that_has_just_started_is_not_measured_yet() -> None:
    service = a_scaled(2)
    tasks = tasks_of(service)
    usages = {task.id: TaskUsage(nano_cpus=CPU, memory_bytes=0) for task in tasks}
    readings = readings_of(service, RANGE, tasks, usages, lambda task_id: task_id == tasks[0].id)
    assert (readings.measures[0].known, readings.unknown, readings.silent) == (1, 1, 0)


@pytest.mark.parametrize("state", [UpdateState.UPDATING, UpdateState.PAUSED, UpdateState.ROLLBACK_STARTED])
def test_nothing_changes_during_an_update(state: UpdateState) -> None:
    assert decided(a_scaled(2, state=state), [400.0] * 2).replicas is None
    assert decided(a_scaled(20, state=state), [400.0] * 20).replicas is None


def test_it_goes_on_after_an_update() -> None:
    assert decided(a_scaled(2, state=UpdateState.COMPLETED), [400.0] * 2).replicas == 4


@pytest.mark.parametrize(("by_hand", "then"), [(1, 2), (50, 10)])
def test_a_number_outside_the_range_is_brought_back(by_hand: int, then: int) -> None:
    decision = decided(a_scaled(by_hand), [None] * by_hand)
    assert decision.replicas == then
    assert decision.reason == f"{by_hand} is outside the range 2 to 10"


def test_a_range_of_the_schedule_is_named_as_such() -> None:
    labels = {
        "skep.autoscale": "1..20",
        "skep.autoscale.cpu": "50",
        "skep.autoscale.schedule": "* * * * * 2..3",
    }
    scaling = parsed_autoscaling(labels).at(120)
    outside = decided(a_scaled(5), [0.0] * 5, scaling=scaling)
    assert (outside.replicas, outside.reason) == (3, "5 is outside the range 2 to 3 of its schedule")
    at_most = decided(a_scaled(3), [400.0] * 3, scaling=scaling)
    assert at_most.reason.endswith("it is at its maximum number of tasks of its schedule")


def test_zero_by_hand_turns_it_off() -> None:
    off = decided(a_scaled(0), [])
    assert off.replicas is None
    assert "autoscaling is off" in off.reason


def test_the_measure_that_needs_the_most_decides() -> None:
    scaling = Autoscaling(least=1, most=10, cpu=50, memory=80)
    spec = a_service_spec(replicas=2)
    service = replace(a_scaled(2), spec=limited(spec, memory_bytes=100 << 20))
    tasks = tasks_of(service)
    usages = {task.id: TaskUsage(nano_cpus=0, memory_bytes=120 << 20) for task in tasks}
    readings = readings_of(service, scaling, tasks, usages)
    decision = decide(service, scaling, readings, Recommendations(2, 0.0), 1000.0)
    assert decision.replicas == 3
    assert "memory 120%, target 80%, over 2 of 2 tasks" in decision.reason


def limited(
    spec: ServiceSpec, *, nano_cpus: int = 0, memory_bytes: int = 0, reserved: int = 0
) -> ServiceSpec:
    resources = ResourceRequirements(
        limits=Limits(nano_cpus=nano_cpus, memory_bytes=memory_bytes),
        reservations=Resources(nano_cpus=reserved),
    )
    return replace(spec, task_template=replace(spec.task_template, resources=resources))


@pytest.mark.parametrize(
    ("limit", "reserved", "average"), [(CPU // 2, CPU // 4, 50.0), (0, CPU // 4, 100.0), (0, 0, 25.0)]
)
def test_percent_are_of_the_limit_else_of_the_reservation_else_of_one_processor(
    limit: int, reserved: int, average: float
) -> None:
    spec = limited(a_service_spec(replicas=2), nano_cpus=limit, reserved=reserved)
    service = replace(a_scaled(2), spec=spec)
    tasks = tasks_of(service)
    usages = {task.id: TaskUsage(nano_cpus=CPU // 4, memory_bytes=0) for task in tasks}
    assert readings_of(service, RANGE, tasks, usages).measures[0].average == average


def test_only_running_tasks_that_are_to_run_are_measured() -> None:
    service = a_scaled(2)
    running, ended = tasks_of(service)
    ended = replace(ended, status=replace(ended.status, state=TaskState.FAILED))
    usages = {one.id: TaskUsage(nano_cpus=CPU, memory_bytes=0) for one in (running, ended)}
    readings = readings_of(service, RANGE, [running, ended], usages)
    assert (readings.measures[0].known, readings.unknown) == (1, 1)


def test_what_a_manager_without_the_window_says() -> None:
    readings = readings_of(a_scaled(2), RANGE, tasks_of(a_scaled(2)), {})
    assert shown_reason(2, RANGE, readings) == "none of its 2 tasks is measured"


# -- properties ------------------------------------------------------------------------------------------------------


@given(
    present=st.integers(1, 200),
    known=st.integers(0, 200),
    each=st.floats(0, 5000),
    unknown=st.integers(0, 200),
    target=st.integers(1, 1000),
)
def test_data_that_is_missing_never_moves_the_number_further(
    present: int, known: int, each: float, unknown: int, target: int
) -> None:
    measure = Measure(name="cpu", target=target, sum=known * each, known=known)
    number = wanted(present, measure, Readings(measures=(measure,), unknown=unknown))
    complete = wanted(present, measure, Readings(measures=(measure,)))
    silent = wanted(present, measure, Readings(measures=(measure,), unknown=unknown, silent=1))
    assert silent == max(number, present)
    assert number >= 1
    if number > present:
        assert number == ceil(measure.sum / target)
        assert measure.sum / target > present * (1 + TOLERANCE)
    if number < present:
        assert complete <= number, "fewer unknown tasks never keep more"


@given(st.lists(st.tuples(st.floats(0.1, 100), st.integers(0, 50)), min_size=1), st.floats(1, 400))
def test_the_maximum_of_a_window_is_that_of_all_that_was_recommended_in_it(
    steps: list[tuple[float, int]], window_s: float
) -> None:
    now, history, said = 0.0, Recommendations(0, -10_000.0), []
    for pause, number in steps:
        now += pause
        said.append((now, number))
        history.add(number, now)
        assert history.largest(window_s, now) == max(n for at, n in said if at > now - window_s)


# -- a closed loop ---------------------------------------------------------------------------------------------------

Load = Callable[[float], float]


def simulated(
    load: Load, *, start: int, scaling: Autoscaling, minutes: float
) -> list[tuple[float, int, int]]:
    """Changes over time as (second, before, after): the load in percent is spread over the tasks."""
    service, history, changes = with_number(a_scaled(1), start), Recommendations(start, 0.0), []
    for step in range(1, round(minutes * 60 / PERIOD_S) + 1):
        now, present = step * PERIOD_S, service.spec.replicas
        measure = Measure(name="cpu", target=scaling.cpu or 0, sum=load(now), known=present)
        decision = decide(service, scaling, Readings(measures=(measure,)), history, now)
        if decision.replicas is not None:
            changes.append((now, present, decision.replicas))
            service = with_number(service, decision.replicas)
    return changes


def with_number(service: Service, replicas: int) -> Service:
    return replace(service, spec=with_replicas(service.spec, replicas))


def test_a_step_of_the_load_is_met_within_three_periods_and_nothing_oscillates() -> None:
    changes = simulated(lambda now: 500.0, start=2, scaling=RANGE, minutes=30)
    assert [after for _, _, after in changes] == [4, 8, 10]
    assert changes[-1][0] <= 3 * PERIOD_S


def test_a_load_that_goes_away_gives_its_tasks_up_once() -> None:
    changes = simulated(lambda now: 500.0 if now < 600 else 100.0, start=2, scaling=RANGE, minutes=30)
    downs = [(now, after) for now, before, after in changes if after < before]
    assert downs == [(600 + WINDOW_S - PERIOD_S, 2)]


@given(noise=st.lists(st.floats(-0.04, 0.04), min_size=120, max_size=120), level=st.floats(120, 480))
def test_noise_within_the_tolerance_never_makes_it_oscillate(noise: list[float], level: float) -> None:
    """Half an hour of a steady load with noise: what a peak asked for may go again, and nothing returns then."""
    changes = simulated(
        lambda now: level * (1 + noise[int(now / PERIOD_S) - 1]), start=2, scaling=RANGE, minutes=30
    )
    came = [after > before for _, before, after in changes]
    assert came == sorted(came, reverse=True)


@given(
    levels=st.lists(st.floats(0, 2000), min_size=240, max_size=240),
    least=st.integers(1, 5),
    width=st.integers(0, 20),
    start=st.integers(1, 30),
)
def test_whatever_the_load_the_number_stays_in_its_range_and_turns_once_per_window(
    levels: list[float], least: int, width: int, start: int
) -> None:
    scaling = Autoscaling(least=least, most=least + width, cpu=50)
    changes = simulated(lambda now: levels[int(now / PERIOD_S) - 1], start=start, scaling=scaling, minutes=60)
    came_at = float("-inf")
    for now, before, after in changes:
        assert least <= after <= least + width
        assert before < least or after <= 2 * before
        if after > before:
            came_at = now
        elif before <= least + width:
            assert now - came_at >= WINDOW_S
