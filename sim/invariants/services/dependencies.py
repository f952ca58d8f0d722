"""Dependencies run before a service gets nodes, judged by what the machines run instead of what the store says."""

from collections.abc import Callable, Iterable, Iterator
from math import inf

from sim.world.committed import Change
from skep.model.options.dependencies import Dependency, DependencyCondition, dependencies_of
from skep.model.options.labels import JOB_TTL
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import ServiceId, TaskId
from skep.store.interface import Updated, View

UNNOTICED_S = 45.0
"""Time for which managers may not know of a container's end: its node is cut off, or lost with the session."""


class DependenciesComeFirst:
    """A task gets a node once its service runs, or once the services that it depends on run or have completed.

    Only services with required dependencies are checked.  A job with a time to live does not remove itself while a
    service requires it.
    """

    def __init__(self, is_removal_asked: Callable[[ServiceId], bool] = lambda _: False) -> None:
        """Observe commits.

        Args:
            is_removal_asked: returns whether a user has requested the removal of a service.
        """
        self._is_removal_asked = is_removal_asked
        self._running: dict[TaskId, ServiceId] = {}
        self._ran: dict[ServiceId, float] = {}
        """Time at which the last container of a service ended."""

    def started(self, task: Task) -> None:
        """Record that a container was started."""
        self._running[task.id] = task.service_id

    def ended(self, task_id: TaskId, now: float) -> None:
        """Record that a container has ended."""
        service_id = self._running.pop(task_id, None)
        if service_id is not None:
            self._ran[service_id] = now

    def __call__(self, change: Change, view: View) -> Iterator[str]:
        for event in change.events:
            match event:
                case Updated(Service() as before, Service() as after) if (
                    before.removed_at is None and after.removed_at is not None
                ):
                    if JOB_TTL in after.spec.labels and not self._is_removal_asked(after.id):
                        for name in requiring(after.spec.name, view):
                            yield f"job {after.spec.name} has removed itself, and {name} requires it"
                case Updated(Task() as old, Task() as task) if (
                    old.status.state < TaskState.ASSIGNED and task.status.state is TaskState.ASSIGNED
                ):
                    service = view.lookup(Service, task.service_id)
                    if service is None or self._serves(service.id, change.time_s):
                        continue
                    needed = dependencies_of(service.spec.labels)
                    for reason in self._missing(needed, view, change.time_s):
                        yield f"task {task.id} of {service.spec.name} got a node, but {reason}"

    def _missing(self, needed: Iterable[Dependency], view: View, now: float) -> Iterator[str]:
        for one in needed:
            found = [each for each in view.find(Service, name=one.service) if each.removed_at is None]
            if not found or not one.is_required:
                continue  # it may be removed at the same moment
            service = found[0]
            replicated, job = service.spec.mode.replicated, service.spec.mode.replicated_job
            if (replicated is not None and replicated.replicas == 0) or (
                job is not None and job.total_completions == 0
            ):
                continue  # it has no tasks to run
            has_completed = any(
                task.status.state is TaskState.COMPLETE for task in view.find(Task, service_id=service.id)
            )
            if one.condition is DependencyCondition.COMPLETED and not has_completed:
                yield f"{one.service} has not completed"
            elif has_completed and one.condition is not DependencyCondition.HEALTHY:
                yield from self._missing(dependencies_of(service.spec.labels), view, now)
            elif not self._serves(service.id, now) and not (
                one.condition is DependencyCondition.STARTED and _is_starting(service, view)
            ):
                yield f"{one.service} does not run"

    def _serves(self, id: ServiceId, now: float) -> bool:
        return id in self._running.values() or self._ran.get(id, -inf) > now - UNNOTICED_S


def missing_dependencies(
    service: Service, view: View, path: frozenset[ServiceId] = frozenset()
) -> Iterator[str]:
    """Yield the dependencies that a service waits for, in a cluster at rest.

    A completed service counts while its own dependencies are met, as far as they exist.

    Args:
        path: Completed services on the way to this one.
    """
    for one in dependencies_of(service.spec.labels):
        found = [each for each in view.find(Service, name=one.service) if each.removed_at is None]
        if not found:
            if not path:
                yield one.service
            continue
        tasks = view.find(Task, service_id=found[0].id)
        is_met = one.condition is not DependencyCondition.HEALTHY and _has_completed(found[0], view)
        if is_met and found[0].id not in path:
            yield from missing_dependencies(found[0], view, path | {found[0].id})
        if one.condition is not DependencyCondition.COMPLETED:
            is_met = is_met or any(task.status.state is TaskState.RUNNING for task in tasks)
        if not is_met:
            yield one.service


def requiring(name: str, view: View) -> Iterator[str]:
    """Yield the names of the services that require the service ``name``."""
    for service in view.find(Service):
        needed = dependencies_of(service.spec.labels)
        if service.removed_at is None and any(
            one.service.lower() == name.lower() and one.is_required for one in needed
        ):
            yield service.spec.name


def _has_completed(service: Service, view: View) -> bool:
    """Return whether every task of a service, or of a job's current run, has completed."""
    iteration = service.job_status.job_iteration if service.job_status is not None else None
    tasks = [task for task in view.find(Task, service_id=service.id) if task.job_iteration == iteration]
    job = service.spec.mode.replicated_job
    done = {task.slot or task.node_id for task in tasks if task.status.state is TaskState.COMPLETE}
    if job is not None:
        return len(done) >= (job.total_completions or 0)
    return bool(done) and all(task.status.state is TaskState.COMPLETE for task in tasks)


def _is_starting(service: Service, view: View) -> bool:
    states = (task.status.state for task in view.find(Task, service_id=service.id))
    return any(TaskState.STARTING <= state <= TaskState.RUNNING for state in states)
