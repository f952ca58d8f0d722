"""Decides whether an old task of a service holds something that a new task of the same service was refused."""

from msgspec.structs import replace

from skep.manager.orchestrator.decision_inputs import Situation
from skep.manager.orchestrator.unplaceable import is_large_enough
from skep.model.needs import Holdings, Needs, holds_of, host_ports, may_block, needs_of
from skep.model.node import Node
from skep.model.node_reports.node_refusals import FREED, NodeRefusal, node_refusals_in
from skep.model.options.constraints import is_satisfied
from skep.model.options.dependencies import WAITS_FOR
from skep.model.service import ServiceSpec
from skep.model.task import Task, TaskState


def holds(old: Task, task: Task, situation: Situation) -> bool:
    """Return whether ``old`` has a node and ``task`` was refused something that ``old`` holds."""
    return old.is_active and old.status.state >= TaskState.ASSIGNED and blocks(old, task, situation)


def blocks(serving: Task, task: Task, situation: Situation) -> bool:
    """Return whether ``task`` was refused an address or a node, and needs something that ``serving`` holds."""
    if not task.status.err or task.status.err.startswith(WAITS_FOR):
        return False
    if task.status.state is TaskState.NEW:
        return bool(serving.networks_attachments)
    if task.status.state is not TaskState.PENDING:
        return False
    if not _may_succeed(serving, task, situation):
        return False
    held = holds_of(serving, host_ports(situation.spec_of(serving)))
    needs, node = needs_of(spec_of(task, situation)), situation.node_of(serving)
    if node is not None and not is_large_enough(node, needs):
        # Only a volume can be used on another node.
        held = Holdings(
            service_id=held.service_id,
            nano_cpus=0,
            memory_bytes=0,
            generic=(),
            host_ports=(),
            is_active=False,
            volumes=held.volumes,
        )
    return may_block(held, needs, situation.volume)


def excludes(serving: Task, task: Task, situation: Situation) -> bool:
    """Return whether every node refused ``task``, which could use the node of ``serving`` only after the end of
    ``serving``.

    Both are tasks of one service.  Two tasks cannot share a host port, and a node cannot have more tasks of the service
    than its spec allows.
    """
    if task.status.state is not TaskState.PENDING or not task.status.err:
        return False
    if task.status.err.startswith(WAITS_FOR) or not _may_succeed(serving, task, situation):
        return False
    needs = needs_of(spec_of(task, situation))
    if not _is_refused_place(task, needs, situation.node_of(serving)):
        return False
    has_same_port = not set(host_ports(situation.spec_of(serving))).isdisjoint(needs.host_ports)
    is_refused = NodeRefusal.MAX_REPLICAS in node_refusals_in(task.status.err)
    is_full = needs.max_replicas == 1 or (needs.max_replicas > 1 and is_refused)
    return has_same_port or is_full


def _is_refused_place(task: Task, needs: Needs, node: Node | None) -> bool:
    """Return whether the refusal of ``task`` may be resolved by the end of a task on ``node``."""
    named = FREED & node_refusals_in(task.status.err)
    if node is not None and not is_large_enough(node, needs):
        named -= {NodeRefusal.RESOURCES}
    return bool(named)


def _may_succeed(serving: Task, task: Task, situation: Situation) -> bool:
    """Return whether the node of ``serving`` meets the constraints of ``task``.  Otherwise the end of ``serving`` does
    not help ``task``.
    """
    node = situation.node_of(serving)
    placement = task.spec.placement
    return node is None or placement is None or is_satisfied(placement.constraints, node)


def spec_of(task: Task, situation: Situation) -> ServiceSpec:
    """Return the spec that ``task`` was made from, or the service's spec with the task's template if it is deleted."""
    return situation.spec_of(task) or replace(situation.service.spec, task_template=task.spec)
