"""Queries are asked again and again: how often, how many at a time, and which answer counts."""

import asyncio
from collections import Counter
from collections.abc import Callable
from random import Random

import pytest

from sim.world.time import VirtualClock, VirtualLoop
from skep.manager.queries.board import (
    AT_HOST_MAX,
    PERIOD_S,
    PERIOD_S_MAX,
    UNEXPECTED,
    AskedQuery,
    QueryBoard,
    QueryKey,
    pause_s,
)
from skep.model.measures.queries import MetricQuery, QueryFailed
from skep.model.measures.readings import VALID_S, QueryAnswer
from skep.model.values.ids import ServiceId

WEB = ServiceId("web")
KEY = WEB, "query"


def asked(url: str = "http://a:9090", expression: str = "up") -> AskedQuery:
    return AskedQuery(MetricQuery(url=url, expression=expression), is_trusted=True)


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
            await asyncio.sleep(0.1)
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
