"""Steps of staged updates that wait for a query."""

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.api.formats.service_form import settled
from skep.errors import InvalidArgument
from skep.manager.control.services import update_service
from skep.manager.orchestrator.loop import Orchestrator
from skep.manager.orchestrator.replacement.step_queries import StepQueries
from skep.manager.queries.board import AskedQuery
from skep.model.options.autoscaling import with_replicas
from skep.model.service import (
    Service,
    ServiceSpec,
    UpdateConfig,
    UpdateSplit,
    UpdateState,
    UpdateStatus,
)
from skep.model.staging.updates import QueryVerdict, check_staged_update, judged, query_bounds_of
from skep.model.task import TaskState
from skep.model.values.ids import ServiceId, new_id
from skep.model.values.times import SECOND_NS, Timestamp
from skep.store.interface import Commit, Transaction, Updated
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_task
from tests.support.managers.rollouts import a_spec, a_world, advance, message, state, wanted
from tests.support.managers.worlds import World
from tests.support.store.store_transactions import eventually

ALL_AT_ONCE = UpdateConfig(parallelism=0, monitor=5 * SECOND_NS)
NOW = Timestamp("2026-01-02T03:04:05Z")
QUERIED = {
    "skep.update": "canary",
    "skep.update.steps": "5%,50%",
    "skep.update.step-time": "60s",
    "skep.update.prometheus": "http://prometheus:9090",
    "skep.update.query": "sum(errors)",
    "skep.update.query-max": "0.01",
    "skep.update.query-wait": "2m",
}


def a_canary(*, replicas: int = 4, labels: dict[str, str] = QUERIED) -> ServiceSpec:
    return replace(a_spec("app:2", update=ALL_AT_ONCE, replicas=replicas), labels=labels)


def percent(world: World) -> int | None:
    assert world.service.split is not None
    return world.service.split.percent


def counts(world: World) -> tuple[int, int]:
    """Return the number of old and of new tasks."""
    return len(wanted(world, "app:1")), len(wanted(world, "app:2"))


def pass_time(world: World, seconds: float) -> None:
    world.now += seconds
    advance(world)


def message_in(store: MemoryStore, id: ServiceId) -> str:
    status = store.view().get(Service, id).update_status
    return status.message if status is not None else ""


def answer(world: World, figure: float | None, problem: str = "") -> None:
    """Let the query be answered now."""
    bounds = query_bounds_of(world.service.spec.labels)
    assert bounds is not None
    world.query = judged(world.query, bounds, world.now, figure, problem)
    advance(world)


def test_a_step_waits_until_its_query_is_answered_within_its_bounds() -> None:
    world = a_world(update=ALL_AT_ONCE)
    answered_before = QueryVerdict(asked_at=-1.0, figure=0.0)
    world.query = answered_before
    world.update(a_canary())
    advance(world)
    pass_time(world, 61)
    assert percent(world) == 5, "the answer is older than the step"
    answer(world, 0.5)
    assert percent(world) == 5
    waits = "update in progress: step 1 of 3, 5 % of new connections; its query returns more than 0.01"
    assert message(world) == waits
    pass_time(world, 100)
    answer(world, 0.01)
    assert (percent(world), counts(world)) == (50, (4, 2))
    assert message(world) == "update in progress: step 2 of 3, 50 % of new connections"
    pass_time(world, 61)
    assert percent(world) == 50, "the answer is of the step before"
    answer(world, 0.0)
    assert percent(world) is None


@pytest.mark.parametrize(
    ("figure", "problem", "words"),
    [
        (0.25, "", "its query returns more than 0.01, 0.25 at last"),
        (None, "connection refused", "its query has no answer: connection refused"),
    ],
)
def test_a_query_that_fails_for_its_time_ends_the_update(
    figure: float | None, problem: str, words: str
) -> None:
    world = a_world(update=ALL_AT_ONCE)
    world.update(a_canary())
    advance(world)
    pass_time(world, 10)
    for _ in range(8):
        answer(world, figure, problem)
        assert counts(world) == (4, 1)
        assert state(world) is UpdateState.UPDATING
        pass_time(world, 15)
    world.settle()
    assert state(world) is UpdateState.ROLLBACK_COMPLETED
    assert message(world) == f"rollback completed: update rolled back because for 120 s {words}"


def test_a_query_that_recovers_meanwhile_starts_its_time_anew() -> None:
    world = a_world(update=ALL_AT_ONCE)
    world.update(a_canary())
    advance(world)
    for figure in (1.0, 1.0, 0.0, 1.0, 1.0):
        pass_time(world, 50)
        answer(world, figure)
    assert counts(world) == (4, 2)
    assert state(world) is UpdateState.UPDATING


