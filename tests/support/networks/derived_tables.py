"""Computes a network's table from all objects at once, to compare it with the table that managers keep."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from skep.manager.discovery.derive import (
    endpoint_of,
    is_publishing,
    node_on,
    overlay_attachments,
    service_on,
    unread_services,
)
from skep.model.network import Network
from skep.model.networks.data_planes import claimed_underlay, data_path_port
from skep.model.networks.overlays import head_of
from skep.model.networks.tables import NetworkTable
from skep.model.node import Node
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.store.interface import View

K = TypeVar("K", bound=str)
V = TypeVar("V")


def table_of(view: View, network: Network) -> NetworkTable:
    """Return the whole table of ``network``, as of the view's revision.  This reads all tasks."""
    tasks = [task for task in view.find(Task) if network.id in overlay_attachments(task)]
    unread = unread_services(view)
    services = {service.id: service for service in view.find(Service)}
    nodes = {node.id: node for node in view.find(Node)}
    publishes = bool(unread - services.keys()) or any(is_publishing(service) for service in services.values())
    claiming: dict[str, list[Node]] = {}
    for node in nodes.values():
        claiming.setdefault(claimed_underlay(node) or "", []).append(node)
    with_tasks = {task.service_id for task in tasks}
    hosts = {task.node_id for task in tasks}
    is_everywhere = network.spec.ingress and publishes
    return NetworkTable(
        head=head_of(network, data_path_port(view.find(Swarm))),
        revision=view.revision,
        nodes=_present(
            (node.id, node_on(node, network, claiming.get(claimed_underlay(node) or "", ())))
            for node in nodes.values()
            if is_everywhere or node.id in hosts
        ),
        endpoints=_present(
            (task.id, endpoint_of(task, services.get(task.service_id), nodes.get(task.node_id), network.id))
            for task in tasks
        ),
        services=_present(
            (service.id, service_on(service, network, has_tasks=service.id in with_tasks))
            for service in services.values()
            if service.id not in unread
        ),
        unread=tuple(sorted(unread)),
    )


def _present(entries: Iterable[tuple[K, V | None]]) -> Mapping[K, V]:
    return {id: entry for id, entry in entries if entry is not None}
