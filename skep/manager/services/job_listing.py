"""Jobs as users see them: schedule, next run and last outcome.  Pure."""

from collections.abc import Iterable, Mapping

from skep.errors import InvalidArgument
from skep.manager.cluster import node_name
from skep.manager.diagnosis.reasons import failure_of
from skep.manager.services.job_runs import FAILED, RUNNING, is_going, of_present_run, outcome, past_starts
from skep.model.options.labels import is_stopped
from skep.model.options.schedules import CRON, CRON_SUSPEND, CRON_TIME_ZONE, parsed_schedule, schedule_of
from skep.model.service import JobStart, JobStatus, Service
from skep.model.task import Task, TaskState, state_age
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import ServiceId
from skep.model.values.times import SECOND_NS, Timestamp, timestamp, unix_ns
from skep.store.interface import View

WAITING = "waiting"
"""State of a job without a run, in addition to the outcomes of its last run."""


class Job(ApiObject):
    """A job in ``GET /skep/jobs``."""

    id: ServiceId = always(ServiceId(""))
    name: str = always("")
    mode: str = always("")
    labels: Mapping[str, str] = always({})
    """Labels of the service."""
    schedule: str = ""
    """The label ``skep.cron``, or empty without a schedule."""
    time_zone: str = ""
    state: str = always("")
    """``waiting`` for the first run, ``running``, or the outcome of the last run: ``completed`` or ``failed``."""
    iteration: int | None = None
    """Number of the last run, or None without one."""
    last_run: Timestamp | None = None
    next_run: Timestamp | None = None
    note: str = ""
    """Reason why the next run is missing, the last due time was skipped, the last run failed, or tasks of the current
    run do not run."""
    starts: tuple[JobStart, ...] = ()
    """Starts of a scheduled job, the oldest first."""


def shown_job(view: View, service: Service) -> Job:
    """Return job ``service`` for a response."""
    status = service.job_status or JobStatus()
    labels = service.spec.labels
    state = RUNNING if is_going(view, service) else outcome(view, service)
    return Job(
        id=service.id,
        name=service.spec.name,
        mode=service.spec.mode.name,
        labels=labels,
        schedule=labels.get(CRON, ""),
        time_zone=labels.get(CRON_TIME_ZONE, "UTC") if CRON in labels else "",
        state=state or WAITING,
        iteration=None if status.awaits_first_run else status.job_iteration.index,
        last_run=status.last_execution,
        next_run=next_run(service),
        note=note(service) or (failure(view, service) if state == FAILED else ""),
        starts=past_starts(view, service),
    )


def next_run(service: Service) -> Timestamp | None:
    """Return the next due time of a job, or None if its schedule is missing, suspended or unreadable."""
    schedule, status = schedule_of(service.spec.labels), service.job_status
    if schedule is None or schedule.is_suspended or status is None or status.schedule is None:
        return None
    at_s = schedule.next_after(unix_ns(status.schedule.settled) // SECOND_NS)
    return timestamp(at_s * SECOND_NS) if at_s is not None else None


def note(service: Service) -> str:
    """Return why a scheduled job has no next run, or why the last one was skipped, or an empty text."""
    if CRON not in service.spec.labels:
        return ""
    try:
        schedule = parsed_schedule(service.spec.labels)
    except InvalidArgument as error:
        return str(error)
    if schedule.is_suspended and is_stopped(service.spec.labels):
        return f"stopped: skep service start {service.spec.name} resumes its schedule"
    if schedule.is_suspended:
        return f"suspended by the label {CRON_SUSPEND}"
    status = service.job_status.schedule if service.job_status is not None else None
    last = status.starts[-1] if status is not None and status.starts else None
    return f"not run at {last.scheduled_at}: {last.skipped}" if last is not None and last.skipped else ""


def failure(view: View, service: Service) -> str:
    """Return why the last failed task of the job's current run failed, or an empty text if none is kept.

    If none failed, a task was stopped because of its node.
    """
    tasks = of_present_run(service, view.find(Task, service_id=service.id))
    failed = [one for one in tasks if one.status.state in (TaskState.FAILED, TaskState.REJECTED)]
    last = max(failed, key=state_age, default=None)
    return failure_of(last)[1] if last is not None else stop_of(view, tasks)


def stop_of(view: View, tasks: Iterable[Task]) -> str:
    """Return why one of a job's ``tasks`` was stopped, or an empty text."""
    stopped = [one for one in tasks if one.stop_cause is not None and not one.is_done]
    last = max(stopped, key=state_age, default=None)
    if last is None or last.stop_cause is None:
        return ""
    return f"its task was stopped, because {last.stop_cause.words(node_name(view, last.node_id))}"


def schedule_words(service: Service) -> str:
    """Return the schedule of a job as a sentence, or an empty text without a schedule."""
    labels = service.spec.labels
    if CRON not in labels:
        return ""
    at, more = next_run(service), note(service)
    zone = labels.get(CRON_TIME_ZONE, "UTC")
    words = f"{labels[CRON]} ({zone})" + (f", next run at {at}" if at is not None else "")
    return f"{words}; {more}" if more else words
