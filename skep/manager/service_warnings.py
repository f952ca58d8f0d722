"""Warnings in responses to requests that create or update a service with settings that cannot work."""

from collections.abc import Iterable, Iterator

from skep.model.constraints import is_satisfied
from skep.model.needs import host_ports
from skep.model.node import Node
from skep.model.service import ServiceSpec, UpdateOrder


def placement_warnings(spec: ServiceSpec, nodes: Iterable[Node]) -> Iterator[str]:
    """Yield a warning if no node meets the constraints, and one if start-first cannot work on a single node."""
    placement = spec.task_template.placement
    constraints = placement.constraints if placement is not None else ()
    if constraints and not any(is_satisfied(constraints, node) for node in nodes):
        yield f"no node meets the constraints ({', '.join(constraints)}): new tasks wait until one does"
    update, ports = spec.update_config, host_ports(spec)
    if ports and update is not None and update.order is UpdateOrder.START_FIRST:
        named = ", ".join(f"{number}/{protocol}" for protocol, number in ports)
        yield (
            f"order start-first: two tasks cannot have the host-mode port {named} on one node, so without a further "
            "node the old task is stopped first"
        )
