"""Decides when a job's next run starts, with which spec, and whether the current run is over.  Pure.

Docker's jobs run when they are created and with every update.  A scheduled job (``model.options.schedules``) runs at
its due times, and on request: ``docker service update --force`` or ``skep job run``.  Any other update applies to later
runs, and the current run keeps the spec that it started with.

A run of a global job has a task on each node that existed when the run was requested.  Docker's jobs start late on a
node that was down or drained at that time.  A scheduled run is fixed to the nodes on which it started.  Once each of
them has its task, no other node joins (``JobStatus.nodes_fixed``).  Once the run is over, it stays over
(``JobStatus.outcome``).  A node that returns or gets a label waits for the next due time.

Nodes and runs are ordered by their timestamps, which come from different machines.  Therefore a transaction stamps each
with a time after everything that it has to follow (``asked_at``, ``joined_at``), even if the clock shows an earlier
time.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

from msgspec.structs import replace

from skep.errors import Unavailable
from skep.model.needs import references_of
from skep.model.node import Node, NodeState, is_lost, takes_tasks
from skep.model.options.constraints import is_satisfied
from skep.model.options.schedules import CRON, JOB_MODES, same_schedule, schedule_of
from skep.model.service import (
    STARTS_KEPT,
    JobStart,
    JobStatus,
    Placement,
    ScheduleStatus,
    Service,
    ServiceSpec,
)
from skep.model.task import Task, TaskState
from skep.model.values.counts import counted
from skep.model.values.ids import NodeId
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS, Timestamp, timestamp, unix_ns
from skep.store.interface import Transaction, View
from skep.store.kinds import as_run, has_unreadable_run

COMPLETED, FAILED, STOPPED, RUNNING = "completed", "failed", "stopped", "running"
"""Outcomes of a run.  ``STOPPED`` means that it was still active when the next run started.  ``RUNNING`` is never
stored.
"""

CLOCKS_DIFFER_S = 86_400
"""A run that is further ahead is from a clock that was wrong.  It must not stop a schedule for years."""


def first_job(view: View, spec: ServiceSpec, now: Timestamp) -> JobStatus | None:
    """Return the status of a new job, or None for other services."""
    if spec.mode.name not in JOB_MODES:
        return None
    if CRON in spec.labels:
        return JobStatus(schedule=ScheduleStatus(settled=now))
    return JobStatus(last_execution=asked_at(view, spec, now))


def asked_at(view: View, spec: ServiceSpec, now: Timestamp) -> Timestamp:
    """Return ``now``, or for a global job a time after the creation of every node that exists.

    ``is_candidate`` compares this time with a node's creation.  They come from the clocks of two managers.
    """
    if spec.mode.global_job is None:
        return now
    youngest_ns = max((unix_ns(node.created_at) for node in view.find(Node)), default=0)
    return now if unix_ns(now) > youngest_ns else timestamp(youngest_ns + 1)


def joined_at(view: View, now_ns: int) -> Timestamp:
    """Return the creation time of a new node: ``now_ns``, or the time of the last global run if that is later."""
    runs = (
        unix_ns(service.job_status.last_execution)
        for service in view.find(Service)
        if service.spec.mode.global_job is not None
        and service.job_status is not None
        and service.job_status.last_execution is not None
    )
    return timestamp(max(now_ns, *runs, 0))


def next_job(view: View, service: Service, spec: ServiceSpec, now: Timestamp) -> JobStatus | None:
    """Return the job status after the update of ``service`` to ``spec``, or None for other services.

    A changed schedule counts from now on, or from the last due time that had a run if that is later by the clock of
    another manager.  Due times that were missed before, for example during a suspension, are not made up for.

    Raises:
        Unavailable: This manager cannot read the current run; another may.
    """
    if has_unreadable_run(view, service.id):
        raise Unavailable(
            f"this manager cannot read the current run of job {service.id}: try another manager"
        )
    job = service.job_status
    if job is None:
        return None
    if CRON not in spec.labels:
        return started_plainly(view, job, spec, now)
    schedule = job.schedule or ScheduleStatus(settled=now)
    if not same_schedule(service.spec.labels, spec.labels):
        schedule = replace(schedule, settled=_counted_from(schedule, now))
    if spec.task_template.force_update != service.spec.task_template.force_update:
        return started(view, service, schedule, JobStart(at=now))
    pinned = (job.spec_version or service.spec_version) if job.last_execution is not None else None
    return replace(job, schedule=schedule, spec_version=pinned, updates=job.updates + 1)


def _counted_from(schedule: ScheduleStatus, now: Timestamp) -> Timestamp:
    now_ns = unix_ns(now)
    runs_ns = (unix_ns(one.scheduled_at) for one in schedule.starts if one.scheduled_at)
    known_ns = (one for one in runs_ns if one <= now_ns + CLOCKS_DIFFER_S * SECOND_NS)
    return timestamp(max(now_ns, *known_ns, 0))


def started(view: View, service: Service, schedule: ScheduleStatus, start: JobStart) -> JobStatus:
    """Return the status of job ``service`` after the start of its next run.  It includes the outcome of the previous
    run.
    """
    assert service.job_status is not None, "of jobs only"
    iteration = _next(service.job_status)
    starts = [_with_outcome(one, view, service, going=STOPPED) for one in schedule.starts]
    starts.append(replace(start, iteration=iteration))
    return JobStatus(
        job_iteration=iteration,
        last_execution=asked_at(view, service.spec, start.at),
        schedule=replace(schedule, starts=tuple(starts[-STARTS_KEPT:])),
    )


def started_plainly(view: View, job: JobStatus, spec: ServiceSpec, now: Timestamp) -> JobStatus:
    """Return the status of an unscheduled job after the start of its next run with ``spec``."""
    return JobStatus(job_iteration=_next(job), last_execution=asked_at(view, spec, now))


def _next(job: JobStatus) -> Version:
    """Return the number of the next run.  Docker's first run has number 0."""
    return Version(index=job.job_iteration.index + (not job.awaits_first_run))


