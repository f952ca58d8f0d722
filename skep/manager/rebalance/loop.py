"""The leader's loop for rebalancing: begins a few moves at a time, and starts runs after the return of nodes.

The orchestrator makes the moves as for a drained node, so a task stops when its successor runs.  The loop plans again
before each batch.  So it follows the changes of users and failures, and a new leader continues the run.
"""

from collections.abc import Sequence
from random import Random

import structlog

from skep.aio.clock import Clock, tick
from skep.aio.time_slices import result_in_slices
from skep.errors import SkepError
from skep.manager.control_loops.failures import isolated
from skep.manager.rebalance.plan import Balance, PlannedMove, first_moves, loads_of
from skep.manager.rebalance.records import (
    MOVED_MAX,
    RebalanceRun,
    begin_move,
    end_run,
    give_up,
    is_stuck,
    note_waiting,
    rebalancing_in,
    start_run,
)
from skep.manager.services.freezes import held_by, stack_of_service
from skep.model.node import Node, takes_tasks
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.times import timestamp
from skep.store.interface import LoopStore, NotLeader, View

log = structlog.get_logger(__name__)

STEP_S = 5.0
"""Seconds between two steps.  A container of a local image starts in about a second."""
AT_ONCE = 5
"""Moves at a time, of different services.  So few cause no noticeable load, and a bad plan is noticed early."""
JITTER = 0.25
"""Part of the wait after a return by which it may be longer."""


class Rebalancer:
    """Makes the moves of the run that is in progress."""

    def __init__(self, term: LoopStore, clock: Clock) -> None:
        self._term = term
        self._clock = clock
        self._random = Random(clock.now_ns())  # it only spreads waits
        self._known: frozenset[NodeId] = frozenset()
        """Nodes that took tasks at the last step."""
        self._checks_marks = True
        """Whether tasks may move without a run, because the record of an earlier run was lost."""
        self._due_at: float | None = None
        """When a run starts because of a returned node."""
        self._moving_since: dict[TaskId, float] = {}
        """Since when this leader has seen each move without a freeze that holds it back."""

    async def run(self) -> None:
        """Rebalance until cancelled."""
        while True:
            await tick(self._clock, STEP_S)
            with isolated("step of a rebalance", ""):
                try:
                    await self._step()
                except NotLeader:
                    raise
                except SkepError as error:
                    log.warning("rebalance not written, will retry", reason=str(error))

    async def _step(self) -> None:
        view = self._term.view()
        found = rebalancing_in(view)
        if found.run is not None or self._checks_marks:
            await self._continue(found.run, view)
        elif found.after_return_s:
            await self._start_after_return(found.after_return_s, view)
        else:
            self._known, self._due_at = frozenset(), None

    async def _start_after_return(self, after_s: int, view: View) -> None:
        """Start a run some time after nodes have returned.  To a new leader, all nodes are new."""
        present = frozenset(node.id for node in view.find(Node) if takes_tasks(node))
        if present - self._known:
            self._due_at = self._clock.monotonic() + after_s * (1 + JITTER * self._random.random())
        self._known = present
        if self._due_at is None or self._clock.monotonic() < self._due_at or held_by(view):
            return
        self._due_at = None
        if await self._plan(view, ()):
            await self._term.update(start_run, "", timestamp(self._clock.now_ns()))
            log.info("rebalance started after the return of nodes")

    async def _continue(self, run: RebalanceRun | None, view: View) -> None:
        moving = [task for task in view.find(Task) if task.relocation is not None and task.is_active]
        now = self._clock.monotonic()
        self._moving_since = {
            one.id: now if _is_held(one, view) else self._moving_since.get(one.id, now) for one in moving
        }
        for task in [one for one in moving if is_stuck(one, view, now - self._moving_since[one.id])]:
            log.warning("move given up", task=task.id, node=task.node_id)
            await self._term.update(give_up, task)
            return  # the next step plans without its service
        self._checks_marks = bool(moving)
        if run is None:
            return
        if (held := held_by(view)) and not run.stopping:
            if run.waiting != held:
                await self._term.update(note_waiting, held)
            return
        if len(moving) >= AT_ONCE:
            return
        moves = await self._plan(view, run.skipped) if not run.stopping and run.moved < MOVED_MAX else []
        if not moves and not moving:
            await self._term.update(end_run, run.started_at)
            log.info("rebalance ended", moves=run.moved)
        for move in first_moves(moves, moving, AT_ONCE - len(moving)):
            if await self._term.update(begin_move, move, timestamp(self._clock.now_ns())):
                self._moving_since[move.task_id] = self._clock.monotonic()

    async def _plan(self, view: View, skipped: Sequence[ServiceId]) -> Sequence[PlannedMove]:
        balance = Balance(view, loads_of(view), self._clock.now_ns())
        return await result_in_slices(balance.planning(skipped), self._clock)


def _is_held(task: Task, view: View) -> bool:
    """Return whether a freeze or a closed window holds the move of a task back."""
    return bool(held_by(view, stack_of_service(view.lookup(Service, task.service_id))))
