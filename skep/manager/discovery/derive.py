"""The entries of one network's table, derived from objects of the store.  Pure: ``network_tables.py`` keeps the tables.

* An endpoint is in the table from its task's assignment until the task has ended or its node is down.  So other
  containers can reach it as soon as it starts, and until its last connection is closed.
* It serves while its task is wanted and RUNNING, which a task is only once it is healthy.  A task that has become
  unhealthy serves no longer, although it runs until its node has stopped it.
* Its names resolve while it serves.  With ``skep.publish-not-ready`` they resolve from its start on, for software that
  needs its peers in order to become healthy.
* A service is in the table while it has a virtual address or a task on the network.  It stays between the end of its
  only task and the start of the next, so that its name and address are stable.  A service with routes is always in the
  front door's table, which responds for services without tasks.
* Aliases of a service's network are names of the service (and of its virtual address), as in Docker.  A container has
  two more names: the short form of its id, and the host name that its user set, if any.  For a plain container the
  first alias of the attachment is its name, and the others, which include its host name, are more aliases.

Source: moby, daemon/cluster/executor/container/container.go (serviceConfig), daemon/container_operations.go
(updateNetworkConfig, the short id).
"""

from collections.abc import Iterable, Mapping

from skep.errors import InvalidArgument
from skep.model.container import ContainerSpec
from skep.model.door.routes import has_routes
from skep.model.door.settings import is_door, labels_for_proxies
from skep.model.network import Network
from skep.model.networks.data_planes import (
    claimed_underlay,
    holder,
    is_docker_node,
    is_overlay,
    underlay_of,
)
from skep.model.networks.overlays import is_encrypted
from skep.model.networks.publishing import publish_options
from skep.model.networks.tables import TableEndpoint, TableNode, TablePort, TableService, TableSplit
from skep.model.networks.wireguard import published_keys
from skep.model.node import Node, NodeState, SessionOwner
from skep.model.options.autoscaling import AUTOSCALE, wakes_on_request
from skep.model.options.labels import prefers_near, publishes_not_ready, site_of
from skep.model.options.templates import context, expand_container
from skep.model.service import PublishMode, Service
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.model.values.ids import NetworkId, ServiceId
from skep.store.interface import View

SHORT_ID_CHARACTERS = 12
"""Length of a short container id, as in Docker."""


def unread_services(view: View) -> frozenset[ServiceId]:
    """Return the services whose data for the tables is unreadable."""
    without_endpoint = (
        id
        for id, parts in view.damaged(Service).items()
        if "endpoint" in parts
        and (found := view.lookup(Service, id)) is not None
        and not (has_endpoint(found) or found.removed_at)
    )
    without_head = (id for id in view.unreadable(Service) if view.lookup(Service, id) is None)
    return frozenset(map(ServiceId, (*without_head, *without_endpoint)))


def table_session(node: Node) -> SessionOwner | None:
    """Return the session over which the node receives and applies tables, or None."""
    is_applying = node.status.state is NodeState.READY and not is_docker_node(node)
    return node.session if is_applying else None


def has_endpoint(service: Service) -> bool:
    """Return whether the service's addresses or ports are known."""
    return bool(service.endpoint.virtual_ips or service.endpoint.ports)


# -- entries of a table ------------------------------------------------------------------------------------------


def endpoint_of(
    task: Task, service: Service | None, node: Node | None, network_id: NetworkId
) -> TableEndpoint | None:
    """Return the task's container on the network, or None if it is not attached or not on a skep node that is up."""
    attachment = overlay_attachments(task).get(network_id)
    if attachment is None or node is None or not is_up(node) or is_docker_node(node):
        return None
    state = task.status.state
    container, plain = task.status.container_status, task.spec.network_attachment_spec
    container_id = container.container_id if container is not None else ""
    name, aliases = "", []
    if service is not None:
        # The name of the container on its node. It contains the slot number that users see.
        name = task.container_name(service.spec.name)
        aliases = [_hostname(task, service, node, name)]
    elif plain is not None:
        container_id = plain.container_id
        name, *aliases = attachment.aliases or ("",)
    return TableEndpoint(
        task_id=task.id,
        node_id=task.node_id,
        service_id=task.service_id,
        slot=task.shown_slot,
        name=name,
        aliases=tuple(filter(None, dict.fromkeys((container_id[:SHORT_ID_CHARACTERS], *aliases)))),
        addresses=_addresses(attachment),
        # STARTING includes containers that run but are not healthy yet. Managers cannot distinguish them.
        is_running=state in (TaskState.STARTING, TaskState.RUNNING),
        is_serving=task.is_serving,
        is_named_early=(
            state is TaskState.STARTING
            and task.is_wanted
            and service is not None
            and publishes_not_ready(service.spec.labels)
        ),
        version=task.spec_index,
    )