def past_starts(view: View, service: Service) -> tuple[JobStart, ...]:
    """Return the starts of a scheduled job, the oldest first, with the current outcomes of their runs."""
    job = service.job_status
    if job is None or job.schedule is None:
        return ()
    return tuple(_with_outcome(one, view, service, going=RUNNING) for one in job.schedule.starts)


def _with_outcome(start: JobStart, view: View, service: Service, *, going: str) -> JobStart:
    job = service.job_status
    is_last = job is not None and start.iteration == job.job_iteration and not start.skipped
    return replace(start, outcome=outcome(view, service) or going) if is_last else start


def outcome(view: View, service: Service) -> str:
    """Return the outcome of a job's current run, or an empty text if it is active or does not exist."""
    if service.job_status is None or service.job_status.awaits_first_run or is_going(view, service):
        return ""
    run = as_run(view, service)
    slots = _slots_of_run(view, run)
    if run.spec.mode.replicated_job is None:
        return service.job_status.present_outcome if is_over(run) else result(run, slots.values())
    done = sum(map(_is_done, slots.values()))
    return COMPLETED if done >= (run.spec.mode.replicated_job.total_completions or 0) else FAILED


def result(run: Service, slots: Collection[Iterable[Task]]) -> str:
    """Return the outcome of a job's ``run`` whose tasks have all ended, or an empty text if it has none yet.

    ``slots`` are all its slots.  A scheduled run of a global job without a node has failed.  If a global job has no
    schedule, a node that stopped its task does not count: it runs the job again when it takes tasks again.
    """
    done = [_is_done(slot) for slot in slots if not may_continue(run, slot)]
    if len(done) == 0 < len(slots):
        return ""
    return COMPLETED if all(done) and (done or not is_fixed(run)) else FAILED


def may_continue(run: Service, slot: Iterable[Task]) -> bool:
    """Return whether a node whose task was stopped, because it is lost or drained, will run a global job again."""
    is_bound = run.spec.mode.global_job is None or is_fixed(run)
    return not is_bound and not _is_done(slot) and not _is_given_up(slot)


