"""Builds the catalog from a view of the store.  Pure, except that it pauses for the event loop.

A service with published ports is reached at its nodes, in host mode at the node of each task, and over the routing mesh
at each node that runs a task.  A service without them is reached at its tasks' addresses on overlay networks.

A registration whose name has become a service of another stack is left out.  Its registrar reports that, because the
lease is not renewed.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from skep.aio.time_slices import SlicedWork
from skep.manager.catalog.registrations import records_in
from skep.model.catalog import (
    CatalogAnswer,
    CatalogInstance,
    CatalogService,
    ServiceCatalog,
    ServiceRegistration,
)
from skep.model.history import masked, stack_of
from skep.model.network import is_ingress
from skep.model.networks.addresses import PORT_MAX
from skep.model.networks.data_planes import is_overlay
from skep.model.node import Node, NodeState
from skep.model.service import PortConfig, PublishMode, Service
from skep.model.task import Task, TaskState
from skep.model.values.encoding import to_json
from skep.model.values.ids import NodeId
from skep.store.interface import View

DIGEST_CHARACTERS = 32
"""Length of a digest.  It only has to differ for different content."""
_OWN_LABELS = ("com.docker.", "skep.")
"""Prefixes of labels that are settings of Docker and Skep, and not tags for the readers of the catalog."""


def built_catalog(view: View, sees: Callable[[str], bool]) -> SlicedWork[CatalogAnswer]:
    """Return the catalog of the stacks that ``sees`` accepts."""
    nodes = {one.id: one for one in view.find(Node) if one.status.state is NodeState.READY}
    found: dict[str, CatalogService] = {}
    owners: dict[str, tuple[str, str]] = {}
    for service in view.find(Service):
        yield
        if service.removed_at is not None:
            continue
        stack = stack_of(service.spec.labels)
        owners[service.spec.name.lower()] = service.spec.name, stack
        if sees(stack):
            tags = tuple(sorted(_tags(service.spec.labels)))
            instances = _instances(service, view.find(Task, service_id=service.id), nodes, tags)
            found[service.spec.name] = CatalogService(
                name=service.spec.name, stack=stack, tags=tags, instances=tuple(instances)
            )
    for record in records_in(view):
        one = record.registration
        own = one.service, one.stack
        if owners.setdefault(one.service.lower(), own) == own and sees(one.stack):
            _add(found, one)
    catalog = ServiceCatalog(
        services=tuple(found[name] for name in sorted(found)),
        nodes={node.shown_name: node.status.addr for node in sorted(nodes.values(), key=lambda one: one.id)},
    )
    return CatalogAnswer(digest=_digest(catalog), catalog=catalog)


def _digest(catalog: ServiceCatalog) -> str:
    return hashlib.sha256(to_json(catalog)).hexdigest()[:DIGEST_CHARACTERS]


def _tags(labels: Mapping[str, str]) -> Iterator[str]:
    for name, value in labels.items():
        if not name.startswith(_OWN_LABELS):
            yield masked(f"{name}={value}")


def _add(found: dict[str, CatalogService], one: ServiceRegistration) -> None:
    """Add a registration to the service of its name."""
    instance = CatalogInstance(
        id=one.instance,
        node=one.instance,
        node_address=one.address,
        address=one.address,
        port=one.port,
        tags=one.tags,
        is_registered=True,
    )
    service = found.get(one.service) or CatalogService(name=one.service, stack=one.stack)
    instances = sorted((*service.instances, instance), key=lambda one: one.id)
    tags = tuple(sorted({*service.tags, *one.tags}))
    found[one.service] = CatalogService(
        name=one.service, stack=service.stack, tags=tags, instances=tuple(instances)
    )


def _instances(
    service: Service, tasks: Sequence[Task], nodes: Mapping[NodeId, Node], tags: tuple[str, ...]
) -> Iterator[CatalogInstance]:
    """Yield an instance of each serving task, or of each node with serving tasks for a port of the mesh."""
    serving = [
        one
        for one in sorted(tasks, key=lambda task: task.id)
        if one.is_wanted and one.status.state is TaskState.RUNNING and one.node_id in nodes
    ]
    mesh = _first_port(service.endpoint.ports, PublishMode.INGRESS)
    seen: set[str] = set()
    for task in serving:
        node = nodes[task.node_id]
        host = _first_port(task.status.port_status.ports, PublishMode.HOST)
        address = node.status.addr if mesh or host else _overlay_address(task)
        if not address or (mesh and not host and task.node_id in seen):
            continue
        seen.add(task.node_id)
        yield CatalogInstance(
            id=task.id,
            node=node.shown_name,
            node_address=node.status.addr,
            address=address,
            port=host or mesh,
            tags=tags,
        )


def _first_port(ports: Sequence[PortConfig], mode: PublishMode) -> int:
    """Return the first published port in the order of the spec, or 0.

    Stored statuses may have impossible ports of nodes, which earlier managers took.
    """
    return next(
        (
            one.published_port
            for one in ports
            if one.publish_mode is mode and 0 < one.published_port <= PORT_MAX
        ),
        0,
    )


def _overlay_address(task: Task) -> str:
    """Return the task's address on its first overlay network, or an empty text."""
    for attachment in task.networks_attachments:
        network = attachment.network
        if network is not None and is_overlay(network) and not is_ingress(network) and attachment.addresses:
            return attachment.addresses[0].partition("/")[0]
    return ""
