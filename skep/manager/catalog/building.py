"""Builds the catalog from a view of the store.  Pure, except that it pauses for the event loop.

A service with published ports is reached at its nodes, in host mode at the node of each task, and over the routing mesh
at each node that runs a task.  A service without them is reached at its tasks' addresses on overlay networks.

During a staged update, tasks without a share of new connections are left out, and the others have the weights of the
front door.  The nodes of a port of the mesh have equal weights, because the mesh itself divides the connections.

A registration whose name has become a service of another stack is left out.  Its registrar reports that, because the
lease is not renewed.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter

from skep.aio.time_slices import SlicedWork
from skep.manager.catalog.registrations import records_in
from skep.model.catalog import (
    CatalogAnswer,
    CatalogInstance,
    CatalogService,
    ServiceCatalog,
    ServiceRegistration,
)
from skep.model.history import masked
from skep.model.network import is_ingress
from skep.model.networks.addresses import PORT_MAX
from skep.model.networks.data_planes import is_overlay
from skep.model.node import Node, NodeState
from skep.model.service import PortConfig, PublishMode, Service
from skep.model.staging.shares import Shares, shares_of
from skep.model.task import Task
from skep.model.values.encoding import to_json
from skep.model.values.ids import NodeId
from skep.model.values.stacks import stack_of
from skep.store.interface import View

DIGEST_CHARACTERS = 32
"""Length of a digest.  It only has to differ for different content."""
_OWN_LABELS = ("com.docker.", "skep.")
"""Prefixes of labels that are settings of Docker and Skep, and not tags for the readers of the catalog."""


def built_catalog(view: View, sees: Callable[[str], bool]) -> SlicedWork[CatalogAnswer]:
    """Return the catalog of the stacks that ``sees`` accepts."""
    nodes = {one.id: one for one in view.find(Node) if one.status.state is NodeState.READY}
    names = _names(nodes)
    found: dict[str, CatalogService] = {}
    owners: dict[str, tuple[str, str]] = {}
    weights: dict[str, int] = {}
    for service in view.find(Service):
        yield
        if service.removed_at is not None:
            continue
        stack = stack_of(service.spec.labels)
        owners[service.spec.name.lower()] = service.spec.name, stack
        if sees(stack):
            tags = tuple(sorted(_tags(service.spec.labels)))
            shares = shares_of(
                service, _serving(view.find(Task, service_id=service.id), nodes), attrgetter("spec_index")
            )
            instances = _instances(service, shares, nodes, names, tags)
            found[service.spec.name] = CatalogService(
                name=service.spec.name, stack=stack, tags=tags, instances=tuple(instances)
            )
            weights[service.spec.name] = 1 if _mesh_port(service) else shares.weights[0]
    for record in records_in(view):
        one = record.registration
        own = one.service, one.stack
        if owners.setdefault(one.service.lower(), own) == own and sees(one.stack):
            _add(found, one, weights.get(one.service, 1))
    catalog = ServiceCatalog(
        services=tuple(found[name] for name in sorted(found)),
        nodes={names[id]: nodes[id].status.addr for id in sorted(nodes)},
    )
    return CatalogAnswer(digest=_digest(catalog), catalog=catalog)


def _digest(catalog: ServiceCatalog) -> str:
    return hashlib.sha256(to_json(catalog)).hexdigest()[:DIGEST_CHARACTERS]


def _names(nodes: Mapping[NodeId, Node]) -> Mapping[NodeId, str]:
    """Return a name of its own for each node, in any case of letters: its host name, with its id if others have it."""
    shared = Counter(node.shown_name.lower() for node in nodes.values())
    return {
        id: node.shown_name if shared[node.shown_name.lower()] == 1 else f"{node.shown_name}-{id}"
        for id, node in nodes.items()
    }


def _tags(labels: Mapping[str, str]) -> Iterator[str]:
    for name, value in labels.items():
        if not name.startswith(_OWN_LABELS):
            yield masked(f"{name}={value}")


def _add(found: dict[str, CatalogService], one: ServiceRegistration, weight: int) -> None:
    """Add a registration to the service of its name, with the ``weight`` of an old task."""
    instance = CatalogInstance(
        id=one.instance,
        node=one.instance,
        node_address=one.address,
        address=one.address,
        port=one.port,
        weight=weight,
        tags=one.tags,
        is_registered=True,
    )
    service = found.get(one.service) or CatalogService(name=one.service, stack=one.stack)
    instances = sorted((*service.instances, instance), key=lambda one: one.id)
    tags = tuple(sorted({*service.tags, *one.tags}))
    found[one.service] = CatalogService(
        name=one.service, stack=service.stack, tags=tags, instances=tuple(instances)
    )


def _serving(tasks: Sequence[Task], nodes: Mapping[NodeId, Node]) -> Iterator[Task]:
    for one in tasks:
        if one.is_serving and one.node_id in nodes:
            yield one


def _instances(
    service: Service,
    shares: Shares[Task],
    nodes: Mapping[NodeId, Node],
    names: Mapping[NodeId, str],
    tags: tuple[str, ...],
) -> Iterator[CatalogInstance]:
    """Yield an instance of each task with a share, or of each node with such tasks for a port of the mesh."""
    mesh = _mesh_port(service)
    seen: set[str] = set()
    for task, weight in sorted(shares.weighted(), key=lambda pair: pair[0].id):
        node = nodes[task.node_id]
        host = _first_port(task.status.port_status.ports, PublishMode.HOST)
        address = node.status.addr if mesh or host else _overlay_address(task)
        if not address or (mesh and not host and task.node_id in seen):
            continue
        seen.add(task.node_id)
        yield CatalogInstance(
            id=task.id,
            node=names[task.node_id],
            node_address=node.status.addr,
            address=address,
            port=host or mesh,
            weight=1 if mesh and not host else weight,
            tags=tags,
        )


def _mesh_port(service: Service) -> int:
    return _first_port(service.endpoint.ports, PublishMode.INGRESS)


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