def test_a_query_fails_only_while_all_tasks_of_the_step_run() -> None:
    world = a_world(update=ALL_AT_ONCE)
    world.update(a_canary())
    world.settle()
    bounds = query_bounds_of(QUERIED)
    assert bounds is not None
    world.query = judged(world.query, bounds, 0.0, None, "no sample")
    world.now += 500
    world.settle()
    assert (state(world), counts(world)) == (UpdateState.UPDATING, (4, 1))
    advance(world)
    assert state(world) is UpdateState.UPDATING, "the time begins when the task runs"
    pass_time(world, 121)
    assert state(world) is not UpdateState.UPDATING


def test_a_tolerated_failure_does_not_hide_the_failure_of_the_query() -> None:
    tolerant = replace(ALL_AT_ONCE, max_failure_ratio=0.5)
    world = a_world(update=tolerant)
    world.update(replace(a_canary(), task_template=a_spec("app:2").task_template, update_config=tolerant))
    advance(world)
    pass_time(world, 61)
    answer(world, 0.0)
    assert counts(world) == (4, 2)
    world.report(wanted(world, "app:2")[0].id, TaskState.FAILED)
    for _ in range(9):
        if state(world) is UpdateState.UPDATING:
            answer(world, 5.0)
        world.now += 15
        world.settle()
    assert "because for 120 s its query returns more than 0.01" in message(world)


@pytest.mark.parametrize("replicas", [0, 4])
def test_the_query_of_a_canary_without_tasks_says_nothing(replicas: int) -> None:
    world = a_world(update=ALL_AT_ONCE)
    world.update(a_canary())
    advance(world)
    world.put(replace(world.service, spec=with_replicas(world.service.spec, replicas)))
    for _ in range(3):
        advance(world)
    for _ in range(20):
        pass_time(world, 15)
        if state(world) is UpdateState.UPDATING:
            answer(world, None, "the query returned no sample")
    assert (state(world) is UpdateState.UPDATING) is (replicas == 0)


async def test_the_loop_asks_the_query_of_an_update_and_continues_by_its_answer() -> None:
    store, clock = MemoryStore(SystemClock()), SystemClock()
    service = a_service(spec=a_spec(replicas=1))
    asked: list[AskedQuery] = []

    async def ask(one: AskedQuery) -> float:
        asked.append(one)
        return 7.0

    def put(*objects: Any) -> Callable[[Transaction], list[Any]]:
        return lambda tx: [tx.put(one) for one in objects]

    await store.update(put(a_node("n1"), service, a_task(slot=1, node="n1", service=service)))
    service = store.view().get(Service, service.id)
    spec = a_canary(replicas=1)
    await store.update(update_service, service.id, settled(spec), service.version.index, now=NOW)
    random = Random(1)
    async with asyncio.TaskGroup() as group:
        loop = Orchestrator(store, clock, new_id, random, ask=ask)
        running = group.create_task(loop.run())
        await eventually(lambda: "its query returns more than 0.01" in message_in(store, service.id))
        assert {(one.query.expression, one.is_trusted) for one in asked} == {("sum(errors)", False)}
        running.cancel()


async def test_a_verdict_about_a_former_query_does_not_count_for_the_present_one() -> None:
    store, clock = MemoryStore(SystemClock()), SystemClock()

    async def ask(_: AskedQuery) -> float:
        return 7.0

    service = replace(
        a_service("web", spec=a_canary(replicas=1)),
        update_status=UpdateStatus(state=UpdateState.UPDATING, split=UpdateSplit(old=1)),
    )
    await store.update(lambda tx: tx.put(service))
    queries = StepQueries(store.view, clock, Random(1), ask, lambda _: None)
    service = store.view().get(Service, service.id)
    queries.start([service])
    asking = asyncio.create_task(queries.run())
    await eventually(lambda: bool(queries.verdict(service.id).why_not))
    scaled = replace(service, spec=replace(service.spec, name="other"))
    queries.note(Commit(2, (Updated(service, scaled),)))
    assert queries.verdict(service.id).why_not
    labels = {**QUERIED, "skep.update.query": "sum(other)"}
    other = replace(service, spec=replace(service.spec, labels=labels))
    queries.note(Commit(3, (Updated(service, other),)))
    assert queries.verdict(service.id) == QueryVerdict()
    asking.cancel()


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"skep.update.query": None}, "needs skep.update.query, such as"),
        ({"skep.update.prometheus": None}, "needs skep.update.prometheus, such as"),
        ({"skep.update.query-max": None}, "needs a bound, such as skep.update.query-max=0.01"),
        ({"skep.update.query-max": "1e3"}, "expected a number such as 0.01"),
        ({"skep.update.query-min": "2"}, "is more than skep.update.query-max: lower it"),
        ({"skep.update.query-wait": "soon"}, "expected a duration like 30s"),
        ({"skep.update.prometheus": "prometheus:9090"}, "expected a URL such as"),
    ],
)
def test_a_query_without_its_parts_is_refused(labels: dict[str, str | None], words: str) -> None:
    given = {name: text for name, text in {**QUERIED, **labels}.items() if text is not None}
    with pytest.raises(InvalidArgument, match=words):
        check_staged_update(a_canary(labels=given))
