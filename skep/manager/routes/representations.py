"""API representations of objects, without internal fields."""

from collections.abc import Iterable, Mapping, Sequence
from math import inf

from msgspec import Struct
from msgspec.structs import replace

from skep.api.formats.service_form import with_defaults
from skep.manager.cluster import known_cluster
from skep.manager.control.swarm import frozen_message
from skep.manager.control.tasks import damage_of, known_status, with_damage
from skep.manager.diagnosis.explanations import next_attempt
from skep.manager.diagnosis.reasons import failure_of, last_failure
from skep.manager.orchestrator.reaper.kept_nodes import KeptNodes
from skep.manager.orchestrator.reaper.lost_nodes import is_lost_worker
from skep.model.node import Node, NodeState
from skep.model.node_reports.conditions import condition_messages
from skep.model.options.labels import FORGET_NODES, forget_nodes_s, ignores_paths
from skep.model.service import JobStatus, Service, ServiceStatus, UpdateStatus
from skep.model.swarm import Freeze, Swarm
from skep.model.task import Task
from skep.store.interface import View

_PATHS_SHOWN = 4
"""Largest number of failing paths in a node's status message."""


class Problems(Struct, frozen=True):
    """Problems that a response adds to objects' own fields.

    ``freeze`` is set while the replacement of tasks is frozen.  ``damages`` maps an id to the unreadable parts of its
    object.  ``kept`` maps the id of a lost node to the reason why the leader does not remove it
    (``skep.forget-nodes``).
    """

    freeze: Freeze | None
    damages: Mapping[str, str]
    kept: Mapping[str, str] = {}


def problems_of(view: View, kind: type[Struct]) -> Problems:
    """Return the problems of all objects of ``kind``."""
    swarm = known_cluster(view)
    ids = {*view.damaged(kind), *view.unreadable(kind)}
    return Problems(
        swarm.freeze if swarm is not None else None,
        {id: damage_of(view, kind, id) for id in ids},
        kept_nodes(view, swarm.spec.labels) if kind is Node and swarm is not None else {},
    )


def kept_nodes(view: View, labels: Mapping[str, str]) -> Mapping[str, str]:
    """Return the reasons why lost nodes are not removed, by node, in a cluster with these ``labels``."""
    if FORGET_NODES not in labels or forget_nodes_s(labels) is None:
        return {}
    holdings, lost = KeptNodes(view), filter(is_lost_worker, view.find(Node))
    # Infinity leaves out the reasons that pass with time.
    found = ((node, holdings.reason(node, inf)) for node in lost)
    return {
        node.id: f"not removed by {FORGET_NODES}: {reason} (skep node forget removes it)"
        for node, reason in found
        if reason
    }


def shown_service(
    problems: Problems,
    service: Service,
    *,
    insert_defaults: bool = False,
    status: ServiceStatus | None = None,
) -> Service:
    """Return ``service`` for a response."""
    return replace(
        service,
        spec=with_defaults(service.spec) if insert_defaults else service.spec,
        spec_version=None,
        update_status=_shown_update(service.update_status),
        past_disconnects=(),
        autoscaled=None,
        autoscaling_problem="",
        trusted=None,
        author=None,
        service_status=status,
        job_status=_shown_job(service.job_status),
        damage=problems.damages.get(service.id, ""),
    )


def _shown_job(job: JobStatus | None) -> JobStatus | None:
    if job is None:
        return None
    shown = JobStatus(
        job_iteration=job.job_iteration, last_execution=job.last_execution, schedule=job.schedule
    )
    return job if job == shown else shown


def _shown_update(status: UpdateStatus | None) -> UpdateStatus | None:
    if status is None or (status.tolerated_until is None and status.split is None):
        return status
    return replace(status, tolerated_until=None, split=None)


def shown_node(problems: Problems, node: Node) -> Node:
    """Return ``node`` for a response.

    A node that is down also shows whether replacement is frozen, and why the node is kept.
    """
    status = node.status
    if problems.freeze is not None and status.state is NodeState.DOWN:
        status = replace(status, message=f"{status.message}; {frozen_message(problems.freeze)}")
    is_ready = status.state is NodeState.READY
    more = (
        path_message(node) if is_ready else "",
        *(condition_messages(node.description) if is_ready else ()),
        problems.kept.get(node.id, ""),
        problems.damages.get(node.id, ""),
    )
    if any(more):
        status = replace(status, message="; ".join(filter(None, (status.message, *more))))
    manager = node.manager_status
    if manager is not None:
        manager = replace(manager, has_vote=True, level=0, peer_addr="")  # default values are omitted
    return replace(
        node,
        status=status,
        manager_status=manager,
        session=None,
        certificate=None,
        attachments=(),
        peer_roots="",
        silent_since=node.silent_since if status.state is NodeState.DOWN else None,
        silent_together=False,
        failing_paths=(),
        cut_off=(),
    )


def path_message(node: Node) -> str:
    """Return a ready node's failing paths for its status message, or an empty text."""
    parts: list[str] = []
    if not ignores_paths(node.spec.labels):
        parts += [f"takes no tasks on {one.networks}: {one.summary}" for one in node.cut_off]
    if node.failing_paths:
        parts.append(f"cannot reach {', '.join(one.summary for one in node.failing_paths[:_PATHS_SHOWN])}")
        if len(node.failing_paths) > _PATHS_SHOWN:
            parts[-1] += f" and {len(node.failing_paths) - _PATHS_SHOWN} more"
    return "; ".join(parts)


def shown_swarm(view: View, swarm: Swarm) -> Swarm:
    """Return ``swarm`` for a response."""
    shown = replace(swarm, rotation=None, freeze=None, change_freezes={}, window=None, stack_windows={})
    return replace(shown, damage=damage_of(view, Swarm, swarm.id))


def shown_task(view: View, now_ns: int, task: Task) -> Task:
    """Return ``task`` for a response, without its runtime: as in the engine, only a service's spec has it.

    If its node is down, the task is shown as unknown and never as running.  The error, which ``docker service ps``
    shows, includes the failure before a restart delay, the end of the delay, and the task for which this one was
    preempted.
    """
    task = with_damage(view, task)
    status = known_status(view, task)
    preempted = task.preemption.words if task.preemption is not None else ""
    next = next_attempt(task, now_ns)
    failed = last_failure(task, slot_in(view, task)) if next and not status.err else None
    why = failure_of(failed)[1] if failed is not None else ""
    if more := [words for words in (preempted, why, next) if words]:
        status = replace(status, err="; ".join(filter(None, (status.err, *more))))
    return replace(
        task,
        status=status,
        restart=None,
        preemption=None,
        relocation=None,
        placement_record="",
        slot=task.shown_slot,
        spec_version=None,
        spec=replace(task.spec, runtime=""),
    )


def slot_in(view: View, task: Task) -> Sequence[Task]:
    """Return the tasks in the slot of ``task``, including ``task``."""
    if not task.service_id or not (task.slot or task.node_id):
        return (task,)
    return view.find(Task, slot=f"{task.service_id}/{task.slot or task.node_id}")


def has_labels(labels: Mapping[str, str], wanted: Iterable[str]) -> bool:
    """Return whether ``labels`` have all of ``wanted``.  Each is ``name`` or ``name=value``, and no value means any.

    Source: swarmkit, manager/controlapi/common.go (filterMatchLabels).
    """
    for word in wanted:
        name, _, value = word.partition("=")
        if name not in labels or (value and labels[name] != value):
            return False
    return True
