"""Effects of a service's change on the services that depend on it.

A service name belongs to one service, however it is written, so names are compared in lower case.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

import msgspec
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.manager.services.job_runs import is_going, next_job
from skep.manager.services.registry_auth import auth_of, keep_auth
from skep.model.options.affinity import (
    AFFINITY,
    ANTI_AFFINITY,
    DeclaredAffinities,
    affinities_of,
    has_affinities,
    is_opposite,
)
from skep.model.options.autoscaling import AUTOSCALE, may_be_at_zero
from skep.model.options.dependencies import DEPENDS_ON, Dependency, dependencies_of
from skep.model.options.schedules import CRON
from skep.model.service import ENDED, PAUSED, Service, ServiceSpec, TaskSpec
from skep.model.staging.updates import is_undecided, status_after
from skep.model.values.counts import counted
from skep.model.values.times import Timestamp
from skep.store.interface import Transaction, View
from skep.store.kinds import previous_registry_auth_id, registry_auth_id
from skep.store.schema import UNREAD_UPDATE

RESTARTED_MAX = 100
"""Largest number of services that one service's update restarts, because the update's transaction writes them."""
RESTARTED_BYTES_MAX = 320 << 10
"""Largest total size of the restarted services' specs in bytes.  The transaction contains each spec three times."""


def check_dependencies(view: View, spec: ServiceSpec) -> None:
    """Refuse a spec whose dependencies form a cycle, restart too many services, or may be scaled to zero.

    Raises: InvalidArgument.
    """
    dependencies = dependencies_of(spec.labels)
    restarted = _restarted_with(view, {one.service for one in dependencies if one.restarts})
    sizes = {spec.name: _size_of(spec)}
    for name, services in restarted.items():
        others = [service.spec for service in services if service.spec.name != spec.name]
        _refuse_many(name, [*others, spec], sizes)
    if path := circle(view, spec.name, dependencies):
        raise InvalidArgument(
            f"services cannot depend on each other in a cycle: {' -> '.join(path)} (label {DEPENDS_ON})"
        )
    _check_zero(view, spec, dependencies)
    if has_affinities(spec.labels):
        _check_affinities(view, spec)
    waits = [one for one in (*dependencies, *_affinity_waits(spec)) if one.key != spec.name.lower()]
    if waits and (path := circle(view, spec.name, waits, _waits_of)):
        raise InvalidArgument(
            f"no task of these services could start first: {' -> '.join(path)} (labels {AFFINITY} and {DEPENDS_ON})"
        )


def _check_zero(view: View, spec: ServiceSpec, dependencies: Iterable[Dependency]) -> None:
    """Refuse a dependency that may be scaled to zero, because only requests at the front door would start its task.

    Raises: InvalidArgument.
    """
    pairs = [(spec, other) for other in requiring(view, spec.name)] if may_be_at_zero(spec.labels) else []
    pairs += [
        (service.spec, spec.name)
        for one in dependencies
        if one.is_required
        for service in view.find(Service, name=one.service)
        if service.removed_at is None and may_be_at_zero(service.spec.labels)
    ]
    for needed, dependent in pairs:
        given = needed.labels[AUTOSCALE]
        raise InvalidArgument(
            f"{dependent} depends on {needed.name} (label {DEPENDS_ON}), which {AUTOSCALE}={given} may leave without "
            f"a task: use {AUTOSCALE}=1..{given.partition('..')[2]}, or remove the dependency"
        )


def _check_affinities(view: View, spec: ServiceSpec) -> None:
    """Refuse affinities with which no task could ever start, because of other services.  Raises: InvalidArgument."""
    own = affinities_of(spec.labels)
    for name in sorted({one.key for one in (*own.near, *own.apart)} - {spec.name.lower()}):
        for service in view.find(Service, name=name):
            other = affinities_of(service.spec.labels) if service.removed_at is None else DeclaredAffinities()
            pairs = [(near, apart) for near in own.near if near.key == name for apart in other.apart]
            pairs += [(near, apart) for apart in own.apart if apart.key == name for near in other.near]
            for near, apart in pairs:
                if spec.name.lower() in (near.key, apart.key) and is_opposite(near.topology, apart.topology):
                    raise InvalidArgument(
                        f"the affinities of {spec.name} and {service.spec.name} contradict each other: "
                        f"{AFFINITY}={near.text} and {ANTI_AFFINITY}={apart.text}"
                    )


def _waits_of(spec: ServiceSpec) -> tuple[Dependency, ...]:
    """Return the services without whose tasks no task of ``spec`` can start."""
    return (*dependencies_of(spec.labels), *_affinity_waits(spec))


def _affinity_waits(spec: ServiceSpec) -> list[Dependency]:
    """Return the other services near whose tasks the tasks of ``spec`` have to start."""
    near = affinities_of(spec.labels).near
    return [Dependency(one.service) for one in near if one.key != spec.name.lower()]


def requiring(view: View, name: str) -> list[str]:
    """Return the names of the services that would wait forever without the service ``name``."""
    key = name.lower()
    return [
        service.spec.name
        for service in view.find(Service)
        if service.removed_at is None and DEPENDS_ON in service.spec.labels
        if any(one.key == key and one.is_required for one in dependencies_of(service.spec.labels))
    ]


