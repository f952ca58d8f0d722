"""Rules on scheduled jobs: every due time is decided once, by a run or with a true reason to skip it.

Due times are computed independently of the checked code, for schedules of the form ``*/N * * * *`` in UTC, where N
divides an hour.
"""

import re
from collections import Counter
from collections.abc import Iterable, Set

from sim.etcd.member import WATCH_LAG_S_MAX
from sim.world.committed import Change
from skep.model.node import Node, NodeState
from skep.model.options.schedules import (
    CRON,
    CRON_CONCURRENCY,
    CRON_DEADLINE,
    CRON_MAX_ATTEMPTS,
    CRON_SUSPEND,
    same_schedule,
)
from skep.model.service import JobStart, JobStatus, RestartPolicy, Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS, unix_ns
from skep.store.interface import Created, Deleted, Updated, View
from skep.store.kinds import spec_of

DECIDED_S = 10.0
"""A due time is decided within this time if there is a leader."""
SHOWN_S = WATCH_LAG_S_MAX + 0.1
"""A leader's replica shows a change within this time."""
_EVERY = re.compile(r"\*/([0-9]+) \* \* \* \*")
_GOING_ON = re.compile(r"is still going on (.+?)(?: and [0-9]+ other nodes)?$")
"""The reason to skip a run of a global job.  It names one of the nodes that run the previous one."""


class DueTimesAreDecidedOnce:
    """A due time has at most one run or a true reason to skip it, and no run begins without a due time or a request.

    A due run begins while the previous one runs only if the schedule replaces runs.
    """

    def __init__(self) -> None:
        self._started: set[tuple[str, str]] = set()
        """Services with the due times of their runs."""
        self._down: dict[NodeId, float] = {}
        """Time at which each node that is down was marked so."""
        self._ended: dict[TaskId, float] = {}
        """Time at which each task of a job ended, if a leader's replica may not show it yet."""
        self.runs = 0

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        self._ended = {id: at for id, at in self._ended.items() if change.time_s - at <= SHOWN_S}
        for event in change.events:
            match event:
                case Updated(Task() as was, Task() as task) if (
                    task.job_iteration is not None
                    and task.status.state.is_terminal
                    and not was.status.state.is_terminal
                ):
                    self._ended[task.id] = change.time_s
                case Updated(_, Node() as node) if node.status.state is NodeState.DOWN:
                    self._down.setdefault(node.id, change.time_s)
                case Updated(_, Node() as node) | Deleted(Node() as node):
                    self._down.pop(node.id, None)
                case Updated(Service() as old, Service() as new) if new.removed_at is None:
                    if old.job_status is not None and new.job_status is not None:
                        long_down = {id for id, at in self._down.items() if change.time_s - at > DECIDED_S}
                        problems = self._problems(old, new, old.job_status, new.job_status, view)
                        untrue = _untrue_of_nodes(old, new, long_down, self._ended.keys(), view)
                        for problem in (*problems, *untrue):
                            yield f"job {new.id}: {problem}"

    def _problems(
        self, old: Service, new: Service, before: JobStatus, after: JobStatus, view: View
    ) -> Iterable[str]:
        if CRON not in new.spec.labels or before == after or before.schedule is None:
            return
        if after.schedule is None:
            yield "it has lost its schedule"
            return
        is_same = same_schedule(old.spec.labels, new.spec.labels)
        if is_same and unix_ns(after.schedule.settled) < unix_ns(before.schedule.settled):
            yield f"settled goes back from {before.schedule.settled} to {after.schedule.settled}"
        added = after.schedule.starts[-1:] if after.schedule.starts != before.schedule.starts else ()
        if before.job_iteration != after.job_iteration and not (added and added[0].iteration):
            yield f"run {after.job_iteration.index} has begun without a word"
        for start in added:
            if start.scheduled_at is None:
                continue
            if new.spec.labels.get(CRON_SUSPEND) == "true":
                yield f"it is suspended, and {start.scheduled_at} was decided"
            yield from self._problems_of(start, new, before, after)
            if start.skipped:
                yield from _unfounded(start, new, before, self._ended.keys(), view)
            else:
                yield from _overlapping(start, new, before, view)
        if is_same and not added and after.schedule.settled != before.schedule.settled:
            yield f"due times until {after.schedule.settled} were passed over without a word"

    def _problems_of(
        self, start: JobStart, service: Service, before: JobStatus, after: JobStatus
    ) -> Iterable[str]:
        assert before.schedule is not None
        assert after.schedule is not None
        due = due_times(service, before.schedule.settled, after.schedule.settled)
        scheduled_s = unix_ns(start.scheduled_at or "") // SECOND_NS
        if not due or scheduled_s != due[-1]:
            yield f"{start.scheduled_at} is not the last due time until {after.schedule.settled}: {due}"
            return
        first_s = unix_ns(start.missed_since) // SECOND_NS if start.missed_since is not None else due[-1]
        if first_s != due[0]:
            yield f"of {due} it says that {start.missed_since} was the first"
        if start.skipped:
            return
        key = (service.id, start.scheduled_at or "")
        if key in self._started:
            yield f"{start.scheduled_at} has a second run"
        self._started.add(key)
        self.runs += 1
        if unix_ns(start.at) < unix_ns(start.scheduled_at or ""):
            yield f"the run of {start.scheduled_at} has begun at {start.at}"


