"""What a change of one service means for those that depend on it."""

from collections.abc import Iterable, Sequence

import msgspec
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.manager.registry_auth import auth_of, keep_auth
from skep.model.dependencies import DEPENDS_ON, Dependency, dependencies_of
from skep.model.meta import Version
from skep.model.service import ENDED, JobStatus, Service, ServiceSpec, TaskSpec
from skep.model.times import Timestamp
from skep.store.interface import Transaction, View
from skep.store.kinds import previous_registry_auth_id, registry_auth_id

RESTARTED_MAX = 100
"""Services that are restarted with the updates of one: they are written in one transaction with it."""
RESTARTED_BYTES_MAX = 320 << 10
"""Of their specs together, each of which that transaction has three times."""


def check_dependencies(view: View, spec: ServiceSpec) -> None:
    """Raises: InvalidArgument: services would wait for each other, ``spec`` among them, or too many would be restarted
    with one."""
    for one in dependencies_of(spec.labels):
        if one.restarts:
            others = [other for other in _restarted_with(view, one.service) if other.spec.name != spec.name]
            _refuse_many(one.service, [*(other.spec for other in others), spec])
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


def _restarted_with(view: View, name: str) -> list[Service]:
    """The services that are to be restarted with updates of the one with that name."""
    return [
        service
        for service in view.find(Service)
        if service.removed_at is None
        and DEPENDS_ON in service.spec.labels
        and any(one.service == name and one.restarts for one in dependencies_of(service.spec.labels))
    ]


def _refuse_many(name: str, specs: Sequence[ServiceSpec]) -> None:
    """Raises: InvalidArgument."""
    what = f"service {name} restarts {len(specs)} services with its updates (label {DEPENDS_ON})"
    if len(specs) > RESTARTED_MAX:
        raise InvalidArgument(f"{what}: {RESTARTED_MAX} are possible")
    size = sum(len(msgspec.json.encode(spec)) for spec in specs)
    if size > RESTARTED_BYTES_MAX:
        raise InvalidArgument(f"{what}: their specs have {size} bytes, {RESTARTED_BYTES_MAX} are possible")


def restart_dependents(tx: Transaction, changed: Service, template: TaskSpec, now: Timestamp) -> None:
    """Update the services that are to be restarted with updates of ``changed``, as ``--force`` does.

    Their new tasks wait for those of ``changed``, whose tasks become ``template``; if they stay the same, nothing is
    restarted.

    Raises: InvalidArgument: there are too many, as a cluster of an earlier version may have them.
    """
    if is_same_task(changed.spec.task_template, template):
        return
    services = _restarted_with(tx, changed.spec.name)
    _refuse_many(changed.spec.name, [service.spec for service in services])
    for service in services:
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
