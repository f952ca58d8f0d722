"""What the old tasks of a service hold that a new one of the same service was refused."""

from msgspec.structs import replace

from skep.manager.orchestrator.situation import Situation
from skep.model.constraints import is_satisfied
from skep.model.dependencies import WAITS_FOR
from skep.model.needs import holds_of, host_ports, may_block, needs_of
from skep.model.service import ServiceSpec
from skep.model.task import Task, TaskState

_IS_FULL = "max replicas per node"
"""Words of the scheduler's refusal for nodes that have as many tasks of the service as they may have."""


def holds(old: Task, task: Task, situation: Situation) -> bool:
    """Whether ``old`` has a node, and ``task`` was refused something of what it holds."""
    return old.is_active and old.status.state >= TaskState.ASSIGNED and blocks(old, task, situation)


def blocks(serving: Task, task: Task, situation: Situation) -> bool:
    """Whether ``task`` was refused an address or a node, and ``serving`` holds something of what it needs."""
    if not task.status.err or task.status.err.startswith(WAITS_FOR):
        return False
    if task.status.state is TaskState.NEW:
        return bool(serving.networks_attachments)
    if task.status.state is not TaskState.PENDING:
        return False
    if not _may_succeed(serving, task, situation):
        return False
    held = holds_of(serving, host_ports(situation.spec_of(serving)))
    return may_block(held, needs_of(_spec_of(task, situation)), situation.volume)


def excludes(serving: Task, task: Task, situation: Situation) -> bool:
    """Whether ``task`` was refused every node, and can have that of ``serving``, of its own service, only after it.

    Two tasks cannot have one host port, nor a node more tasks of the service than its spec allows.
    """
    if task.status.state is not TaskState.PENDING or not task.status.err:
        return False
    if task.status.err.startswith(WAITS_FOR) or not _may_succeed(serving, task, situation):
        return False
    needs = needs_of(_spec_of(task, situation))
    has_same_port = not set(host_ports(situation.spec_of(serving))).isdisjoint(needs.host_ports)
    is_full = needs.max_replicas == 1 or (needs.max_replicas > 1 and _IS_FULL in task.status.err)
    return has_same_port or is_full


def _may_succeed(serving: Task, task: Task, situation: Situation) -> bool:
    """Whether the node of ``serving`` meets the constraints of ``task``: otherwise its end frees no place for it."""
    node = situation.node_of(serving)
    placement = task.spec.placement
    return node is None or placement is None or is_satisfied(placement.constraints, node)


def _spec_of(task: Task, situation: Situation) -> ServiceSpec:
    return situation.spec_of(task) or replace(situation.service.spec, task_template=task.spec)
