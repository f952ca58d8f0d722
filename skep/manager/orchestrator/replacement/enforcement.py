"""Finds tasks that must leave a node because the node's labels or resources have changed.

A task must leave if its node no longer meets its constraints, or if the node has less than its tasks have reserved.  In
the latter case the oldest tasks stay.  A paused node keeps its tasks, and another rule moves all tasks of a drained
node.

Differences from swarmkit: such a task is replaced like a task of a drained node (it ends as SHUTDOWN, without the
restart delay), whereas swarmkit sets it to REJECTED while its container still runs.  The choice of the tasks that stay
on an overcommitted node is deterministic.

Source: swarmkit, manager/orchestrator/constraintenforcer/constraint_enforcer.go.
"""

from collections.abc import Collection, Iterable

from skep.manager.orchestrator.slots import age, is_unknown
from skep.manager.services.resources import GenericStock
from skep.model.needs import reservations_of
from skep.model.node import Availability, Node
from skep.model.options.constraints import is_satisfied
from skep.model.service import Resources
from skep.model.task import Task, TaskState
from skep.model.values.ids import TaskId
from skep.model.volume import Volume, VolumeAvailability

_ASSIGNED, _RUNNING = TaskState.ASSIGNED.number, TaskState.RUNNING.number


def violates_constraints(task: Task, node: Node) -> bool:
    """Return whether the active ``node`` no longer meets the constraints of its ``task``."""
    if is_unknown(node):
        return False
    constraints = task.spec.placement.constraints if task.spec.placement is not None else ()
    if not constraints:
        return False
    return node.spec.availability is Availability.ACTIVE and not is_satisfied(constraints, node)


def is_unfit(node: Node, task: Task) -> bool:
    """Return whether the ``task`` must leave its ``node`` because of the node's availability or labels."""
    return node.spec.availability is Availability.DRAIN or violates_constraints(task, node)


def is_drained(volume: Volume | None) -> bool:
    """Return whether a cluster volume is drained, so that no task may use it.

    Source: swarmkit, manager/orchestrator/volumeenforcer/volume_enforcer.go.
    """
    return volume is not None and volume.spec.availability is VolumeAvailability.DRAIN


def overcommitted(node: Node, tasks: Collection[Task]) -> frozenset[TaskId]:
    """Return which ``tasks`` exceed the resources of an active ``node``.  The oldest tasks are kept."""
    if node.spec.availability is not Availability.ACTIVE or is_unknown(node):
        return frozenset()
    resources = node.description.resources
    if _fits_all(resources, tasks):
        return frozenset()
    nano_cpus, memory_bytes = resources.nano_cpus, resources.memory_bytes
    stock = GenericStock(resources.generic_resources)
    surplus = set()
    for task in sorted(filter(_holds, tasks), key=age):
        reserved = reservations_of(task.spec)
        fits = reserved.nano_cpus <= nano_cpus and reserved.memory_bytes <= memory_bytes
        if not (fits and all(map(stock.holds, task.generic_resources))):
            surplus.add(task.id)
            continue
        nano_cpus -= reserved.nano_cpus
        memory_bytes -= reserved.memory_bytes
        stock.take(task.generic_resources)
    return frozenset(surplus)


def _fits_all(resources: Resources, tasks: Iterable[Task]) -> bool:
    """Return whether all tasks fit, in any order.  A new leader checks this for every task of the cluster."""
    nano_cpus = memory_bytes = 0
    for task in tasks:
        if task.generic_resources:
            return False
        wanted = task.spec.resources
        if wanted is not None and (reserved := wanted.reservations) is not None and _holds(task):
            nano_cpus += reserved.nano_cpus
            memory_bytes += reserved.memory_bytes
    return nano_cpus <= resources.nano_cpus and memory_bytes <= resources.memory_bytes


def _holds(task: Task) -> bool:
    """Return whether the task keeps its reservations on the node."""
    return task.is_wanted and _ASSIGNED <= task.status.state.number <= _RUNNING
