"""What a change of one service means for those that depend on it."""

from collections.abc import Iterable

from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.manager.registry_auth import auth_of, keep_auth
from skep.model.dependencies import DEPENDS_ON, Dependency, dependencies_of
from skep.model.meta import Version
from skep.model.service import ENDED, JobStatus, Service, ServiceSpec, TaskSpec
from skep.model.times import Timestamp
from skep.store.interface import Transaction, View
from skep.store.kinds import previous_registry_auth_id, registry_auth_id


def refuse_cycles(view: View, spec: ServiceSpec) -> None:
    """Raises: InvalidArgument: services would wait for each other, ``spec`` among them."""
    if path := circle(view, spec.name, dependencies_of(spec.labels)):
        raise InvalidArgument(
            f"services cannot wait for each other: {' -> '.join(path)} (label {DEPENDS_ON})"
        )


def circle(view: View, name: str, dependencies: Iterable[Dependency]) -> list[str]:
    """The names on a way from the service ``name`` over what it depends on back to it; empty: there is none."""
    reached_by: dict[str, str] = {}
    pending = [(name, one.service) for one in dependencies]
    while pending:
        before, reached = pending.pop()
        if reached == name:
            path = [name, before]
            while path[-1] != name:
                path.append(reached_by[path[-1]])
            return path[::-1]
        if reached not in reached_by:
            reached_by[reached] = before
            pending += [
                (reached, one.service)
                for service in view.find(Service, name=reached)
                if service.removed_at is None
                for one in dependencies_of(service.spec.labels)
            ]
    return []


def is_same_task(one: TaskSpec, other: TaskSpec) -> bool:
    """Whether an update from one to the other replaces no task for what it is; another placement may move some."""
    return one == other or (
        (one.force_update, one.container_spec)
        == (other.force_update, other.container_spec)  # usually the difference
        and replace(one, placement=None) == replace(other, placement=None)
    )


def restart_dependents(tx: Transaction, changed: Service, template: TaskSpec, now: Timestamp) -> None:
    """Update the services that are to be restarted with updates of ``changed``, as ``--force`` does.

    Their new tasks wait for those of ``changed``, whose tasks become ``template``; if they stay the same, nothing is
    restarted.
    """
    if is_same_task(changed.spec.task_template, template):
        return
    name = changed.spec.name
    for service in tx.find(Service):
        if service.removed_at is not None or DEPENDS_ON not in service.spec.labels:
            continue
        if any(one.service == name and one.restarts for one in dependencies_of(service.spec.labels)):
            _restart(tx, service, now)


def _restart(tx: Transaction, service: Service, now: Timestamp) -> None:
    """Replace its tasks.  An update of its own that is not over stays what it is: paused, and with its way back."""
    template = service.spec.task_template
    spec = replace(service.spec, task_template=replace(template, force_update=template.force_update + 1))
    status, previous = service.update_status, service.previous_spec
    if status is not None:
        is_over = status.state in ENDED
        status = replace(
            status, started_at=now
        )  # the status of a spec goes with it unless it is written with the next
    else:  # none that changed the tasks, or the leader has not come to it yet
        is_over = previous is None or is_same_task(previous.task_template, template)
    if is_over:
        status, previous = None, service.spec
        keep_auth(tx, previous_registry_auth_id(service.id), auth_of(tx, registry_auth_id(service.id)))
    tx.put(
        replace(
            service,
            spec=spec,
            previous_spec=previous,
            update_status=status,
            job_status=next_job(service, now),
        )
    )


def next_job(service: Service, now: Timestamp) -> JobStatus | None:
    """The next run of a job, which each update is; None: the service is none."""
    if service.job_status is None:
        return None
    index = service.job_status.job_iteration.index + 1
    return JobStatus(job_iteration=Version(index=index), last_execution=now)
