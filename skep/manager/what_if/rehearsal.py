"""Runs the leader's decisions on a copied state and in supposed time, until nothing is left to do.

The states of the orchestrator, the allocator and the scheduler are the same as in the leader's loops, and their changes
are written by the same functions.  Only what waits is replaced: commits are passed on at once, and the clock jumps to
the next time at which a loop or a node has something to do.  ``SupposedNodes`` takes the part of the nodes.
"""

from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from math import inf
from random import Random
from typing import Any, Final, TypeVar

from skep.errors import SkepError
from skep.manager.allocator import changes as allocations
from skep.manager.allocator.changes import NETWORK, NODE
from skep.manager.allocator.state import CLAIMS, ENDPOINTS, TASKS, AllocatorState
from skep.manager.control_loops.failures import isolating_errors
from skep.manager.control_loops.loop_driver import Decision, LoopState, Recheck
from skep.manager.orchestrator.changes import Change, apply
from skep.manager.orchestrator.replacement.disruption_mode import CHECK_S
from skep.manager.orchestrator.state import OrchestratorState
from skep.manager.scheduler.decision_writer import TOGETHER, write_decisions
from skep.manager.scheduler.nodes.accounting import Accounting
from skep.manager.scheduler.state import WRITTEN, SchedulerState
from skep.manager.what_if.supposed_nodes import SupposedNodes
from skep.manager.what_if.supposed_time import SupposedClock
from skep.model.service import Service
from skep.model.staging.updates import QueryVerdict
from skep.model.task import Task, TaskState
from skep.model.values.times import Timestamp, timestamp
from skep.store.copied import CopiedStore
from skep.store.interface import Transaction, View

C = TypeVar("C")
K = TypeVar("K", bound=str)
R = TypeVar("R")

BATCH = 100
"""Objects decided before their changes are applied.  Between two of them the work may pause."""

SUPPOSED: Final = "supposed"
"""Beginning of the ids of objects that only the copy has."""
_HOLDS: Final = QueryVerdict(asked_at=inf)
"""Supposed verdict about the query of an update, which a rehearsal cannot ask."""


