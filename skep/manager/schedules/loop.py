"""The leader's loop for scheduled jobs: starts due runs, and sleeps until the next due time.  Leader only."""

import asyncio
from contextlib import suppress
from random import Random

import msgspec
import structlog
from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.aio.time_slices import TimeSlices
from skep.errors import SkepError
from skep.manager.failures import Failures, write_each
from skep.manager.informer import run_informer
from skep.manager.schedules.due import decided, next_due_ns, skipped_until
from skep.manager.work_queue import WorkQueue
from skep.model.ids import ServiceId
from skep.model.schedules import CRON, parsed_schedule
from skep.model.service import JobStatus, ScheduleStatus, Service
from skep.model.times import SECOND_NS, timestamp
from skep.store.interface import Commit, Created, Deleted, LoopStore, Transaction, Updated, View
from skep.store.kinds import Payload, has_unreadable_run

log = structlog.get_logger(__name__)

BATCH = 50
"""Jobs decided before their runs are written together."""
CLOCK_CHECK_S = 20.0
"""Seconds between checks whether the wall clock was set, or an unreadable run was repaired."""
CLOCK_SET_S = 1.0
"""Minimum seconds by which the wall clock must have been set to matter."""
SCHEDULES_ID = "schedules"
"""Id of the payload that records when the cluster was restored (``Restored``)."""
RESTORED = "the cluster was restored: it is unknown whether the job ran"


class Schedules:
    """Starts the runs of scheduled jobs at their due times.

    Args:
        incarnation: The cluster's incarnation.  After a restore, runs that are missing from the backup may have
            happened, so everything that was due until then is skipped.
    """

    def __init__(self, term: LoopStore, clock: Clock, random: Random, incarnation: int) -> None:
        self._term = term
        self._clock = clock
        self._incarnation = incarnation
        self._queue: WorkQueue[ServiceId] = WorkQueue(clock)
        self._failures = Failures(clock, random)
        self._restored: Restored | None = None

    async def run(self) -> None:
        """Start runs until cancelled."""
        await run_informer(
            self._term, (Service,), on_snapshot=self._on_snapshot, on_commit=self._on_commit, work=self._work
        )

    def _on_snapshot(self, snapshot: View) -> None:
        self._queue.add(service.id for service in snapshot.find(Service) if CRON in service.spec.labels)

    def _on_commit(self, commit: Commit) -> None:
        for event in commit.events:
            match event:
                case Created(Service() as service) if CRON in service.spec.labels:
                    self._queue.add((service.id,))
                case Updated(Service() as old, Service() as new) if CRON in new.spec.labels:
                    if (old.spec.labels, old.job_status) != (new.spec.labels, new.job_status):
                        self._queue.add((new.id,))
                case Deleted(Service() as service):
                    self._failures.clear(service.id)

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._start_due(), name="start due runs")
            group.create_task(self._notice_set_clock(), name="notice that the clock was set")

    async def _notice_set_clock(self) -> None:
        """Recompute all waits when the wall clock is set, because waits use another clock than due times."""
        offset_s = self._offset_s()
        while True:
            await self._clock.sleep(CLOCK_CHECK_S)
            if abs(self._offset_s() - offset_s) > CLOCK_SET_S:
                offset_s = self._offset_s()
                self._on_snapshot(self._term.view())

    def _offset_s(self) -> float:
        return self._clock.now_ns() / SECOND_NS - self._clock.monotonic()

    async def _start_due(self) -> None:
        while True:
            ids = await self._queue.take(BATCH)
            try:
                await self._confirm_incarnation()
            except SkepError as error:
                self._retry(ids, "incarnation", error)
                continue
            due: list[ServiceId] = []
            slices = TimeSlices(self._clock)
            for id in ids:
                await slices.yield_if_due()
                with self._failures.caught(id):
                    if self._is_due(id):
                        due.append(id)
                if (failure := self._failures.of(id)) is not None:
                    self._queue.add_at(id, failure.retry_at)
            await self._write(due)

    def _retry(self, ids: list[ServiceId], what: str, error: SkepError) -> None:
        self._failures.requeue_failed(self._queue, what, [(id, error) for id in ids])

    def _is_due(self, id: ServiceId) -> bool:
        """Whether a decision about a job is due now.  If not, the job is queued for its next due time."""
        view = self._term.view()
        service = view.lookup(Service, id)
        if service is None or service.removed_at is not None:
            return False
        if has_unreadable_run(view, id):
            # A repair may not show as a change of the service: an equal value, or the spec version of the run.
            self._queue.add_at(id, self._clock.monotonic() + CLOCK_CHECK_S)
            return False
        job = service.job_status
        if CRON not in service.spec.labels or job is None:
            return False
        if job.schedule is None:
            return True
        at_ns, now_ns = next_due_ns(parsed_schedule(service.spec.labels), job.schedule), self._clock.now_ns()
        if at_ns is not None and at_ns > now_ns:
            self._queue.add_at(id, self._clock.monotonic() + (at_ns - now_ns) / SECOND_NS)
        return at_ns is not None and at_ns <= now_ns

    async def _write(self, due: list[ServiceId]) -> None:
        if not due:
            return
        now_ns = self._clock.now_ns()
        until_ns = self._restored.until_ns if self._restored is not None else 0

        def write(tx: Transaction, id: ServiceId) -> Service | None:
            return write_decision(tx, id, now_ns, until_ns)

        results = await write_each(self._term, write, due)
        self._failures.requeue_failed(self._queue, "run", zip(due, results, strict=True))
        for result in results:
            if isinstance(result, Service):
                _log(result)

    async def _confirm_incarnation(self) -> None:
        """Read or record the incarnation, once per term.  Raises SkepError."""
        if self._restored is None:
            self._restored = await self._term.update(
                note_incarnation, self._incarnation, self._clock.now_ns()
            )


