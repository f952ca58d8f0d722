"""Rules on objects: no used one is removed, and at rest the live objects bound the number of all others."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import partial

from sim.invariants.committed import Change
from skep.manager.orchestrator.reaper.history import DEFAULT_LIMIT, history_limit
from skep.manager.orchestrator.reaper.state import unreported
from skep.model.container import SecretReference
from skep.model.node import Node
from skep.model.secret import Secret
from skep.model.service import Service, TaskSpec
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.values.ids import ServiceId, TaskId
from skep.model.volume import Volume
from skep.store.interface import Deleted, View
from skep.store.kinds import Payload, SpecVersion

EXTRA = 8
"""Tasks of one slot in addition to its history limit: the desired task, a stopping task, and a task that decides on the
update.
"""


def used_secrets_stay(change: Change, view: View) -> Iterable[str]:
    """Yield the removed secrets that a service uses, or the current run of a job, which keeps the spec of its start."""
    gone = {
        one.object.id for one in change.events if isinstance(one, Deleted) and isinstance(one.object, Secret)
    }
    if not gone:
        return
    for service in view.find(Service):
        if service.removed_at is not None:
            continue
        used = [(one, "it") for one in secrets_of(service.spec.task_template)]
        for task in view.find(Task, service_id=service.id):
            if task.job_iteration is not None and task.is_active and task.is_wanted:
                used += [(one, f"task {task.id} of its run") for one in secrets_of(task.spec)]
        for one, user in used:
            if one.secret_id in gone:
                yield f"secret {one.secret_name} of {service.spec.name} was removed, and {user} uses it"


def secrets_of(spec: TaskSpec) -> Sequence[SecretReference]:
    """Return the secrets that a task needs."""
    return spec.container_spec.secrets if spec.container_spec is not None else ()


def unbounded_objects(view: View) -> Iterable[str]:
    """Yield leftovers of a cluster at rest, in which services, slots and nodes limit the number of objects."""
    yield from _tasks(view)
    yield from _versions(view)
    yield from _others(view)


def _tasks(view: View) -> Iterable[str]:
    limit = max(
        (one.spec.orchestration.task_history_retention_limit or 0 for one in view.find(Swarm)),
        default=DEFAULT_LIMIT,
    )
    for service in view.find(Service):
        tasks = view.find(Task, service_id=service.id)
        per_slot = history_limit(service, limit) + EXTRA
        sizes = Counter(task.slot or task.node_id for task in tasks)
        for slot, size in sizes.items():
            if size > per_slot:
                yield f"slot {service.id}/{slot} has {size} tasks, more than {per_slot}"
        gone = [
            task.id
            for task in tasks
            if not task.slot and task.node_id and view.lookup(Node, task.node_id) is None
        ]
        if gone:
            yield f"{len(gone)} tasks of {service.spec.name} are of slots of removed nodes: {gone[0]}"
        slots = _slots(service)
        waiting = _waiting(view, service, tasks)
        used = {task.slot or task.node_id for task in tasks if task.id not in waiting}
        if slots is not None and len(used) > slots:
            yield f"{service.spec.name} has {len(used)} slots with tasks, not {slots}"
    for task in view.find(Task):
        if task.service_id and view.lookup(Service, task.service_id) is None:
            yield f"task {task.id} is of a service that is gone"


def _waiting(view: View, service: Service, tasks: Sequence[Task]) -> Collection[TaskId]:
    """Return tasks that are kept until their node has reported their data."""
    of_slot: dict[int, list[Task]] = {}
    for task in tasks:
        of_slot.setdefault(task.slot, []).append(task)
    found = (unreported(slot, service, partial(view.lookup, Node)) for slot in of_slot.values())
    return {id for one in found for id in one}


def _slots(service: Service) -> int | None:
    """Return the number of slots, or None if it depends on the nodes."""
    mode, job = service.spec.mode, service.spec.mode.replicated_job
    if service.removed_at is not None or service.job_status is not None or job is not None:
        return None  # earlier runs of the job may have had more
    return service.spec.replicas if mode.global_ is None else None


def _versions(view: View) -> Iterable[str]:
    for version in view.find(SpecVersion):
        service = view.lookup(Service, version.service_id)
        if service is None:
            yield f"spec {version.id} is of a service that is gone"
            continue
        pinned = service.job_status.spec_version if service.job_status is not None else None
        used = {task.spec_version for task in view.find(Task, service_id=service.id)}
        if version.index not in {
            one.index for one in (*used, service.spec_version, pinned) if one is not None
        }:
            yield f"spec {version.id} is used by no task"


def _others(view: View) -> Iterable[str]:
    for payload in view.find(Payload):
        kind, _, owner = payload.id.partition("/")
        if kind.startswith("registry") and view.lookup(Service, ServiceId(owner)) is None:
            yield f"payload {payload.id} is of a service that is gone"
    for volume in view.find(Volume):
        for one in volume.publish_status:
            if view.lookup(Node, one.node_id) is None:
                yield f"volume {volume.id} is published on a node that is gone"
