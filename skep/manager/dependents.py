"""What a change of one service means for those that depend on it."""

from collections.abc import Collection, Iterable, Sequence

import msgspec
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.manager.job_runs import is_going, next_job
from skep.manager.registry_auth import auth_of, keep_auth
from skep.model.dependencies import DEPENDS_ON, Dependency, dependencies_of
from skep.model.schedules import CRON
from skep.model.service import ENDED, Service, ServiceSpec, TaskSpec
from skep.model.times import Timestamp
from skep.store.interface import Transaction, View
from skep.store.kinds import previous_registry_auth_id, registry_auth_id
from skep.store.schema import UNREAD_UPDATE

RESTARTED_MAX = 100
"""Services that are restarted with the updates of one: they are written in one transaction with it."""
RESTARTED_BYTES_MAX = 320 << 10
"""Of their specs together, each of which that transaction has three times."""


def check_dependencies(view: View, spec: ServiceSpec) -> None:
    """Raises: InvalidArgument: services would wait for each other, ``spec`` among them, or too many would be restarted
    with one."""
    dependencies = dependencies_of(spec.labels)
    restarted = _restarted_with(view, {one.service for one in dependencies if one.restarts})
    sizes = {spec.name: _size_of(spec)}
    for name, services in restarted.items():
        others = [service.spec for service in services if service.spec.name != spec.name]
        _refuse_many(name, [*others, spec], sizes)
    if path := circle(view, spec.name, dependencies):
        raise InvalidArgument(
            f"services cannot wait for each other: {' -> '.join(path)} (label {DEPENDS_ON})"
        )


def requiring(view: View, name: str) -> list[str]:
    """The names of services that require the service ``name``: they would wait for ever if it was gone."""
    return [
        service.spec.name
        for service in view.find(Service)
        if service.removed_at is None and DEPENDS_ON in service.spec.labels
        if any(one.service == name and one.is_required for one in dependencies_of(service.spec.labels))
    ]


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


def reached(view: View, dependencies: Iterable[Dependency]) -> set[str]:
    """Names of the services that these dependencies lead to, directly or not, existing or not."""
    names: set[str] = set()
    pending = [one.service for one in dependencies]
    while pending:
        name = pending.pop()
        if name not in names:
            names.add(name)
            for service in view.find(Service, name=name):
                if service.removed_at is None:
                    pending += [one.service for one in dependencies_of(service.spec.labels)]
    return names


def is_same_task(one: TaskSpec, other: TaskSpec) -> bool:
    """Whether an update from one to the other replaces no task for what it is; another placement may move some."""
    return one == other or (
        (one.force_update, one.container_spec)
        == (other.force_update, other.container_spec)  # usually the difference
        and replace(one, placement=None) == replace(other, placement=None)
    )


def _restarted_with(view: View, names: Collection[str]) -> dict[str, list[Service]]:
    """By name, the services that are to be restarted with updates of the one with that name.

    In one pass, which parses each label once: one label has up to a hundred names, and many services may have it.
    """
    found: dict[str, list[Service]] = {name: [] for name in sorted(names)}
    for service in view.find(Service) if found else ():
        if service.removed_at is None and DEPENDS_ON in service.spec.labels:
            for one in dependencies_of(service.spec.labels):
                if one.restarts and one.service in found:
                    found[one.service].append(service)
    return found


def _refuse_many(name: str, specs: Sequence[ServiceSpec], sizes: dict[str, int]) -> None:
    """Args:
        sizes: of specs that were looked at before, by service name; it gets those of the others.

    Raises: InvalidArgument.
    """
    what = f"service {name} restarts {len(specs)} services with its updates (label {DEPENDS_ON})"
    if len(specs) > RESTARTED_MAX:
        raise InvalidArgument(f"{what}: {RESTARTED_MAX} are possible")
    for spec in specs:
        if spec.name not in sizes:
            sizes[spec.name] = _size_of(spec)
    size = sum(sizes[spec.name] for spec in specs)
    if size > RESTARTED_BYTES_MAX:
        raise InvalidArgument(f"{what}: their specs have {size} bytes, {RESTARTED_BYTES_MAX} are possible")


def _size_of(spec: ServiceSpec) -> int:
    return len(msgspec.json.encode(spec))


def restart_dependents(tx: Transaction, changed: Service, template: TaskSpec, now: Timestamp) -> None:
    """Update the services that are to be restarted with updates of ``changed``, as ``--force`` does.

    Their new tasks wait for those of ``changed``, whose tasks become ``template``; if they stay the same, nothing is
    restarted.

    Raises:
        InvalidArgument: there are too many, as a cluster of an earlier version may have them.
        Unavailable: the present run of one that is a job cannot be read.
    """
    if is_same_task(changed.spec.task_template, template):
        return
    name = changed.spec.name
    services = _restarted_with(tx, {name})[name]
    _refuse_many(name, [service.spec for service in services], {})
    for service in services:
        if service.update_status == UNREAD_UPDATE:
            continue  # which cannot be gone on with, nor hold up this one
        if CRON not in service.spec.labels or is_going(tx, service):  # else there is nothing to restart
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
            job_status=next_job(tx, service, spec, now),
        )
    )