def write_decision(tx: Transaction, id: ServiceId, now_ns: int, restored_until_ns: int = 0) -> Service | None:
    """Decide about a job and write the result.  Returns the service if something was written.

    The service is compared at the commit: if two leaders decide about the same due time, one of them decides again.
    """
    service = tx.rely_on(Service, id)
    if service is None or service.removed_at is not None or has_unreadable_run(tx, id):
        return None
    job = service.job_status
    if job is None or CRON not in service.spec.labels:
        return None
    if job.schedule is None:  # written by a manager that did not know the label: it counts from now on
        decision: JobStatus | None = replace(job, schedule=ScheduleStatus(settled=timestamp(now_ns)))
    else:
        schedule = parsed_schedule(service.spec.labels)
        decision = skipped_until(job, schedule, min(restored_until_ns, now_ns), RESTORED)
        decision = decision or decided(tx, service, schedule, now_ns)
    return tx.put(replace(service, job_status=decision)) if decision is not None else None


class Restored(msgspec.Struct, frozen=True):
    """When the cluster got its current incarnation."""

    incarnation: int
    until_ns: int = 0
    """Due times until then may have had runs that no backup shows.  0 if the cluster was never restored."""


def note_incarnation(tx: Transaction, incarnation: int, now_ns: int) -> Restored:
    """Record when this incarnation was first seen, once.  Returns the record."""
    stored = tx.lookup(Payload, SCHEDULES_ID)
    if stored is not None:
        with suppress(msgspec.DecodeError):  # an unreadable record counts as another incarnation
            restored = msgspec.json.decode(stored.data, type=Restored)
            if restored.incarnation == incarnation:
                return restored
    restored = Restored(incarnation, now_ns if stored is not None else 0)
    tx.put(Payload(id=SCHEDULES_ID, data=msgspec.json.encode(restored)))
    return restored


def _log(service: Service) -> None:
    job = service.job_status
    starts = job.schedule.starts if job is not None and job.schedule is not None else ()
    if not starts or job is None:
        return  # only its schedule was recorded
    last = starts[-1]
    if last.skipped:
        log.warning("run skipped", job=service.spec.name, due=last.scheduled_at, reason=last.skipped)
    else:
        log.info("run started", job=service.spec.name, due=last.scheduled_at, run=job.job_iteration.index)