class RunsKeepTheirNodes:
    """A run of a scheduled global job has its tasks on the nodes that could take one when it began."""

    def __init__(self) -> None:
        self._began: dict[ServiceId, float] = {}
        """Time at which the current run of a job began."""
        self._able_since: dict[NodeId, float] = {}
        """Time since which a node can take tasks."""

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        now = change.time_s
        for event in change.events:
            match event:
                case Updated(Service() as old, Service() as new) if _has_begun(old, new):
                    self._began[new.id] = now
                case Created(Node() as node) | Updated(_, Node() as node):
                    before = event.old if isinstance(event, Updated) else None
                    if not isinstance(before, Node) or _differs(before, node):
                        self._able_since[node.id] = now
        for event in change.events:
            match event:
                case Created(Task() as task) if not task.slot:
                    yield from self._late(task, view)

    def _late(self, task: Task, view: View) -> Iterable[str]:
        service = view.lookup(Service, task.service_id)
        began = self._began.get(task.service_id)
        if service is None or CRON not in service.spec.labels or service.job_status is None or began is None:
            return
        earlier = view.find(Task, slot=f"{task.service_id}/{task.node_id}")
        if any(one.id != task.id and one.job_iteration == task.job_iteration for one in earlier):
            return  # the run is restarted
        of_run = [
            one
            for one in view.find(Task, service_id=task.service_id)
            if one.job_iteration == task.job_iteration and one.node_id != task.node_id
        ]
        if not of_run:
            return  # no node could take it before, so the run waited for one (decision 141)
        since = self._able_since.get(task.node_id, 0.0)
        if task.job_iteration == service.job_status.job_iteration and since > began + DECIDED_S:
            yield f"job {service.id}: {task.node_id} could take tasks {since - began:.0f} s after its run began"


def _has_begun(old: Service, new: Service) -> bool:
    before, after = old.job_status, new.job_status
    if before is None or after is None:
        return False
    return before.job_iteration != after.job_iteration or before.last_execution != after.last_execution


def _differs(before: Node, node: Node) -> bool:
    return before.status.state is not node.status.state or before.spec != node.spec


class RetriesAreBounded:
    """A slot of a job's run, or of its retry, has at most the failures that its policy or its schedule allows.

    Tasks of another spec version start a new count, because a user has then changed the job or rolled it back.
    """

    def __init__(self) -> None:
        self._failures: Counter[tuple[ServiceId, int, int | NodeId, Version | None]] = Counter()
        self._since: dict[ServiceId, set[TaskId]] = {}
        """Tasks that a job had when its current run was retried."""

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            match event:
                case Updated(Service() as old, Service() as new) if is_retried(old, new):
                    for key in [key for key in self._failures if key[0] == new.id]:
                        del self._failures[key]
                    self._since[new.id] = {one.id for one in view.find(Task, service_id=new.id)}
                case Updated(Task() as was, Task() as task) if (
                    task.job_iteration is not None and was.is_wanted and _fails(was, task)
                ):
                    yield from self._failed(task, view)
                case Deleted(Service() as service):
                    self._since.pop(service.id, None)

    def _failed(self, task: Task, view: View) -> Iterable[str]:
        assert task.job_iteration is not None
        policy = task.spec.restart_policy or RestartPolicy()
        most = policy.max_attempts or _attempts_of_schedule(task, view)
        if task.id in self._since.get(task.service_id, ()) or not most:
            return
        slot = task.service_id, task.job_iteration.index, task.slot or task.node_id
        key = *slot, task.spec_version
        self._failures[key] += 1
        if self._failures[key] > most + 1 and not (policy.max_attempts and policy.window):
            yield f"slot {slot} has failed {self._failures[key]} times, with {most} attempts"


def _attempts_of_schedule(task: Task, view: View) -> int:
    """Return the attempts of the spec with which the run has begun, or 0 if that spec has no schedule."""
    spec = spec_of(view, task)
    return int(spec.labels.get(CRON_MAX_ATTEMPTS, 6)) if spec is not None and CRON in spec.labels else 0


