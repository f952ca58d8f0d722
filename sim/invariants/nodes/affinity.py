"""Rules on affinity: a task is assigned only where the hard rules of its service, and those about it, allow it."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

from sim.world.committed import Change
from skep.model.node import Node
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.store.interface import Created, Deleted, Updated, View

NEAR, APART, SKEW = "skep.affinity", "skep.anti-affinity", "skep.max-skew"
KNOWN_S: Final = 10.0
"""Seconds after which every leader's decisions are based on a change."""
Term = tuple[str, str]
"""A name in lower case, and a label of nodes, or an empty text for single nodes."""


def _terms(service: Service, label: str) -> list[Term]:
    parts = [part.partition("@") for part in service.spec.labels.get(label, "").lower().split(",") if part]
    return [(name, topology.removeprefix("node.labels.")) for name, _, topology in parts]


def _domain(node: Node, label: str) -> str:
    return node.spec.labels.get(label, "") if label else node.id


def _others(task: Task, services: Iterable[Service], view: View) -> Iterator[Node]:
    """Yield the nodes of the services' tasks, except ``task``."""
    for service in services:
        for other in view.find(Task, service_id=service.id):
            holds = TaskState.ASSIGNED <= other.status.state <= TaskState.RUNNING and other.is_wanted
            if holds and other.id != task.id and (node := view.lookup(Node, other.node_id)) is not None:
                yield node


def forbidden(task: Task, node: Node, service: Service, view: View, *, own: bool = True) -> Iterator[str]:
    """Yield the hard rules that ``task`` breaks on ``node``, with the present tasks.

    Args:
        own: Whether rules that name the service itself are checked.
    """
    name = service.spec.name.lower()
    for target, label in _terms(service, NEAR):
        near = {_domain(one, label) for one in _others(task, view.find(Service, name=target), view)}
        if _domain(node, label) not in near - {""}:
            yield f"not near {target} by {label or 'node'}"
    rules = [
        (view.find(Service, name=target), label)
        for target, label in _terms(service, APART)
        if own or target != name
    ]
    rules += [
        ([other], label)
        for other in view.find(Service)
        for target, label in _terms(other, APART)
        if target == name and other.id != service.id
    ]
    for services, label in rules:
        if (here := _domain(node, label)) and here in {
            _domain(one, label) for one in _others(task, services, view)
        }:
            yield f"not apart from {[one.spec.name for one in services]} by {label or 'node'}"


def exceeds_skew(task: Task, node: Node, service: Service, open_nodes: Iterable[Node], view: View) -> bool:
    """Return whether ``task`` on ``node`` would exceed the largest skew between the domains of ``open_nodes``."""
    for part in service.spec.labels.get(SKEW, "").split(",") if SKEW in service.spec.labels else ():
        number, _, topology = part.partition("@")
        label = topology.removeprefix("node.labels.")
        counts = Counter(_domain(one, label) for one in _others(task, [service], view))
        domains, here = {_domain(one, label) for one in open_nodes} - {""}, _domain(node, label)
        if here not in domains or counts[here] + 1 - min(counts[one] for one in domains) > int(number):
            return True
    return False


class AffinitiesHold:
    """Each assignment meets the hard rules between services, unless one of them has just changed."""

    def __init__(self) -> None:
        self._changed_at = 0.0

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            match event:
                case Created(Service() | Node()) | Deleted(Service() | Node()):
                    self._changed_at = change.time_s
                case Updated(Service() as old, Service() as new) if old.spec != new.spec:
                    self._changed_at = change.time_s
                case Updated(Node() as before, Node() as after) if before.spec != after.spec:
                    self._changed_at = change.time_s
        if change.time_s < self._changed_at + KNOWN_S:
            return
        for event in change.events:
            match event:
                case Updated(Task() as was, Task() as task) if not was.node_id and task.node_id:
                    node, service = view.lookup(Node, task.node_id), view.lookup(Service, task.service_id)
                    if node is None or service is None or service.removed_at is not None:
                        continue
                    # One of two tasks in a slot leaves.
                    for why in forbidden(task, node, service, view, own=False):
                        yield f"task {task.id} of {service.spec.name} is assigned to {node.id}: {why}"
