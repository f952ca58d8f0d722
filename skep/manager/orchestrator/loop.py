"""The orchestrator's loop: decides due services (``state``) and writes their changes.

The error of a decision is shown in the message of the service's update, before the update's own message.
"""

from random import Random

import structlog
from msgspec.structs import replace

from skep.aio.clock import Clock, tick
from skep.aio.time_slices import run_in_slices
from skep.errors import SkepError
from skep.manager.control_loops.failures import write_each
from skep.manager.control_loops.loop_driver import LoopDriver
from skep.manager.orchestrator.changes import Change, apply
from skep.manager.orchestrator.replacement.staging import COLLECT_S, CollectRequests, no_requests
from skep.manager.orchestrator.state import OrchestratorState
from skep.manager.queries.board import Ask, ask_nothing
from skep.model.node import Node
from skep.model.service import Service, UpdateState, UpdateStatus
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.values.ids import IdSource, ServiceId
from skep.model.values.times import timestamp
from skep.model.volume import Volume
from skep.store.interface import LoopStore, Transaction

log = structlog.get_logger()

KINDS = (Service, Task, Node, Swarm, Volume)
BATCH = 100
"""Services decided before their changes are committed together."""
WRITES = 500
"""Changes written together, of all services.  As many as the store has in flight, so more would only wait longer."""


class Orchestrator:
    """Keeps every service at its desired tasks: replicated and global services, jobs, restarts, rolling updates."""

    def __init__(
        self,
        term: LoopStore,
        clock: Clock,
        new_id: IdSource,
        random: Random,
        collect: CollectRequests = no_requests,
        ask: Ask = ask_nothing,
    ) -> None:
        self._term = term
        self._collect = collect
        self._clock = clock
        self._new_id = new_id
        self.state = OrchestratorState(term, clock, random, ask)
        self._driver = LoopDriver(term, clock, self.state, KINDS, BATCH)

    async def run(self) -> None:
        """Converge until cancelled.  Runs on the leader only."""
        await self._driver.run(
            self._converge,
            self.state.disruption.run,
            self._queue_left_over,
            self._collect_requests,
            self.state.queries.run,
            has_rest=lambda: bool(self.state.unwritten),
        )

    async def _collect_requests(self) -> None:
        while True:
            await self.state.measured.wait()
            self.state.note_requests(await self._collect())
            await tick(self._clock, COLLECT_S)

    async def _queue_left_over(self) -> None:
        await run_in_slices(self.state.queue_left_over(), self._clock)

    async def _converge(self, ids: list[ServiceId]) -> None:
        due = [id for id in ids if not self.state.must_wait(id)]
        await self._driver.decide(due, self.state.decide)
        for id in due:
            with self.state.failures.caught(f"error of {id}"):
                await self._write_error(id, self.state.error_of(id))
            if (failure := self.state.failures.of(f"error of {id}")) is not None:
                self.state.queue.add_at(id, failure.retry_at)
        await self._write(self.state.next_writes(WRITES))

    async def _write_error(self, service_id: ServiceId, error: str | None) -> None:
        """Write to the service why its decision or write failed, or clear that message."""
        service = self._term.view().lookup(Service, service_id)
        if error is not None and service is not None and not has_error(service, error):
            await self._term.update(set_error, service_id, error)
        elif error is None and has_error(service):
            await self._term.update(clear_error, service_id)

    async def _write(self, changes: list[tuple[ServiceId, Change]]) -> None:
        """Write each change in its own transaction, in as few raft entries as possible."""
        now = timestamp(self._clock.now_ns())

        def write(tx: Transaction, change: Change) -> None:
            apply(tx, change, self._new_id, now)

        while changes:
            results = await write_each(self._term, write, [change for _, change in changes])
            failed = [result for result in results if isinstance(result, SkepError)]
            if failed:
                log.warning(
                    "write failed, will retry", what="changes", count=len(failed), reason=str(failed[0])
                )
            changes = self.state.on_results(changes, results)


FAILED = "orchestration failed"
"""First words of a service's message when its decision raised an error."""
UPDATE_SEPARATOR = "; the update: "
"""Separates such an error from the message of the service's update."""


def has_error(service: Service | None, error: str = "") -> bool:
    """Return whether the service shows ``error``, or by default any error of an earlier decision."""
    status = service.update_status if service is not None else None
    return status is not None and status.message.startswith(f"{FAILED}: {error}")


def _own_message(status: UpdateStatus) -> str:
    """Return the message of the update itself, such as a pause, whose cause is stored nowhere else."""
    if not status.message.startswith(FAILED):
        return status.message
    return status.message.rpartition(UPDATE_SEPARATOR)[2] if UPDATE_SEPARATOR in status.message else ""


def set_error(tx: Transaction, service_id: ServiceId, error: str) -> None:
    """Write the error of a decision to the service, before the update's own message."""
    service = tx.lookup(Service, service_id)
    if service is not None:
        status = service.update_status or UpdateStatus()
        own = _own_message(status)
        message = f"{FAILED}: {error}" + (f"{UPDATE_SEPARATOR}{own}" if own else "")
        tx.put(replace(service, update_status=replace(status, message=message)))


def clear_error(tx: Transaction, service_id: ServiceId) -> None:
    """Clear the error and keep the update's own message."""
    service = tx.lookup(Service, service_id)
    if service is not None and service.update_status is not None and has_error(service):
        status = service.update_status
        own = _own_message(status) or ("update in progress" if status.state is UpdateState.UPDATING else "")
        status = replace(status, message=own)
        tx.put(replace(service, update_status=status if status.state is not None else None))
