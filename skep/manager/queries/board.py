"""Asks queries again and again, and keeps the latest answer to each.

Each query has an asyncio task of its own, so a query that hangs does not delay others.  Their number at a time is
bounded, by host and in all, with fair turns for stacks.  A query that fails several times is asked less often.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from math import inf
from random import Random
from typing import Final

import msgspec

from skep.aio.clock import Clock
from skep.manager.control_loops.failures import isolated
from skep.manager.queries.fair_slots import QueryTurns, Turn
from skep.model.measures.queries import MetricQuery, QueryFailed
from skep.model.measures.readings import QueryAnswer
from skep.model.values.ids import ServiceId

PERIOD_S: Final = 15.0
"""Seconds between two questions.  Autoscaling decides as often."""
PERIOD_S_MAX: Final = 120.0
"""Seconds between two questions after many failures."""
_FIRST_S: Final = 2.0
"""Seconds over which first questions are spread, because a new leader starts with all of them."""
_TRIED_S: Final = 2
"""Failures after which the pause grows.  One lost connection should not make the answer stale."""
_JITTER: Final = 0.1
"""Part by which pauses differ, so that queries do not stay together."""
AT_HOST_MAX: Final = 4
"""Most questions at one host at a time.  A Prometheus evaluates twenty queries at a time by default."""
AT_ONCE_MAX: Final = 64
"""Most questions at a time.  Each holds a connection and at most 64 KiB."""
UNEXPECTED: Final = "an unexpected error, which is in the journal of the leader's machine"
"""Problem of a query whose attempt raised something else than ``QueryFailed``.  It must not end the other queries."""

QueryKey = tuple[ServiceId, str]
"""A service, and the name of the measure."""


class AskedQuery(msgspec.Struct, frozen=True):
    """A query of a service.

    Attributes:
        is_trusted: Whether an administrator wrote it.
        stack: The service's stack, or empty.
        pause_s_max: Longest pause between two questions, in seconds.
        service_id: The service.
    """

    query: MetricQuery
    is_trusted: bool
    stack: str = ""
    pause_s_max: float = PERIOD_S_MAX
    service_id: ServiceId = ServiceId("")


Ask = Callable[[AskedQuery], Awaitable[float]]
"""Returns the figure within seconds.  Raises: QueryFailed."""


async def ask_nothing(asked: AskedQuery) -> float:
    """Ask nothing, where no queries are."""
    raise QueryFailed("this manager asks no queries")


class LatestAnswer(msgspec.Struct, frozen=True):
    """The result of the last attempt, and the last figure.  Times are in monotonic seconds.

    Attributes:
        figure: The last figure, or None before the first one.
        figure_at: Time at which it was asked.
        asked_at: Time at which the last attempt began.
        problem: Reason why the last attempt failed, or an empty text.
    """

    figure: float | None = None
    figure_at: float = -inf
    asked_at: float = -inf
    problem: str = ""


class QueryBoard:
    """The queries that a loop wants, and their answers."""

    def __init__(
        self, clock: Clock, random: Random, ask: Ask, note: Callable[[QueryKey], None] = lambda _: None
    ) -> None:
        """``note`` is called after each attempt."""
        self._clock = clock
        self._random = random
        self._ask = ask
        self._note = note
        self._wanted: Mapping[QueryKey, AskedQuery] = {}
        self._latest: dict[QueryKey, LatestAnswer] = {}
        self._is_changed = asyncio.Event()
        self._turns = QueryTurns(AT_HOST_MAX, AT_ONCE_MAX)

    def want(self, wanted: Mapping[QueryKey, AskedQuery]) -> None:
        """Set the queries that are asked from now on.  The answers of a changed query are forgotten."""
        if wanted == self._wanted:
            return
        for key, asked in self._wanted.items():
            if wanted.get(key) != asked:
                self._latest.pop(key, None)
        self._wanted = dict(wanted)
        self._is_changed.set()

    def latest(self, key: QueryKey) -> LatestAnswer:
        """Return the latest answer to a query."""
        return self._latest.get(key, LatestAnswer())

    def answers(self) -> dict[ServiceId, dict[str, QueryAnswer]]:
        """Return all answers, with their present age."""
        now, found = self._clock.monotonic(), dict[ServiceId, dict[str, QueryAnswer]]()
        for id, name in self._wanted:
            one = self.latest((id, name))
            age_s = now - one.figure_at if one.figure is not None else 0.0
            found.setdefault(id, {})[name] = QueryAnswer(figure=one.figure, age_s=age_s, problem=one.problem)
        return found

    async def run(self) -> None:
        """Ask until cancelled."""
        running: dict[QueryKey, tuple[AskedQuery, asyncio.Task[None]]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                for key, (asked, task) in list(running.items()):
                    if self._wanted.get(key) != asked:
                        task.cancel()
                        del running[key]
                for key, asked in self._wanted.items():
                    if key not in running:
                        job = group.create_task(self._keep_asking(key, asked), name=f"query of {key[0]}")
                        running[key] = asked, job
                self._is_changed.clear()
                await self._is_changed.wait()

    async def _keep_asking(self, key: QueryKey, asked: AskedQuery) -> None:
        turn = Turn(asked.query.host or key[0], asked.stack or key[0])  # a command is at no host
        failures = 0
        await self._clock.sleep(self._random.uniform(0, _FIRST_S))
        while True:
            async with self._turns.take(turn):
                after = await self._attempt(key, asked)
            if self._wanted.get(key) == asked:  # else it was changed meanwhile, and this task ends soon
                self._latest[key] = after
                with isolated("query", key[0]):
                    self._note(key)
            failures = failures + 1 if after.problem else 0
            jitter = self._random.uniform(-_JITTER, _JITTER)
            await self._clock.sleep(pause_s(failures, jitter, asked.pause_s_max))

    async def _attempt(self, key: QueryKey, asked: AskedQuery) -> LatestAnswer:
        began, problem = self._clock.monotonic(), UNEXPECTED
        with isolated("query", key[0]):
            try:
                return LatestAnswer(await self._ask(asked), began, began)
            except QueryFailed as error:
                problem = str(error) or UNEXPECTED
        return msgspec.structs.replace(self.latest(key), asked_at=began, problem=problem)


def pause_s(failures: int, jitter: float, longest_s: float = PERIOD_S_MAX) -> float:
    """Return the seconds until the next attempt."""
    doublings = min(max(0, failures - _TRIED_S), 10)  # bounded, so that the number does not overflow
    return min(PERIOD_S * (1 << doublings), longest_s) * (1 + jitter)