def is_left_out(run: Service, slot: Collection[Task]) -> bool:
    """Return whether a job's ``run`` continues without a slot, whose task was stopped, for example by a drain.

    It waits for its node, and is not counted unless the run has ended without it.
    """
    if _is_done(slot) or _is_given_up(slot) or any(task.is_wanted for task in slot):
        return False
    has_outcome = run.job_status is not None and bool(run.job_status.present_outcome)
    return not has_outcome or may_continue(run, slot)


def has_last_failed(service: Service) -> bool:
    """Return whether the last ended run of a job failed.  A run that a user retried is active again and
    does not count.
    """
    job = service.job_status
    if job is None:
        return False
    if job.present_outcome or job.schedule is None:
        return job.present_outcome == FAILED
    past = [one for one in job.schedule.starts if one.outcome in (COMPLETED, FAILED)]
    return bool(past) and past[-1].outcome == FAILED


def is_fixed(run: Service) -> bool:
    """Return whether a job's ``run`` is fixed to the nodes on which it started, as for scheduled global jobs."""
    job = run.job_status
    return job is not None and job.schedule is not None and run.spec.mode.global_job is not None


def is_over(run: Service) -> bool:
    """Return whether a scheduled ``run`` of a global job has ended.  No node starts it again."""
    return is_fixed(run) and run.job_status is not None and bool(run.job_status.present_outcome)


def settled(view: View, service: Service, *, is_over: bool, is_late: bool) -> JobStatus | None:
    """Return the status of a job after a run ended or, for a global job, after its nodes are fixed.

    Returns the current status if neither applies.

    Args:
        is_late: Whether no further node may start the run.
    """
    run, tasks = as_run(view, service), view.find(Task, service_id=service.id)
    job, slots = run.job_status, _slots_of_run(view, run)
    if job is None:
        return None
    if run.spec.mode.replicated_job is not None:
        ending = outcome(view, service) if is_over else job.present_outcome
        return replace(job, outcome=ending, settled_iteration=job.job_iteration) if ending else job
    candidates = [node.id for node in nodes_of(run, tasks, view.find(Node)) if is_candidate(node, run)]
    started = {task.node_id for task in tasks if task.job_iteration == job.job_iteration}
    if not is_late and not started.issuperset(candidates):
        return job
    are_decided = all(_is_done(slots.get(id, ())) or _is_given_up(slots.get(id, ())) for id in candidates)
    has_ended = all(map(_has_ended, slots.values())) and not is_ending(
        slots.values(), partial(view.lookup, Node)
    )
    is_idle = has_ended and (is_late or are_decided)
    ending = result(run, slots.values()) if is_over and is_idle else job.present_outcome
    return replace(job, nodes_fixed=is_fixed(run), outcome=ending, settled_iteration=job.job_iteration)


def _has_ended(slot: Sequence[Task]) -> bool:
    """Return whether no task of the slot will run, and the restart policy replaces none.

    In a slot with a completed task, it does not replace a task that failed later.
    """
    is_replaced = any(task.is_wanted for task in slot) and not _is_done(slot)
    return not is_replaced and not _is_active(slot)


def is_ending(slots: Iterable[Collection[Task]], find_node: Callable[[NodeId], Node | None]) -> bool:
    """Return whether a stopped task decides about one of a run's ``slots``, and its node has yet to report its end.

    Its process may have ended with exit code 0 before it was stopped.  A node that is down reports nothing.
    """
    stopping = (task for slot in slots if not _is_done(slot) for task in slot if task.is_stopping)
    return any(not is_lost(find_node(task.node_id)) for task in stopping)


def _is_given_up(slot: Iterable[Task]) -> bool:
    last = max(slot, key=lambda task: (unix_ns(task.created_at), task.id), default=None)
    return last is not None and last.ended_in_failure