def is_retried(old: Service, new: Service) -> bool:
    """Return whether a user has asked for another attempt of a job's run."""
    before, after = old.job_status, new.job_status
    return before is not None and after is not None and before.retried_until != after.retried_until


def _fails(was: Task, task: Task) -> bool:
    """Return whether the task fails.  A restart of its node is no failure of the task."""
    failed = (TaskState.FAILED, TaskState.REJECTED)
    return was.status.state not in failed and task.status.state in failed and task.ended_by_itself


def _unfounded(
    start: JobStart, service: Service, before: JobStatus, just_ended: Set[TaskId], view: View
) -> Iterable[str]:
    """Yield a violation if a reason to skip a run does not hold, and did not hold before tasks have just ended."""
    if "late" in start.skipped and CRON_DEADLINE not in service.spec.labels:
        yield f"{start.skipped}, and it has no deadline"
    if "going" in start.skipped:
        total = service.spec.mode.replicated_job.total_completions if service.spec.mode.replicated_job else 0
        tasks = [
            task
            for task in view.find(Task, service_id=service.id)
            if task.job_iteration == before.job_iteration
        ]
        have_ended = all(_has_ended_for_good(task) and task.id not in just_ended for task in tasks)
        if before.awaits_first_run or (len(tasks) >= (total or 0) and have_ended):
            yield f"{start.skipped}, and nothing of it is"


def _has_ended_for_good(task: Task) -> bool:
    """Return whether the task has ended, and no other attempt follows after its delay."""
    is_repeated = task.is_wanted and task.status.state is not TaskState.COMPLETE
    return task.status.state.is_terminal and not is_repeated


def _untrue_of_nodes(
    old: Service, new: Service, long_down: Set[NodeId], just_ended: Set[TaskId], view: View
) -> Iterable[str]:
    """Yield a violation if a due time is skipped for a run on a node that does not have it, or is down.

    Args:
        long_down: nodes that have been down for so long that the leader knows it.
        just_ended: tasks that have ended so recently that the leader may not know it.
    """
    before, after = _starts(old), _starts(new)
    if before == after or not after or CRON not in new.spec.labels:
        return
    found = _GOING_ON.search(after[-1].skipped)
    if found is None or new.job_status is None:
        return
    tasks = [
        task
        for task in view.find(Task, service_id=new.id)
        if task.job_iteration == new.job_status.job_iteration
        and (not task.status.state.is_terminal or task.id in just_ended)
    ]
    for node in view.find(Node):
        if found[1] in (node.description.hostname, node.id):
            if node.id in long_down:
                yield f"{after[-1].skipped}, which is down"
            elif not any(task.node_id == node.id for task in tasks):
                yield f"{after[-1].skipped}, which has no task of it"


def _starts(service: Service) -> tuple[JobStart, ...]:
    job = service.job_status
    return job.schedule.starts if job is not None and job.schedule is not None else ()


def _overlapping(start: JobStart, service: Service, before: JobStatus, view: View) -> Iterable[str]:
    """Yield a violation if a due run begins while the previous one runs on a node that is ready."""
    if before.awaits_first_run or service.spec.labels.get(CRON_CONCURRENCY) == "replace":
        return
    for task in view.find(Task, service_id=service.id):
        node = view.lookup(Node, task.node_id)
        if (
            task.job_iteration == before.job_iteration
            and task.is_wanted
            and task.status.state is TaskState.RUNNING
            and node is not None
            and node.status.state is NodeState.READY
        ):
            yield f"the run of {start.scheduled_at} has begun while task {task.id} of the one before runs"


def due_times(service: Service, after: str, until: str) -> list[int]:
    """Return the due times of a job after one time and until another, in seconds since 1970."""
    found = _EVERY.fullmatch(service.spec.labels[CRON])
    assert found is not None, service.spec.labels[CRON]
    period_s = int(found[1]) * 60
    first_s = unix_ns(after) // SECOND_NS // period_s * period_s + period_s
    return list(range(first_s, unix_ns(until) // SECOND_NS + 1, period_s))


def undecided(view: View, now: str) -> Iterable[str]:
    """Yield the due times until ``now`` that are not decided."""
    for service in view.find(Service):
        labels, job = service.spec.labels, service.job_status
        if CRON in labels and service.removed_at is None and labels.get(CRON_SUSPEND) != "true":
            assert job is not None
            assert job.schedule is not None
            if due := due_times(service, job.schedule.settled, now):
                yield f"job {service.id}: {due} are not decided"
