"""The state that a service has to reach after the last fault, whatever happened before.

Every slot has a running task of the requested image on a suitable node.  A task may be pending if no node can take it
because of its constraints, a port or the limit of replicas per node.  Every run of a job is completed.  With an image
that never works there are as many attempts as slots, and an update to it ends.

An update waits until its progress deadline for as many pending tasks as its parallelism.  Slots that it has not
reached keep their tasks meanwhile.  So does a slot whose new task was prepared by an earlier update.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import TypeAlias

from sim.invariants.nodes.placement import completed_on, is_unplaceable, may_have_tasks, meets
from sim.invariants.services.dependencies import missing_dependencies
from sim.invariants.services.serving import config_of
from sim.world.images import HOPELESS, image_of, program_of
from skep.manager.services.job_runs import is_over, nodes_of
from skep.model.node import Node
from skep.model.options.labels import PROGRESS_DEADLINE, min_available
from skep.model.options.overlap import written_data
from skep.model.options.schedules import CRON
from skep.model.service import UNDER_WAY, Service, UpdateState
from skep.model.staging.updates import is_undecided
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from skep.model.values.times import ZERO_TIME, unix_ns
from skep.store.interface import View

Slot: TypeAlias = list[Task]
"""Tasks of a slot with a desired state of at most running."""
_PAUSED = (UpdateState.PAUSED, UpdateState.ROLLBACK_PAUSED)


def unmet(view: View, service: Service, given_up: int = 0) -> Iterable[str]:
    """Yield the differences between a service and its spec.

    Args:
        given_up: number of slots whose tasks have ended and whose restart policy allows no further task.
    """
    if service.removed_at is not None:
        yield f"{service.id} is not gone"
    elif service.job_status is not None:
        yield from _unmet_of_job(view, service)
    else:
        yield from _unmet_of_service(view, service, given_up)


def _unmet_of_service(view: View, service: Service, given_up: int) -> Iterable[str]:
    wanted = [task for task in view.find(Task, service_id=service.id) if task.is_wanted]
    slots = _by_slot(wanted)
    nodes = _eligible(view, service)
    number = len(nodes) if service.spec.mode.global_ is not None else service.spec.replicas
    if not number - given_up <= len(slots) <= number:
        yield f"{service.id} has {len(slots)} slots of {number}"
        return
    container, status = service.spec.task_template.container_spec, service.update_status
    is_under_way = status is not None and status.state in UNDER_WAY
    # Without replicas, no task can be judged, so the step of a canary lasts until the service has some.
    stays = not number and is_undecided(service)
    if container is None or program_of(container) in HOPELESS:
        has_begun = not any(missing_dependencies(service, view))
        if is_under_way and not stays and has_begun and PROGRESS_DEADLINE in service.spec.labels:
            yield f"the update of {service.id} to {container and program_of(container)} does not end"
        return
    for task in wanted:
        node = view.lookup(Node, task.node_id)
        placement = task.spec.placement
        if node is None or meets(placement.constraints if placement is not None else (), node):
            continue
        if not _keeps_tasks(service, wanted, view):
            yield f"task {task.id} of {service.id} is on {node.id}, which does not meet its constraints"
    if status is not None and status.state in _PAUSED:
        lacking = [
            task
            for task in wanted
            if image_of(task) not in HOPELESS
            and not _is_satisfied(task, service, view)
            and not _is_prepared_beside(slots[task.slot or task.node_id], task)
        ]
        if lacking:
            yield f"{service.id}: {[task.id for task in lacking]} do not run, its update is paused"
        return
    yield from _crowded(service, wanted)
    waiting = [task for task in wanted if _waits(task, service, view)]
    if is_under_way and not waiting and not stays:
        yield f"{service.id} is still being updated"
    is_held_up = is_under_way and bool(waiting)
    for key, slot in slots.items():
        if is_held_up and (
            (len(slot) == 1 and _runs(slot[0]))
            or _waits_for_its_turn(slot, slots, waiting, service)
            or _runs_both_versions(slot, service)
        ):
            # not updated yet, because the update waits for as many unplaceable tasks as its parallelism allows
            continue
        if any(map(_runs, slot)) and _keeps_tasks(service, wanted, view):
            continue
        right = [task for task in slot if _runs(task) and image_of(task) == program_of(container)]
        if not (right and len(slot) == 1) and not any(task in waiting for task in slot):
            yield f"slot {key} of {service.id} does not run {program_of(container)}: {[_told(task) for task in slot]}"


def _keeps_tasks(service: Service, wanted: Iterable[Task], view: View) -> bool:
    """Return whether the budget may keep running tasks of an earlier spec, or on a node that does not fit."""
    minimum = min_available(service.spec.labels, service.spec.replicas)
    if service.spec.mode.replicated is None or not minimum:
        return False
    is_kept = minimum >= service.spec.replicas and bool(written_data(service.spec.task_template))
    return is_kept or any(_waits(task, service, view) for task in wanted)


def _waits_for_its_turn(
    slot: Slot, slots: Mapping[int | NodeId, Slot], waiting: Collection[Task], service: Service
) -> bool:
    """Return whether a slot has a running task and prepared successors, and the update may stop no further slot.

    The slots that the update may stop have no running task, because no node can take their new tasks.  A scale-up may
    have created these slots.
    """
    others = [task for task in slot if not _runs(task)]
    are_prepared = all(_is_prepared_beside(slot, task) for task in others)
    idle = [
        one for one in slots.values() if any(task in waiting for task in one) and not any(map(_runs, one))
    ]
    return len(others) < len(slot) and are_prepared and 0 < config_of(service).parallelism <= len(idle)


def _runs_both_versions(slot: Slot, service: Service) -> bool:
    """Return whether a slot has its old and its new task, as in each slot of a blue-green update until it switches."""
    status = service.update_status
    return status is not None and status.split is not None and len(slot) == 2 and all(map(_runs, slot))


def _is_prepared_beside(slot: Slot, task: Task) -> bool:
    """Return whether ``task`` is prepared while a task of its slot runs, or waits for something that this one holds."""
    is_prepared = task.desired_state is TaskState.READY and task.status.state in (
        TaskState.PENDING,
        TaskState.READY,
    )
    return is_prepared and any(map(_runs, slot))


def _crowded(service: Service, wanted: Iterable[Task]) -> Iterable[str]:
    placement = service.spec.task_template.placement
    # A global service's task has a node id before it is assigned.
    copies = Counter(task.node_id for task in wanted if task.status.state >= TaskState.ASSIGNED)
    if (
        placement is not None
        and placement.max_replicas
        and max(copies.values(), default=0) > placement.max_replicas
    ):
        yield f"{service.id} has {dict(copies)} copies, {placement.max_replicas} may be on a node"


def _unmet_of_job(view: View, service: Service) -> Iterable[str]:
    """Yield what a job lacks: runs that can succeed but have not completed, or the end of tasks of earlier
    iterations.
    """
    status, container = service.job_status, service.spec.task_template.container_spec
    assert status is not None
    tasks = view.find(Task, service_id=service.id)
    if any(task.is_active and task.job_iteration != status.job_iteration for task in tasks):
        yield f"an earlier run of {service.id} goes on"
    if container is None or program_of(container) in HOPELESS or status.awaits_first_run:
        return
    policy = service.spec.task_template.restart_policy
    if CRON in service.spec.labels or (policy is not None and policy.max_attempts):
        return  # the current run may be of an earlier spec, or partly given up
    present = [task for task in tasks if task.job_iteration == status.job_iteration]
    if any(_waits(task, service, view) for task in present if task.is_active):
        return  # a pending task may use up the job's concurrency
    if (job := service.spec.mode.replicated_job) is not None:
        done = {task.slot for task in present if task.status.state is TaskState.COMPLETE}
        if len(done) != job.total_completions:
            yield f"of {service.id} {len(done)} of {job.total_completions} runs are completed"
        return
    if is_over(service):
        return
    completed = completed_on(view, service, status.job_iteration)
    asked_at = unix_ns(status.last_execution or ZERO_TIME)
    for node in nodes_of(service, tasks, _eligible(view, service)):
        # A node's timestamps may say that it joined after the job was created, if a clock was set back in between.
        if not completed[node.id] and unix_ns(node.created_at) < asked_at:
            yield f"{service.id} has not run on {node.id}"


def _eligible(view: View, service: Service) -> list[Node]:
    return [node for node in view.find(Node) if may_have_tasks(node, service.spec)]


def _by_slot(tasks: Iterable[Task]) -> Mapping[int | NodeId, Slot]:
    slots: dict[int | NodeId, Slot] = {}
    for task in tasks:
        slots.setdefault(task.slot or task.node_id, []).append(task)
    return slots


def _is_satisfied(task: Task, service: Service, view: View) -> bool:
    return _runs(task) or _waits(task, service, view)


def _runs(task: Task) -> bool:
    return task.status.state is TaskState.RUNNING


def _waits(task: Task, service: Service, view: View) -> bool:
    """Return whether the task has no node because no node can take it or a dependency of its service is not ready."""
    return task.status.state is TaskState.PENDING and (
        is_unplaceable(task, service, view) or any(missing_dependencies(service, view))
    )


def _told(task: Task) -> str:
    return f"{task.id[:6]} {image_of(task)} {task.status.state.value}"
