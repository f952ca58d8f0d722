"""Objects as the API shows them: without what is only ours."""

import asyncio
from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from skep.manager.control.service_form import with_defaults
from skep.manager.control.swarm import frozen_message
from skep.manager.control.tasks import known_status
from skep.model.node import Node, NodeState
from skep.model.service import Service, ServiceStatus
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState
from skep.store.interface import View

_PIECE = 5_000
"""Tasks counted before others get their turn."""


def shown_service(
    service: Service, *, insert_defaults: bool = False, status: ServiceStatus | None = None
) -> Service:
    """``service`` for an answer."""
    return replace(
        service,
        spec=with_defaults(service.spec) if insert_defaults else service.spec,
        spec_version=None,
        service_status=status,
    )


def shown_node(view: View, node: Node) -> Node:
    """``node`` for an answer; one that is down says it, too, when no task is replaced for its sake."""
    status = node.status
    freeze = next((swarm.freeze for swarm in view.find(Swarm)), None)
    if freeze is not None and status.state is NodeState.DOWN:
        status = replace(status, message=f"{status.message}; {frozen_message(freeze)}")
    manager = node.manager_status
    if manager is not None:
        manager = replace(manager, has_vote=True)  # and so left out
    node = replace(node, status=status, manager_status=manager)
    return replace(node, session=None, certificate=None, attachments=(), peer_roots="", silent_since=None)


def shown_swarm(swarm: Swarm) -> Swarm:
    """``swarm`` for an answer."""
    return replace(swarm, rotation=None, freeze=None)


def shown_task(view: View, task: Task) -> Task:
    """``task`` for an answer: as in the engine, only a service's specification says what runs it.

    A task whose node is not heard any more is shown as unknown, never as running.
    """
    return replace(
        task,
        status=known_status(view, task),
        slot=task.shown_slot,
        spec_version=None,
        spec=replace(task.spec, runtime=""),
    )


async def service_status(view: View, service: Service) -> ServiceStatus:
    """How many tasks of ``service`` run, are wanted, and are done.  There may be 100,000: others get their turns.

    Source: swarmkit, manager/controlapi/service.go (ListServiceStatuses).
    """
    iteration = service.job_status.job_iteration if service.job_status is not None else None
    tasks = view.find(Task, service_id=service.id)
    running = wanted = completed = 0
    for start in range(0, len(tasks), _PIECE):
        for task in tasks[start : start + _PIECE]:
            if iteration is not None and task.job_iteration != iteration:
                continue
            state = known_status(view, task).state
            running += state is TaskState.RUNNING
            completed += state is TaskState.COMPLETE
            wanted += _is_wanted(task)
        await asyncio.sleep(0)
    mode = service.spec.mode
    if mode.replicated is not None:
        wanted = service.spec.replicas
    elif mode.replicated_job is not None:
        wanted = mode.replicated_job.max_concurrent or 0
    return ServiceStatus(
        running_tasks=running,
        desired_tasks=wanted,
        completed_tasks=completed if iteration is not None else 0,
    )


def _is_wanted(task: Task) -> bool:
    """Whether a global service still counts on ``task``."""
    if task.desired_state is TaskState.COMPLETE:
        return task.status.state is not TaskState.COMPLETE
    return task.desired_state is TaskState.RUNNING


def has_labels(labels: Mapping[str, str], wanted: Iterable[str]) -> bool:
    """Whether ``labels`` have all of ``wanted``, each ``name`` or ``name=value``; no value means any.

    Source: swarmkit, manager/controlapi/common.go (filterMatchLabels).
    """
    for word in wanted:
        name, _, value = word.partition("=")
        if name not in labels or (value and labels[name] != value):
            return False
    return True
