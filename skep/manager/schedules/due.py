"""What is due of a scheduled job: nothing yet, a run, or a due time that is skipped.  Pure.

Each due time is decided once.  The decision is written with the time up to which all are decided (``settled``), in one
transaction with the run that it starts; so a due time has no second run, whichever manager leads, and whatever its
clock says.  Of several that passed while no manager led only the last may still run.
"""

from msgspec.structs import replace

from skep.manager.job_runs import is_going, nodes_going, started
from skep.model.schedules import Concurrency, Schedule
from skep.model.service import STARTS_KEPT, JobStart, JobStatus, ScheduleStatus, Service
from skep.model.times import SECOND_NS, timestamp, unix_ns
from skep.store.interface import View


def next_due_ns(schedule: Schedule, status: ScheduleStatus) -> int | None:
    """The first due time that is not decided, in nanoseconds since 1970; None: there is none, or it is suspended."""
    if schedule.is_suspended:
        return None
    at_s = schedule.next_after(_settled_s(status))
    return at_s * SECOND_NS if at_s is not None else None


def decided(view: View, service: Service, schedule: Schedule, now_ns: int) -> JobStatus | None:
    """The status of a scheduled job once what is due at ``now_ns`` is decided; None: nothing is."""
    job = service.job_status
    if job is None or job.schedule is None or schedule.is_suspended:
        return None
    start = _due(schedule, job.schedule, now_ns)
    if start is None:
        return None
    status, scheduled_ns = _settled(job.schedule, start), unix_ns(start.scheduled_at or "")
    late_s = (now_ns - scheduled_ns) / SECOND_NS
    if schedule.deadline_s is not None and late_s > schedule.deadline_s:
        return _skipped(job, status, start, f"it would have begun {late_s:.0f} s late")
    if schedule.concurrency is Concurrency.FORBID and (where := _going(view, service)) is not None:
        return _skipped(job, status, start, f"run {job.job_iteration.index} is still going{where}")
    return started(view, service, status, start)


def _going(view: View, service: Service) -> str | None:
    """Where the present run still goes on, in words; None: it does not, and the next one may start.

    A global job is held up by nodes that run it, not by one that has no room for it or is down.
    """
    if service.spec.mode.global_job is None:
        return "" if is_going(view, service) else None
    names = nodes_going(view, service)
    if not names:
        return None
    return f" on {names[0]}" + (f" and {len(names) - 1} other nodes" if len(names) > 1 else "")


def passed_over(job: JobStatus, schedule: Schedule, now_ns: int, reason: str) -> JobStatus | None:
    """The status of a scheduled job of which nothing that was due until ``now_ns`` is run; None: nothing was."""
    if job.schedule is None or schedule.is_suspended:
        return None
    start = _due(schedule, job.schedule, now_ns)
    return _skipped(job, _settled(job.schedule, start), start, reason) if start is not None else None


def _due(schedule: Schedule, status: ScheduleStatus, now_ns: int) -> JobStart | None:
    """The last due time until ``now_ns`` that is not decided, with the first; None: there is none."""
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
