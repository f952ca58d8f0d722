"""Rules on removals by the leader: nodes only outside of disruptions, jobs once their time to live is over."""

from collections.abc import Callable, Iterable
from math import inf

from sim.invariants.services.dependencies import requiring
from sim.world.committed import Change
from skep.model.node import Node, NodeState
from skep.model.options.labels import JOB_TTL
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.times import SECOND_NS, duration_ns
from skep.store.interface import Created, Deleted, Updated, View

UNNOTICED_S = 10.0
"""A leader whose replica lags may not know changes that are newer than this."""
TOLERANCE = 0.99
"""Clocks of machines run at different rates."""


class DisruptionsRemoveNoNode:
    """The leader removes no node while half of all nodes or more are not ready.

    Then rather the network or the power is lost, and the machines will return.
    """

    def __init__(self, is_requested: Callable[[NodeId], bool]) -> None:
        """``is_requested``: returns whether an operator requested the removal of a node."""
        self._is_requested = is_requested
        self._since: float | None = None
        """Time since which half of all nodes are not ready, or None."""

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            match event:
                case Deleted(Node() as node) if not self._is_requested(node.id):
                    if self._since is not None and change.time_s - self._since > UNNOTICED_S:
                        lasts_s = change.time_s - self._since
                        yield f"{node.id} was removed {lasts_s:.0f} s after the loss of most nodes"
        nodes = view.find(Node)
        if 2 * sum(node.status.state is NodeState.READY for node in nodes) > len(nodes):
            self._since = None
        elif self._since is None:
            self._since = change.time_s


class TimesToLive:
    """A job with a time to live removes itself once its last task has ended for that time, unless it is required."""

    def __init__(self, is_removal_asked: Callable[[ServiceId], bool]) -> None:
        """``is_removal_asked``: returns whether a user has requested the removal of a service."""
        self._is_removal_asked = is_removal_asked
        self._ended: dict[TaskId, float] = {}
        """Time at which each task of these jobs ended."""

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            match event:
                case Created(Task() as task) | Updated(_, Task() as task) if task.job_iteration is not None:
                    if task.status.state.is_terminal:
                        self._ended.setdefault(task.id, change.time_s)
                case Deleted(Task() as task):
                    self._ended.pop(task.id, None)
                case Updated(Service() as before, Service() as after) if (
                    before.removed_at is None and after.removed_at is not None
                ):
                    if JOB_TTL in before.spec.labels and not self._is_removal_asked(after.id):
                        yield from self._early(before, change.time_s, view)

    def _early(self, job: Service, now: float, view: View) -> Iterable[str]:
        tasks = _present(job, view)
        if active := [task.id for task in tasks if not task.status.state.is_terminal]:
            yield f"job {job.id} has removed itself, and {active} have not ended"
        elif tasks:
            kept_s = now - max(self._ended.get(task.id, -inf) for task in tasks)
            if kept_s < TOLERANCE * _ttl_s(job):
                yield f"job {job.id} has removed itself after {kept_s:.1f} s, not {_ttl_s(job):g}"

    def overdue(self, now: float, view: View) -> Iterable[str]:
        """Yield the jobs whose time to live is over, in a cluster without faults."""
        for job in view.find(Service):
            status, tasks = job.job_status, _present(job, view)
            if (
                JOB_TTL in job.spec.labels
                and status is not None
                and status.schedule is None
                and status.present_outcome
                and tasks
                and all(task.id in self._ended for task in tasks)
                and now - max(self._ended[task.id] for task in tasks) > _ttl_s(job)
                and not any(requiring(job.spec.name, view))
            ):
                yield f"job {job.id} has outlived its {_ttl_s(job):g} s"


def _present(job: Service, view: View) -> list[Task]:
    """Return the tasks of a job's current run."""
    iteration = job.job_status.job_iteration if job.job_status is not None else None
    return [task for task in view.find(Task, service_id=job.id) if task.job_iteration == iteration]


def _ttl_s(job: Service) -> float:
    return (duration_ns(job.spec.labels[JOB_TTL]) or 0) / SECOND_NS