def starts_until_ns(run: Service) -> int | None:
    """Return the time until which tasks of a scheduled global ``run`` may start, or None without a limit.

    The label ``skep.cron.deadline`` applies to each node.  A run that a user requested or retried has no deadline.
    """
    job, schedule = run.job_status, schedule_of(run.spec.labels)
    if job is None or job.schedule is None or job.retried_until is not None or not is_fixed(run):
        return None
    due = [one.scheduled_at for one in job.schedule.starts if one.iteration == job.job_iteration]
    if schedule is None or schedule.deadline_s is None or not due or due[-1] is None:
        return None
    return unix_ns(due[-1]) + round(schedule.deadline_s * SECOND_NS)


def nodes_going(view: View, service: Service) -> list[str]:
    """Return the names of the nodes on which the current run of a global job is active, in order.

    Nodes that are down, or on which the run waits for resources or another service, are left out because they must not
    delay the next run.
    """
    tasks = of_present_run(service, view.find(Task, service_id=service.id))
    found = {
        node.id: node.shown_name
        for task in tasks
        if task.is_active and task.status.state >= TaskState.ASSIGNED
        if (node := view.lookup(Node, task.node_id)) is not None and node.status.state is not NodeState.DOWN
    }
    return [found[id] for id in sorted(found)]


def is_going(view: View, service: Service) -> bool:
    """Return whether the current run of a job has work left.

    A slot whose task failed is over unless it is retried.  For a retry, the orchestrator creates the next task at once.
    """
    job = service.job_status
    if job is None or job.awaits_first_run:
        return False
    run, slots = as_run(view, service), _slots(view, service)
    if is_over(run):
        return False
    if any(_is_active(slot) or _waits_for_retry(job, slot) for slot in slots.values()):
        return True
    if is_ending(slots.values(), partial(view.lookup, Node)):
        return True
    if run.spec.mode.replicated_job is not None:
        return any(
            number not in slots
            for number in range(1, (run.spec.mode.replicated_job.total_completions or 0) + 1)
        )
    tasks = view.find(Task, service_id=service.id)
    return any(
        is_candidate(node, run) and node.id not in slots for node in nodes_of(run, tasks, view.find(Node))
    )


def can_begin(view: View, run: Service, now_ns: int) -> bool:
    """Return whether some node will start the current ``run`` of a global job, which has no tasks yet."""
    until_ns = starts_until_ns(run)
    if is_over(run) or (until_ns is not None and now_ns > until_ns):
        return False
    return any(is_candidate(node, run) for node in nodes_of(run, (), view.find(Node)))


def nodes_of(run: Service, tasks: Iterable[Task], nodes: Iterable[Node]) -> Iterable[Node]:
    """Return the ``nodes`` that may belong to the current ``run`` of a global job with these ``tasks``."""
    job = run.job_status
    if job is None or not job.has_fixed_nodes:
        return nodes
    members = {task.node_id for task in tasks if task.job_iteration == job.job_iteration}
    return (node for node in nodes if node.id in members)


def runs_with(tx: Transaction, kind: str, id: str) -> list[Service]:
    """Return the jobs whose current run needs an object that their specs no longer refer to.

    The store protects objects that a spec refers to, but the run of a scheduled job keeps the spec that it started
    with.  The transaction fails if such a run starts or is retried at the same moment.

    Raises:
        Unavailable: A run cannot be read.
    """
    found = []
    for service in tx.find(Service):
        job = service.job_status
        if job is None or job.spec_version in (None, service.spec_version) or service.removed_at is not None:
            continue
        if has_unreadable_run(tx, service.id):
            raise Unavailable(
                f"this manager cannot read the current run of job {service.spec.name}: try another manager"
            )
        if (kind, id) in references_of(as_run(tx, service).spec):
            tx.rely_on(Service, service.id, "job")
            if is_going(tx, service):
                found.append(service)
    return found


def has_failed(view: View, service: Service) -> bool:
    """Return whether slots of the current run were given up.  ``retried`` starts them again."""
    return bool(_failed_slots(view, service))


