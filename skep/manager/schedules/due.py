"""Decides whether to start a run of a scheduled job, to skip a due time, or to do nothing yet.  Pure.

Each due time is decided once.  One transaction writes the decision, the run that it starts, and the time up to which
all due times are decided (``settled``).  So a due time never causes a second run, whichever manager leads, and whatever
its clock shows.  If several due times passed while no manager led, only the last may still cause a run.
"""

from msgspec.structs import replace

from skep.manager.services.job_runs import is_going, nodes_going, started
from skep.model.options.schedules import Concurrency, Schedule
from skep.model.service import STARTS_KEPT, JobStart, JobStatus, ScheduleStatus, Service
from skep.model.values.times import SECOND_NS, timestamp, unix_ns
from skep.store.interface import View


def next_due_ns(schedule: Schedule, status: ScheduleStatus) -> int | None:
    """Return the first undecided due time, in nanoseconds since 1970, or None without one or while suspended."""
    if schedule.is_suspended:
        return None
    at_s = schedule.next_after(_settled_s(status))
    return at_s * SECOND_NS if at_s is not None else None


def decided(view: View, service: Service, schedule: Schedule, now_ns: int) -> JobStatus | None:
    """Return the status of a scheduled job after the decision about ``now_ns``, or None if nothing is due."""
    job = service.job_status
    if job is None or job.schedule is None or schedule.is_suspended:
        return None
    start = _due(schedule, job.schedule, now_ns)
    if start is None:
        return None
    status, scheduled_ns = _settled(job.schedule, start), unix_ns(start.scheduled_at or "")
    late_s = (now_ns - scheduled_ns) / SECOND_NS
    if schedule.deadline_s is not None and late_s > schedule.deadline_s:
        return _skipped(job, status, start, f"it would have started {late_s:.0f} s late")
    if schedule.concurrency is Concurrency.FORBID and (where := _running_where(view, service)) is not None:
        return _skipped(job, status, start, f"run {job.job_iteration.index} is still going{where}")
    return started(view, service, status, start)


def _running_where(view: View, service: Service) -> str | None:
    """Return a clause that says where the current run is still active, or None if the next run may start.

    A global job is delayed by nodes that run it, not by a node that is down or lacks resources for it.
    """
    if service.spec.mode.global_job is None:
        return "" if is_going(view, service) else None
    names = nodes_going(view, service)
    if not names:
        return None
    return f" on {names[0]}" + (f" and {len(names) - 1} other nodes" if len(names) > 1 else "")


def skipped_until(job: JobStatus, schedule: Schedule, now_ns: int, reason: str) -> JobStatus | None:
    """Return the job's status with all due times until ``now_ns`` skipped, or None if nothing was due."""
    if job.schedule is None or schedule.is_suspended:
        return None
    start = _due(schedule, job.schedule, now_ns)
    return _skipped(job, _settled(job.schedule, start), start, reason) if start is not None else None


def _due(schedule: Schedule, status: ScheduleStatus, now_ns: int) -> JobStart | None:
    """Return the last undecided due time until ``now_ns``, with the first one, or None if nothing is due."""
    settled_s, now_s = _settled_s(status), now_ns // SECOND_NS
    first_s = schedule.next_after(settled_s)
    if first_s is None or first_s > now_s:
        return None
    last_s = schedule.last_until(settled_s, now_s)
    assert last_s is not None, "the first is due"
    return JobStart(
        at=timestamp(now_ns),
        scheduled_at=timestamp(last_s * SECOND_NS),
        missed_since=timestamp(first_s * SECOND_NS) if first_s < last_s else None,
    )


def _settled(status: ScheduleStatus, start: JobStart) -> ScheduleStatus:
    assert start.scheduled_at is not None, "it is a due time"
    return replace(status, settled=start.scheduled_at)


def _skipped(job: JobStatus, status: ScheduleStatus, start: JobStart, reason: str) -> JobStatus:
    starts = (*status.starts, replace(start, skipped=reason))
    return replace(job, schedule=replace(status, starts=starts[-STARTS_KEPT:]))


def _settled_s(status: ScheduleStatus) -> int:
    return unix_ns(status.settled) // SECOND_NS
