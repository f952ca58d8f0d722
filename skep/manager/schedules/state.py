"""State of the loop for scheduled jobs: which jobs are due, and the decision about a due run."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from random import Random

import msgspec
from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.manager.control_loops.failures import Failures
from skep.manager.control_loops.loop_driver import Decision, Recheck
from skep.manager.control_loops.work_queue import WorkQueue
from skep.manager.schedules.due import decided, next_due_ns, skipped_until
from skep.model.options.schedules import CRON, parsed_schedule
from skep.model.service import JobStatus, ScheduleStatus, Service
from skep.model.values.ids import ServiceId
from skep.model.values.times import SECOND_NS, timestamp
from skep.store.interface import Commit, Created, Deleted, Transaction, Updated, View
from skep.store.kinds import Payload, has_unreadable_run

UNREADABLE_S = 20.0
"""Seconds between checks whether an unreadable run was repaired."""
SCHEDULES_ID = "schedules"
"""Id of the payload that records when the cluster was restored (``Restored``)."""
RESTORED = "the cluster was restored or recovered: it is unknown whether the job ran"


class SchedulesState:
    """The scheduled jobs that are due now or later."""

    def __init__(self, view: Callable[[], View], clock: Clock, random: Random) -> None:
        self._view = view
        self._clock = clock
        self.queue: WorkQueue[ServiceId] = WorkQueue(clock)
        self.failures = Failures(clock, random)

    def start(self, snapshot: View) -> Iterator[None]:
        """Queue every scheduled job."""
        self.queue.add(service.id for service in snapshot.find(Service) if CRON in service.spec.labels)
        yield

    def on_commit(self, commit: Commit) -> None:
        """Queue the jobs whose schedule or runs changed."""
        for event in commit.events:
            match event:
                case Created(Service() as service) if CRON in service.spec.labels:
                    self.queue.add((service.id,))
                case Updated(Service() as old, Service() as new) if CRON in new.spec.labels:
                    if (old.spec.labels, old.job_status) != (new.spec.labels, new.job_status):
                        self.queue.add((new.id,))
                case Deleted(Service() as service):
                    self.failures.clear(service.id)

    def decide(self, id: ServiceId) -> Decision[ServiceId]:
        """Yield the job if a decision about it is due now, or its next due time."""
        view, now = self._view(), self._clock.monotonic()
        service = view.lookup(Service, id)
        if service is None or service.removed_at is not None:
            return
        if has_unreadable_run(view, id):
            # A repair may not show as a change of the service: an equal value, or the spec version of the run.
            yield Recheck(now + UNREADABLE_S)
            return
        job = service.job_status
        if CRON not in service.spec.labels or job is None:
            return
        if job.schedule is None:
            yield id
            return
        at_ns, now_ns = next_due_ns(parsed_schedule(service.spec.labels), job.schedule), self._clock.now_ns()
        if at_ns is not None:
            yield Recheck(now + (at_ns - now_ns) / SECOND_NS) if at_ns > now_ns else id


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
    """Time at which the cluster got its current incarnation."""

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