def circle(
    view: View,
    name: str,
    dependencies: Iterable[Dependency],
    waits_of: Callable[[ServiceSpec], Iterable[Dependency]] = lambda spec: dependencies_of(spec.labels),
) -> list[str]:
    """Return the service names on a dependency cycle through service ``name``, or an empty list without a cycle.

    Args:
        waits_of: Returns the dependencies of another service's spec.
    """
    key = name.lower()
    reached_by: dict[str, str] = {}
    pending = [(name, one.service) for one in dependencies]
    while pending:
        before, reached = pending.pop()
        if reached.lower() == key:
            path = [name, before]
            while path[-1].lower() != key:
                path.append(reached_by[path[-1].lower()])
            return path[::-1]
        if reached.lower() not in reached_by:
            reached_by[reached.lower()] = before
            pending += [
                (reached, one.service)
                for service in view.find(Service, name=reached)
                if service.removed_at is None
                for one in waits_of(service.spec)
            ]
    return []


def reached(view: View, dependencies: Iterable[Dependency]) -> set[str]:
    """Return the names of all direct and indirect dependencies in lower case, whether or not those services exist."""
    names: set[str] = set()
    pending = [one.service for one in dependencies]
    while pending:
        name = pending.pop().lower()
        if name not in names:
            names.add(name)
            for service in view.find(Service, name=name):
                if service.removed_at is None:
                    pending += [one.service for one in dependencies_of(service.spec.labels)]
    return names


def is_same_task(one: TaskSpec, other: TaskSpec) -> bool:
    """Return whether an update from ``one`` to ``other`` replaces no task because of its content.

    A changed placement may still move tasks.
    """
    return one == other or (
        (one.force_update, one.container_spec)
        == (other.force_update, other.container_spec)  # checked first: these fields usually differ
        and replace(one, placement=None) == replace(other, placement=None)
    )


def _restarted_with(view: View, names: Collection[str]) -> dict[str, list[Service]]:
    """Return for each name, in lower case, the services that restart when the service of that name is updated.

    One pass parses each label once, because many services may have a label with up to a hundred names.
    """
    found: dict[str, list[Service]] = {name.lower(): [] for name in sorted(names)}
    for service in view.find(Service) if found else ():
        if service.removed_at is None and DEPENDS_ON in service.spec.labels:
            for one in dependencies_of(service.spec.labels):
                if one.restarts and one.key in found:
                    found[one.key].append(service)
    return found


def _refuse_many(name: str, specs: Sequence[ServiceSpec], sizes: dict[str, int]) -> None:
    """Raise InvalidArgument if the update of service ``name`` would restart too many services.

    Args:
        sizes: Spec sizes by service name.  Missing sizes are computed and added.
    """
    what = f"updates of service {name} would restart {counted(len(specs), 'service')} (label {DEPENDS_ON})"
    if len(specs) > RESTARTED_MAX:
        raise InvalidArgument(f"{what}: at most {RESTARTED_MAX} are allowed")
    for spec in specs:
        if spec.name not in sizes:
            sizes[spec.name] = _size_of(spec)
    size = sum(sizes[spec.name] for spec in specs)
    if size > RESTARTED_BYTES_MAX:
        raise InvalidArgument(
            f"{what}: their specs have {size} bytes, at most {RESTARTED_BYTES_MAX} are allowed"
        )


def _size_of(spec: ServiceSpec) -> int:
    return len(msgspec.json.encode(spec))


def restart_dependents(tx: Transaction, changed: Service, template: TaskSpec, now: Timestamp) -> None:
    """Restart the services that restart with updates of ``changed``, as ``docker service update --force`` does.

    Their new tasks wait for the new tasks of ``changed``, which are created from ``template``.  If ``template`` does
    not change the tasks, nothing is restarted.

    Raises:
        InvalidArgument: Too many services would be restarted.  A cluster of an earlier version may have so many.
        Unavailable: The current run of a dependent job cannot be read.
    """
    if is_same_task(changed.spec.task_template, template):
        return
    name = changed.spec.name
    services = _restarted_with(tx, {name})[name.lower()]
    _refuse_many(name, [service.spec for service in services], {})
    for service in services:
        if service.update_status == UNREAD_UPDATE:
            continue  # Its unreadable update cannot be resumed, but must not block this one.
        # A scheduled job without an active run has nothing to restart.
        if CRON not in service.spec.labels or is_going(tx, service):
            _restart(tx, service, now)


def _restart(tx: Transaction, service: Service, now: Timestamp) -> None:
    """Replace the service's tasks.  If it has an unfinished update, that keeps its paused state and its rollback
    target.  A staged update begins again with its first step, and keeps the old tasks.
    """
    template = service.spec.task_template
    spec = replace(service.spec, task_template=replace(template, force_update=template.force_update + 1))
    status, previous = service.update_status, service.previous_spec
    begun = status_after(service, spec, now) if is_undecided(service) and service.spec.replicas else None
    if status is not None and begun is not None:
        is_paused = status.state in PAUSED
        is_over, status = (
            False,
            replace(begun, state=status.state, message=status.message) if is_paused else begun,
        )
    elif status is not None:
        is_over = status.state in ENDED
        status = replace(
            status, started_at=now
        )  # the store drops the update status of a changed spec unless both are written together
    else:  # no update changed the tasks, or the leader has not started it yet
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