def away_from_retry(view: View, service: Service) -> list[str]:
    """Return the names of the nodes to which the job's failed run is fixed, if none of them takes tasks now."""
    run = as_run(view, service)
    if not is_fixed(run):
        return []
    nodes = [
        node
        for id in _failed_slots(view, service)
        if (node := view.lookup(Node, NodeId(str(id)))) is not None
    ]
    return [] if any(is_candidate(node, run) for node in nodes) else sorted(node.shown_name for node in nodes)


def _failed_slots(view: View, service: Service) -> list[int | str]:
    slots = _slots_of_run(view, as_run(view, service))
    return [id for id, slot in slots.items() if not _is_done(slot) and not _is_active(slot)]


def retried(view: View, service: Service) -> JobStatus:
    """Return the status of job ``service`` after a user asked to retry the failed slots of its current run.

    The time comes from the tasks, because this manager's clock may differ from the leader's.
    """
    assert service.job_status is not None, "of jobs only"
    made = [task.created_at for task in view.find(Task, service_id=service.id)]
    return replace(service.job_status, retried_until=max(made, key=unix_ns, default=None), outcome="")


def of_present_run(service: Service, tasks: Iterable[Task]) -> list[Task]:
    """Return the ``tasks`` that count for a job's current run.  Tasks that had failed when a user retried it do not."""
    job = service.job_status or JobStatus()
    until_ns = unix_ns(job.retried_until) if job.retried_until is not None else -1
    return [
        task
        for task in tasks
        if task.job_iteration == job.job_iteration
        and (
            until_ns < 0
            or task.is_wanted
            or task.status.state is TaskState.COMPLETE
            or unix_ns(task.created_at) > until_ns
        )
    ]


def restarts_in(slot: Iterable[Task]) -> str:
    """Return how often a failed task of a slot was restarted, like ``after 6 restarts``.

    The limit of attempts counts restarts as well: a task that may be restarted six times fails seven times.
    """
    restarts = max(sum(task.ended_by_itself for task in slot) - 1, 0)
    return f"after {counted(restarts, 'restart')}" if restarts else "without a restart"


def is_candidate(node: Node, service: Service) -> bool:
    """Return whether ``node`` can have a task of a global job's current run, for which it existed when that was
    requested.
    """
    asked_at = service.job_status.last_execution if service.job_status is not None else None
    constraints = (service.spec.task_template.placement or Placement()).constraints
    return (
        takes_tasks(node)
        and is_satisfied(constraints, node)
        and (asked_at is None or unix_ns(node.created_at) < unix_ns(asked_at))
    )


def _slots(view: View, service: Service) -> dict[int | str, list[Task]]:
    slots: dict[int | str, list[Task]] = {}
    for task in of_present_run(service, view.find(Task, service_id=service.id)):
        slots.setdefault(task.slot or task.node_id, []).append(task)
    return slots


def _slots_of_run(view: View, run: Service) -> dict[int | str, list[Task]]:
    """Return the slots of a job's ``run``.

    If the run is fixed to its nodes, a slot is empty if its task ended before a retry, and its node has taken no task
    since.
    """
    slots = _slots(view, run)
    if is_fixed(run) and run.job_status is not None:
        for task in view.find(Task, service_id=run.id):
            is_present = task.job_iteration == run.job_status.job_iteration
            if is_present and task.node_id not in slots and view.lookup(Node, task.node_id) is not None:
                slots[task.node_id] = []
    return slots


def _is_done(slot: Iterable[Task]) -> bool:
    return any(task.status.state is TaskState.COMPLETE for task in slot)


def _waits_for_retry(job: JobStatus, slot: Iterable[Task]) -> bool:
    """Return whether a task of the slot had failed when a user retried the run, and the leader has not
    retired it yet.
    """
    until_ns = unix_ns(job.retried_until) if job.retried_until is not None else -1
    return any(
        task.is_wanted and not task.is_active and unix_ns(task.created_at) <= until_ns for task in slot
    ) and not _is_done(slot)


def _is_active(slot: Iterable[Task]) -> bool:
    return any(task.is_active for task in slot)
