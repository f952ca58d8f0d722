"""Rules on objects: used ones exist, and services, slots and nodes bound the number of all others."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial

from skep.manager.orchestrator.reaper.history import DEFAULT_LIMIT, attempts_kept, history_limit
from skep.manager.orchestrator.reaper.state import unreported
from skep.manager.verify.rules import InvariantViolation
from skep.model.container import ContainerSpec
from skep.model.node import Node, NodeState
from skep.model.secret import Config, Secret
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.values.counts import counted
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.volume import Volume
from skep.store.interface import View
from skep.store.kinds import Payload, SpecVersion, as_before_update, unused_versions

EXTRA = 8
"""Tasks of one slot in addition to its history limit: the desired task, a stopping task, and a task that decides on the
update.
"""


def history_limit_of(view: View) -> int:
    """Return how many ended tasks a slot keeps.  A negative number keeps all."""
    limits = (one.spec.orchestration.task_history_retention_limit for one in view.find(Swarm))
    limit = next(limits, None)
    return DEFAULT_LIMIT if limit is None else limit


def leftover_tasks(
    service: Service, tasks: Sequence[Task], limit: int, view: View, down: Collection[NodeId] = ()
) -> Iterator[InvariantViolation]:
    """Yield the tasks of a service at rest that the history does not keep.

    Args:
        down: Nodes that are down.  Their tasks do not count, because they are kept until their end is known.
    """
    if down:
        tasks = [one for one in tasks if one.node_id not in down]
    if limit >= 0:
        per_slot = history_limit(service, limit) + EXTRA
        if service.old_version is not None:  # restarts of old and of new tasks are counted
            per_slot += attempts_kept(as_before_update(view, service))
        sizes = Counter(task.slot or task.node_id for task in tasks)
        for slot, size in sizes.items():
            if size > per_slot:
                text = f"slot {service.id}/{slot} has {size} tasks, more than {per_slot}"
                yield InvariantViolation("leftover", text, (service,))
    gone = [
        task for task in tasks if not task.slot and task.node_id and view.lookup(Node, task.node_id) is None
    ]
    if gone:
        text = f"{service.spec.name} has {counted(len(gone), 'task')} in slots of removed nodes: {gone[0].id}"
        yield InvariantViolation("leftover", text, tuple(gone))
    slots = _slots(service)
    if slots is not None and len({task.slot or task.node_id for task in tasks}) > slots:
        waiting = _waiting(view, service, tasks)
        used = {task.slot or task.node_id for task in tasks if task.id not in waiting}
        if len(used) > slots:
            text = f"{service.spec.name} has {len(used)} slots with tasks, not {slots}"
            yield InvariantViolation("leftover", text, (service,))


def ownerless_task(task: Task, view: View) -> Iterator[InvariantViolation]:
    """Yield a task of a service that does not exist."""
    if task.service_id and view.lookup(Service, task.service_id) is None:
        yield InvariantViolation("leftover", f"task {task.id} is of a service that is gone", (task,))


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


def unused_version(version: SpecVersion, view: View) -> Iterator[InvariantViolation]:
    """Yield a stored spec that no task was made from."""
    service = view.lookup(Service, version.service_id)
    if service is None:
        yield InvariantViolation("leftover", f"spec {version.id} is of a service that is gone", (version,))
        return
    if unused_versions(service, (version,), view.find(Task, service_id=service.id)):
        yield InvariantViolation("leftover", f"spec {version.id} is used by no task", (version,))


def other_leftovers(view: View) -> Iterator[InvariantViolation]:
    """Yield records of removed services and nodes."""
    for payload in view.find(Payload):
        kind, _, owner = payload.id.partition("/")
        if kind.startswith("registry") and view.lookup(Service, ServiceId(owner)) is None:
            yield InvariantViolation(
                "leftover", f"payload {payload.id} is of a service that is gone", (payload,)
            )
    for volume in view.find(Volume):
        for one in volume.publish_status:
            if view.lookup(Node, one.node_id) is None:
                text = f"volume {volume.id} is published on a node that is gone"
                yield InvariantViolation("leftover", text, (volume,))


def leftovers(view: View) -> Iterator[InvariantViolation]:
    """Yield all leftovers of a cluster at rest, in which services, slots and nodes limit the number of objects."""
    limit = history_limit_of(view)
    down = {one.id for one in view.find(Node) if one.status.state is NodeState.DOWN}
    for service in view.find(Service):
        yield from leftover_tasks(service, view.find(Task, service_id=service.id), limit, view, down)
    for task in view.find(Task):
        yield from ownerless_task(task, view)
    for version in view.find(SpecVersion):
        yield from unused_version(version, view)
    yield from other_leftovers(view)


def missing_files(service: Service, tasks: Iterable[Task], view: View) -> Iterator[InvariantViolation]:
    """Yield the secrets and configs that a service uses, or the current run of a job, and that do not exist.

    The run keeps the spec of its start.
    """
    if service.removed_at is not None:
        return
    templates = [(service.spec.task_template, "it")]
    templates += [
        (task.spec, f"task {task.id} of its run")
        for task in tasks
        if task.job_iteration is not None and task.is_active and task.is_wanted
    ]
    for template, user in templates:
        container = template.container_spec or ContainerSpec()
        used: list[tuple[type[Secret | Config], str, str]] = [
            *((Secret, one.secret_id, one.secret_name) for one in container.secrets),
            *((Config, one.config_id, one.config_name) for one in container.configs),
        ]
        for kind, id, name in used:
            if view.lookup(kind, id) is None and id not in view.unreadable(kind):
                words = f"{kind.__name__.lower()} {name} of {service.spec.name}"
                yield InvariantViolation(
                    "reference", f"{words} was removed, and {user} uses it", (service,), (id,)
                )