class Rehearsal:
    """One copy of the cluster, with the decisions of its leader."""

    def __init__(self, view: View, now_ns: int) -> None:
        """Copy ``view``, the current state of the store."""
        self.clock = SupposedClock(now_ns)
        self.copy = CopiedStore(view, self.clock)
        random = Random(0)  # it only spreads delays
        self._orchestrator = OrchestratorState(self.copy, self.clock, random)
        self._orchestrator.queries.unasked = _HOLDS
        self._allocator = AllocatorState(self.copy.view, self.clock, random)
        self._scheduler = SchedulerState(self.copy, self.clock, random, is_confirmed=True)
        self._nodes = SupposedNodes(self.copy, self.clock)
        numbers, prefix = count(1), f"{SUPPOSED}{view.revision:x}x"
        self.new_id: Callable[[], str] = lambda: f"{prefix}{next(numbers):06}"
        """Ids of new objects.  They differ from real ones, and from the ids of a rehearsal that was copied."""

    @property
    def accounting(self) -> Accounting:
        """The nodes and their free resources now."""
        return self._scheduler.accounting

    def start(self) -> Iterator[None]:
        """Load the copy into the loops' states, and queue the unsettled services."""
        view = self.copy.view()
        for state in (self._orchestrator, self._allocator, self._scheduler):
            yield from state.start(view)
        self._orchestrator.queue.take_due(len(view.ids(Service)))
        yield from self._queue_unsettled()
        yield from self._nodes.start()
        self.copy.committed += [
            self._orchestrator.on_commit,
            self._allocator.on_commit,
            self._scheduler.on_commit,
            self._nodes.on_commit,
        ]

    def _queue_unsettled(self) -> Iterator[None]:
        """Queue the services for which the orchestrator may have something to do.

        A replicated service without a task that is starting, stopping, outdated or surplus is left out, because a
        decision about it takes ten times as long as this check.  A commit that concerns it queues it.
        """
        view = self.copy.view()
        for service in view.find(Service):
            tasks = view.find(Task, service_id=service.id)
            if not is_settled(service, tasks):
                self._orchestrator.queue.add((service.id,))
            yield

    def settle(self, until: float) -> Iterator[None]:
        """Decide and let time pass until nothing is left to do, or until the time ``until``."""
        while True:
            while self._has_due():
                yield from self._converge()
                yield from self._allocate()
                yield from self._schedule()
            waits = (
                self._orchestrator.queue.wait_s(),
                self._allocator.queue.wait_s(),
                self._scheduler.queue.wait_s(),
                self._nodes.wait_s(),
                CHECK_S if self._orchestrator.disruption.is_frozen else None,
            )
            wait_s = min((one for one in waits if one is not None), default=None)
            if wait_s is None or self.clock.monotonic() + wait_s > until:
                return
            self.clock.advance(wait_s)
            with suppress(SkepError):
                finished(self._orchestrator.disruption.check())
            yield from self._nodes.report()

    def _has_due(self) -> bool:
        """Return whether a loop has something to do now.  Keys that are taken here are put back."""
        if self._orchestrator.unwritten or self._allocator.is_checking():
            return True
        for queue in (self._orchestrator.queue, self._allocator.queue, self._scheduler.queue):
            if queue.has_due():
                return True
        return False

    # -- the loops' passes ---------------------------------------------------------------------------------------

    def _converge(self) -> Iterator[None]:
        """Decide due services, as ``orchestrator.loop`` does."""
        state = self._orchestrator
        due = [id for id in state.queue.take_due(BATCH) if not state.must_wait(id)]
        yield from self._decided(state, due, state.decide, [])
        changes = state.next_writes(BATCH)
        now = self._now()

        def write(tx: Transaction, change: Change) -> None:
            apply(tx, change, self.new_id, now)

        while changes:
            results: list[object] = []
            for _, change in changes:
                results.append(self._written(write, change))
                yield
            changes = state.on_results(changes, results)

    def _allocate(self) -> Iterator[None]:
        """Allocate for due objects, as ``allocator.loop`` does."""
        state = self._allocator
        keys = state.queue.take_due(BATCH)
        if not keys and not state.is_checking():
            return
        networks = [key for key in keys if key.startswith(NETWORK)]
        services = [key for key in keys if "/" not in key]
        yield from self._allocated(CLAIMS, networks, state.claims)
        yield from self._allocated("subnets", networks, state.subnets)
        known = state.networks()
        yield from self._allocated(ENDPOINTS, services, partial(state.endpoint, networks=known))
        nodes = [key for key in keys if key.startswith(NODE)]
        yield from self._allocated("node attachments", nodes, partial(state.attachments, networks=known))
        state.begin_checking(services)
        turns = state.turns(BATCH)
        share = max(1, BATCH // max(1, len(turns)))
        yield from self._allocated(TASKS, turns, partial(state.releases, networks=known, limit=share))

    def _allocated(
        self, what: str, keys: Sequence[str], decide: Callable[[str], Decision[allocations.Change]]
    ) -> Iterator[None]:
        changes: list[tuple[str, allocations.Change]] = []
        yield from self._decided(self._allocator, keys, decide, changes, what)
        write = partial(allocations.apply, now=self._now())
        results = []
        for key, change in changes:
            results.append((key, self._written(write, change)))
            yield
        self._allocator.failures.requeue_failed(self._allocator.queue, what, results)
        yield from self._allocator.resync(change for _, change in changes)

    def _schedule(self) -> Iterator[None]:
        """Decide due groups of tasks, as ``scheduler.loop`` does, and write the reasons of refused ones."""
        state = self._scheduler
        if due := state.queue.take_due(BATCH):
            for pause in state.decide(due):
                if pause is WRITTEN:
                    self._assign()
                yield
            self._assign()
            yield
        while refusals := finished(state.texts.take(TOGETHER)):
            finished(write_decisions(self.copy, refusals, self._now()))
            yield

    def _assign(self) -> None:
        if decisions := self._scheduler.take_decisions():
            results = finished(write_decisions(self.copy, decisions, self._now()))
            self._scheduler.on_results(decisions, results)

    def _decided(
        self,
        state: LoopState[K],
        keys: Sequence[K],
        decide: Callable[[K], Decision[C]],
        decided: list[tuple[K, C]],
        what: str = "",
    ) -> Iterator[None]:
        """Decide about ``keys`` as ``LoopDriver.decide`` does, and add the changes to ``decided``."""
        for key in keys:
            name = f"{what} of {key}" if what else key
            with state.failures.caught(name):
                for change in decide(key):
                    if isinstance(change, Recheck):
                        state.queue.add_at(key, change.due_at(self.clock.monotonic()))
                    elif change is not None:
                        decided.append((key, change))
                    yield
            if (failure := state.failures.of(name)) is not None:
                state.queue.add_at(key, failure.retry_at)
            yield

    def _written(self, body: Callable[[Transaction, C], R], change: C) -> R | SkepError:
        try:
            return self.copy.apply(isolating_errors(body), change)
        except SkepError as error:
            return error

    def _now(self) -> Timestamp:
        return timestamp(self.clock.now_ns())


def is_settled(service: Service, tasks: Sequence[Task]) -> bool:
    """Return whether each task of a replicated service runs, and none is missing, surplus or outdated."""
    if service.spec.mode.name != "replicated" or service.removed_at is not None or service.update_status:
        return False
    current = [task for task in tasks if not task.status.state.is_terminal]
    return len(current) == service.spec.replicas and all(
        task.status.state is TaskState.RUNNING
        and task.desired_state is TaskState.RUNNING
        and task.spec_version == service.spec_version
        and task.preemption is None
        and task.relocation is None
        for task in current
    )


def finished(work: Coroutine[Any, Any, R]) -> R:
    """Return the result of a coroutine that has nothing to wait for."""
    try:
        work.send(None)
    except StopIteration as end:
        result: R = end.value
        return result
    raise AssertionError("it waits")
