"""Queries are asked again and again: how often, how many at a time, and which answer counts."""

import asyncio
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from sim.world.time import VirtualClock, VirtualLoop
from skep.manager.orchestrator.replacement.step_queries import longest_pause_s
from skep.manager.queries.board import (
    AT_HOST_MAX,
    PERIOD_S,
    PERIOD_S_MAX,
    UNEXPECTED,
    AskedQuery,
    LatestAnswer,
    QueryBoard,
    QueryKey,
    pause_s,
)
from skep.manager.queries.fair_slots import QueryTurns, Turn
from skep.model.measures.queries import MetricQuery, QueryFailed
from skep.model.measures.readings import VALID_S, QueryAnswer
from skep.model.staging.updates import QueryBounds
from skep.model.values.ids import ServiceId

WEB = ServiceId("web")
KEY = WEB, "query"


def asked(url: str = "http://a:9090", expression: str = "up", **fields: Any) -> AskedQuery:
    return AskedQuery(MetricQuery(url=url, expression=expression), is_trusted=True, **fields)


class Rig:
    """A board on virtual time, whose answers a test sets."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.figures: dict[str, float | Exception | None] = {}
        self.times: list[float] = []
        self.running: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.noted: list[QueryKey] = []
        self.noted_by: Callable[[QueryKey], None] = self.noted.append
        clock = VirtualClock(self.loop)
        self.board = QueryBoard(clock, Random(1), self.ask, lambda key: self.noted_by(key))
        self._clock = clock

    async def ask(self, one: AskedQuery) -> float:
        host = one.query.host
        self.times.append(self._clock.monotonic())
        self.running[host] += 1
        self.most[host] = max(self.most[host], self.running[host])
        try:
            if host == "hangs":
                await asyncio.sleep(5.0)
                raise QueryFailed("hangs did not respond within 5 s")
            await asyncio.sleep(4.9 if one.query.expression == "slow" else 0.1)
        finally:
            self.running[host] -= 1
        if (figure := self.figures.get(one.query.expression)) is None:
            raise QueryFailed("refused")
        if isinstance(figure, Exception):
            raise figure
        return figure

    def run_for(self, seconds: float) -> None:
        async def run() -> None:
            if not hasattr(self, "task"):
                self.task = asyncio.get_running_loop().create_task(self.board.run())
            await asyncio.sleep(seconds)

        self.loop.run_until_complete(run())

    def answer(self) -> QueryAnswer:
        return self.board.answers()[WEB]["query"]

    def close(self) -> None:
        async def end() -> None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

        self.loop.run_until_complete(end())
        self.loop.close()


def test_a_query_is_asked_every_period_and_its_last_figure_counts_for_a_while() -> None:
    rig = Rig()
    rig.figures["up"] = 3.0
    rig.board.want({KEY: asked()})
    assert rig.answer() == QueryAnswer()
    rig.run_for(4 * PERIOD_S)
    assert 4 <= len(rig.times) <= 5
    assert all(
        0.8 * PERIOD_S < b - a < 1.2 * PERIOD_S for a, b in zip(rig.times, rig.times[1:], strict=False)
    )
    assert rig.answer().valid == 3.0
    rig.figures["up"] = None
    rig.run_for(2 * PERIOD_S)
    assert (rig.answer().valid, rig.answer().problem) == (3.0, "refused")
    rig.run_for(VALID_S)
    assert (rig.answer().valid, rig.answer().figure) == (None, 3.0)
    rig.figures["up"] = 4.0
    rig.run_for(PERIOD_S_MAX * 1.2)
    assert (rig.answer().valid, rig.answer().problem) == (4.0, "")
    assert set(rig.noted) == {KEY}
    rig.close()


def test_failures_make_questions_rare_up_to_a_limit() -> None:
    assert [pause_s(failures, 0.0) for failures in (0, 1, 2, 3, 4, 5, 6, 1000)] == [
        *(15.0, 15.0, 15.0, 30.0, 60.0, 120.0, 120.0, 120.0)
    ]
    assert pause_s(0, 0.1) == 16.5


def test_a_host_that_hangs_delays_no_other_and_has_few_connections() -> None:
    rig = Rig()
    rig.figures["up"] = 3.0
    hanging = {(ServiceId(f"s{n}"), "query"): asked("http://hangs") for n in range(100)}
    rig.board.want({**hanging, KEY: asked()})
    rig.run_for(2 * PERIOD_S)
    assert rig.most["hangs"] == AT_HOST_MAX
    assert rig.answer().valid == 3.0
    assert rig.answer().age_s < 1.2 * PERIOD_S
    rig.close()


def test_a_changed_query_has_no_answer_yet_and_one_that_is_not_wanted_is_not_asked() -> None:
    rig = Rig()
    rig.figures |= {"up": 3.0, "down": 5.0}
    rig.board.want({KEY: asked()})
    rig.run_for(PERIOD_S)
    rig.board.want({KEY: asked(expression="down")})
    assert rig.answer() == QueryAnswer()
    rig.run_for(PERIOD_S)
    assert rig.answer().valid == 5.0
    rig.board.want({})
    rig.run_for(1.0)
    count = len(rig.times)
    rig.run_for(10 * PERIOD_S)
    assert len(rig.times) == count
    assert rig.board.answers() == {}
    rig.close()


@pytest.mark.parametrize("error", [OverflowError("int too large"), RecursionError(), AssertionError()])
def test_an_unexpected_error_is_a_problem_of_its_query_only(error: Exception) -> None:
    rig = Rig()
    rig.figures |= {"up": 3.0, "bad": error}
    bad = ServiceId("bad"), "query"
    rig.board.want({KEY: asked(), bad: asked(expression="bad")})
    rig.run_for(3 * PERIOD_S)
    assert not rig.task.done()
    assert rig.board.answers()[bad[0]]["query"] == QueryAnswer(problem=UNEXPECTED)
    assert (rig.answer().valid, rig.answer().problem) == (3.0, "")
    rig.figures["bad"] = 2.0
    rig.run_for(2 * PERIOD_S)
    assert rig.board.answers()[bad[0]]["query"].valid == 2.0
    rig.close()


def test_an_error_of_the_loop_that_is_told_ends_no_query() -> None:
    rig = Rig()
    rig.figures["up"] = 3.0

    def fail(_: QueryKey) -> None:
        raise ValueError

    rig.noted_by = fail
    rig.board.want({KEY: asked()})
    rig.run_for(3 * PERIOD_S)
    assert not rig.task.done()
    assert rig.answer().valid == 3.0
    rig.close()


@pytest.mark.parametrize("slow", [16, 60])
def test_slow_queries_of_a_stack_keep_no_other_stack_waiting(slow: int) -> None:
    rig = Rig()
    rig.figures |= {"up": 3.0, "slow": 1.0}
    others = {(ServiceId(f"s{n}"), "query"): asked(expression="slow", stack="other") for n in range(slow)}
    rig.board.want({**others, KEY: asked(stack="shop")})
    rig.run_for(PERIOD_S)
    for _ in range(20):
        rig.run_for(PERIOD_S)
        assert rig.answer().valid == 3.0
        assert rig.answer().age_s < PERIOD_S * 1.1 + 5.1
    assert rig.most["a:9090"] == AT_HOST_MAX
    rig.close()


def test_stacks_at_a_host_alternate_and_a_cancelled_question_takes_no_turn() -> None:
    async def run() -> list[str]:
        turns, order = QueryTurns(at_host=1, at_once=1), list[str]()

        async def ask(stack: str) -> None:
            async with turns.take(Turn("a", stack)):
                order.append(stack)
                await asyncio.sleep(0)

        asked = [asyncio.create_task(ask(stack)) for stack in ("x", "x", "x", "x", "y", "y", "z")]
        await asyncio.sleep(0)
        asked[3].cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await ask("x")
        return order

    assert asyncio.run(run()) == ["x", "y", "z", "x", "y", "x", "x"]


@pytest.mark.parametrize("is_changed_back", [False, True])
def test_an_answer_to_the_former_query_is_not_one_to_the_new_query(is_changed_back: bool) -> None:
    loop = VirtualLoop()
    clock = VirtualClock(loop)

    async def run() -> LatestAnswer:
        arrives = asyncio.Event()

        async def ask(one: AskedQuery) -> float:
            if one.query.expression == "new":
                raise QueryFailed("no answer")
            await arrives.wait()
            return 999.0

        board = QueryBoard(clock, Random(1), ask)
        board.want({KEY: asked(expression="old")})
        board_task = asyncio.create_task(board.run())
        await asyncio.sleep(2.1)
        arrives.set()
        board.want({KEY: asked(expression="new")})
        if is_changed_back:
            board.want({KEY: asked(expression="old")})
        await asyncio.sleep(0.1)
        board_task.cancel()
        await asyncio.gather(board_task, return_exceptions=True)
        return board.latest(KEY)

    found = loop.run_until_complete(run())
    loop.close()
    assert found.figure == (999.0 if is_changed_back else None)


@pytest.mark.parametrize("wait_s", [60.0, 300.0])
def test_a_canary_is_asked_again_soon_after_an_outage(wait_s: float) -> None:
    longest_s = longest_pause_s(QueryBounds(asked().query, wait_s=wait_s))
    assert longest_s <= wait_s / 6
    rig = Rig()
    rig.board.want({KEY: asked(pause_s_max=longest_s)})
    rig.run_for(0.7 * wait_s)
    assert rig.answer().problem
    rig.figures["up"] = 0.0
    rig.run_for(0.25 * wait_s)
    assert not rig.answer().problem
    rig.close()


def test_pauses_are_not_endless_questions() -> None:
    assert longest_pause_s(QueryBounds(asked().query, wait_s=0.0)) == 1.0
    assert longest_pause_s(QueryBounds(asked().query, wait_s=86400.0)) == PERIOD_S
