"""Queries that the steps of staged updates wait for, and what their latest answers mean."""

from collections.abc import Callable, Iterable
from random import Random
from typing import Final

from skep.aio.clock import Clock
from skep.manager.nodes.trust import trusted_of
from skep.manager.queries.board import PERIOD_S, Ask, AskedQuery, QueryBoard, QueryKey
from skep.model.service import Service
from skep.model.staging.updates import QueryBounds, QueryVerdict, is_undecided, judged, query_bounds_of
from skep.model.values.ids import ServiceId
from skep.model.values.stacks import stack_of
from skep.store.interface import Commit, Created, Deleted, Updated, View

_MEASURE = "update"
"""Name of the query of an update.  A service has only one."""
_ANSWERS_MIN: Final = 6
"""Pauses within the time for which a query may fail, so that several answers decide about a canary."""
_PAUSE_S_MIN: Final = 1.0
"""Shortest pause, also if the query may fail for no time at all.  Prometheus rarely has new samples sooner."""


class StepQueries:
    """The services whose staged updates have a query, and the verdicts about them."""

    def __init__(
        self,
        view: Callable[[], View],
        clock: Clock,
        random: Random,
        ask: Ask,
        on_verdict: Callable[[ServiceId], None],
    ) -> None:
        """``on_verdict`` is called after each answer."""
        self._view = view
        self._on_verdict = on_verdict
        self._board = QueryBoard(clock, random, ask, self._note_answer)
        self._services: set[ServiceId] = set()
        self._verdicts: dict[ServiceId, QueryVerdict] = {}
        self.unasked = QueryVerdict()
        """Verdict about a service whose query has no answer yet."""

    async def run(self) -> None:
        """Ask until cancelled."""
        self._want()
        await self._board.run()

    def start(self, services: Iterable[Service]) -> None:
        """Start with all services of a snapshot."""
        self._services.clear()
        self._verdicts.clear()
        self.add(services)

    def add(self, services: Iterable[Service]) -> None:
        """Load more services of a snapshot."""
        self._services.update(service.id for service in services if _has_query(service))
        self._want()

    def note(self, commit: Commit) -> None:
        """Follow changes of services."""
        for event in commit.events:
            match event:
                case Created(Service() as service) | Updated(_, Service() as service) if _has_query(service):
                    before = event.old if isinstance(event, Updated) else None
                    if isinstance(before, Service) and _bounds(before) != _bounds(service):
                        self._verdicts.pop(service.id, None)  # it is about the former query or bounds
                    self._services.add(service.id)
                    self._want()
                case Updated(_, Service() as service) | Deleted(Service() as service):
                    if service.id in self._services:
                        self._services.discard(service.id)
                        self._verdicts.pop(service.id, None)
                        self._want()

    def _want(self) -> None:
        view, wanted = self._view(), dict[QueryKey, AskedQuery]()
        for id in sorted(self._services):
            service = view.lookup(Service, id)
            bounds = query_bounds_of(service.spec.labels) if service is not None else None
            if service is not None and bounds is not None:
                is_trusted = bounds.query in trusted_of(view, service).queries
                stack, pause_s = stack_of(service.spec.labels), longest_pause_s(bounds)
                wanted[id, _MEASURE] = AskedQuery(bounds.query, is_trusted, stack, pause_s)
        self._board.want(wanted)

    def _note_answer(self, key: QueryKey) -> None:
        id, latest = key[0], self._board.latest(key)
        service = self._view().lookup(Service, id)
        bounds = query_bounds_of(service.spec.labels) if service is not None else None
        if bounds is not None and id in self._services:
            figure = None if latest.problem else latest.figure
            self._verdicts[id] = judged(self.verdict(id), bounds, latest.asked_at, figure, latest.problem)
            self._on_verdict(id)

    def verdict(self, id: ServiceId) -> QueryVerdict:
        """Return the verdict about a service."""
        return self._verdicts.get(id, self.unasked)


def longest_pause_s(bounds: QueryBounds) -> float:
    """Return the longest pause between two questions.  After an outage, the canary must not wait for the next one."""
    return min(max(bounds.wait_s / _ANSWERS_MIN, _PAUSE_S_MIN), PERIOD_S)


def _bounds(service: Service) -> QueryBounds | None:
    return query_bounds_of(service.spec.labels)


def _has_query(service: Service) -> bool:
    return is_undecided(service) and _bounds(service) is not None