def _hostname(task: Task, service: Service, node: Node, name: str) -> str:
    """Return the host name that the user set for the task's container called ``name``, or an empty string."""
    spec = task.spec.container_spec
    if spec is None or "{{" not in spec.hostname:
        return spec.hostname if spec is not None else ""
    described = node.description
    seen = context(
        service_id=service.id,
        service_name=service.spec.name,
        service_labels=service.spec.labels,
        node_id=node.id,
        hostname=described.hostname,
        os=described.platform.os,
        architecture=described.platform.architecture,
        task_id=task.id,
        task_name=name,
        slot=task.template_slot,
    )
    try:
        return expand_container(ContainerSpec(hostname=spec.hostname), seen).hostname
    except InvalidArgument:  # the node rejects the task
        return ""


def service_on(service: Service, network: Network, *, has_tasks: bool) -> TableService | None:
    """Return the service's entry on the network, or None if it was removed or is not on the network.

    Args:
        has_tasks: Whether it has tasks on the network, on any node.
    """
    addresses = [
        one.addr for one in service.endpoint.virtual_ips if one.network_id == network.id and one.addr
    ]
    spec = service.spec
    is_routed = is_door(network.spec.labels) and has_routes(spec.labels)
    if service.removed_at is not None or not (addresses or has_tasks or is_routed):
        return None
    wanted = spec.task_template.networks or spec.networks
    aliases = dict.fromkeys(alias for one in wanted if one.target == network.id for alias in one.aliases)
    ports = service.endpoint.ports if network.spec.ingress else ()
    published = [port for port in ports if port.publish_mode is PublishMode.INGRESS and port.published_port]
    return TableService(
        id=service.id,
        name=spec.name,
        aliases=tuple(aliases),
        virtual_ips=tuple(map(_bare, addresses)),
        ports=tuple(
            sorted(
                TablePort(
                    protocol=port.protocol,
                    published=port.published_port,
                    target=port.target_port,
                    options=options,
                )
                for port, options in publish_options(spec.labels, published)
            )
        ),
        labels=_labels_for_door(spec.labels) if is_door(network.spec.labels) else {},
        created_at=service.created_at if is_door(network.spec.labels) else "",
        split=_split(service),
        is_near=prefers_near(spec.labels),
    )


def _labels_for_door(labels: Mapping[str, str]) -> dict[str, str]:
    """Return the labels for nodes with a proxy.  They have the range of a service whose requests may be held."""
    found = labels_for_proxies(labels)
    return {**found, AUTOSCALE: labels[AUTOSCALE]} if wakes_on_request(labels) else found


def _split(service: Service) -> TableSplit | None:
    split = service.split
    if split is None or split.percent is None:
        return None
    return TableSplit(split.percent, split.versions, split.withdrawn)


def node_on(node: Node, network: Network, claiming: Iterable[Node] = ()) -> TableNode | None:
    """Return the node's entry on the network.

    Returns None if the node is down, is a docker node, has no known address, or if another node holds it.

    Args:
        claiming: All nodes that are up with the same address.  Not used for loopback addresses.
    """
    underlay = underlay_of(node)
    if not underlay or not is_up(node) or is_docker_node(node):
        return None
    if claimed_underlay(node) is not None and holder(claiming) not in (None, node.id):
        return None
    own = [one for one in node.attachments if one.network is not None and one.network.id == network.id]
    addresses = tuple(address for one in own for address in _addresses(one)) if network.spec.ingress else ()
    keys = published_keys(node.description.engine.labels) if is_encrypted(network) else ()
    return TableNode(
        id=node.id,
        underlay=underlay,
        addresses=addresses,
        wireguard_keys=keys,
        site=site_of(node.spec.labels),
    )


# -- membership --------------------------------------------------------------------------------------------------


def overlay_attachments(task: Task) -> Mapping[NetworkId, NetworkAttachment]:
    """Return the task's attachments to overlay networks, while it is assigned and has not ended."""
    if not task.networks_attachments or not task.node_id:
        return {}
    if not TaskState.ASSIGNED.number <= task.status.state.number <= TaskState.RUNNING.number:
        return {}
    return {
        attachment.network.id: attachment
        for attachment in task.networks_attachments
        if attachment.network is not None and attachment.addresses and is_overlay(attachment.network)
    }


def is_publishing(service: Service) -> bool:
    """Return whether the service has ports published on every node."""
    return service.removed_at is None and service.spec.publishes_in_ingress


def is_up(node: Node) -> bool:
    """Return whether the node is not marked down."""
    return node.status.state is not NodeState.DOWN


def _addresses(attachment: NetworkAttachment) -> tuple[str, ...]:
    """Return the addresses without prefix lengths, IPv4 first."""
    return tuple(sorted(map(_bare, attachment.addresses), key=lambda address: ":" in address))


def _bare(address: str) -> str:
    return address.partition("/")[0]
