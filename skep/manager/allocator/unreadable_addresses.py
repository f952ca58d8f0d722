"""Handles owners whose addresses are unreadable.  Since any address may be theirs, none is allocated on their networks.

See decision 21.
"""

from collections.abc import Iterable, Iterator

from skep.manager.allocator.addresses import NoAddress
from skep.manager.allocator.allocations import node_owner, service_owner
from skep.manager.allocator.attachments import spec_or_template, wanted_networks
from skep.manager.allocator.nodes import occupies_networks
from skep.model.door.settings import door_network
from skep.model.network import Network
from skep.model.networks.data_planes import is_docker_node
from skep.model.node import Node
from skep.model.options.dependencies import WAITS_FOR
from skep.model.service import Service, ServiceSpec
from skep.model.task import Task
from skep.model.values.ids import NetworkId, ServiceId
from skep.store.interface import View
from skep.store.kinds import SpecVersion, has_unknown_spec


class Unread(NoAddress):
    """An address cannot be allocated because ``owner``, whose addresses are unreadable, may have it."""

    def __init__(self, owner: str, network: Network) -> None:
        super().__init__(
            f"{WAITS_FOR}an address of network {network.spec.name}: "
            f"the addresses of {owner} are unreadable on the leader"
        )
        self.owner = owner


def check_known(view: View, owner: str, network: Network) -> bool:
    """Refuse to allocate an address for ``owner`` on a network where another owner may have any address.

    A service or node whose own addresses are unreadable gets new ones, even if there are other such owners.  Returns
    whether there are several such owners, because one may then get an address that another has.  The caller calls
    ``AddressAllocations.skip_to_last_quarter`` in this case.

    Raises:
        Unread: Another owner's addresses on the network are unreadable.
    """
    unread = dict(unread_addresses(view))
    are_several = False
    for other, networks in unread.items():
        if other == owner or not (networks is None or network.id in networks):
            continue
        if owner not in unread or "/" not in other:
            raise Unread(other, network)
        are_several = True
    return are_several


def unread_addresses(view: View) -> Iterator[tuple[str, frozenset[NetworkId] | None]]:
    """Yield the owners whose addresses are unreadable, with their networks, or with None if these are unknown.

    Cheap if everything is readable, since it is called for each address.
    """
    for id, parts in view.damaged(Task).items():
        task = view.lookup(Task, id)
        if "networks" in parts and task is not None and _has_unread_addresses(task):
            is_known = not has_unknown_spec(view, task)
            yield task.id, _networks(view, [spec_or_template(view, task)]) if is_known else None
    for id, parts in view.damaged(Service).items():
        service = view.lookup(Service, id)
        if "endpoint" in parts and service is not None and not service.endpoint.virtual_ips:
            yield service_owner(id), _networks(view, [service.spec])
    for id in view.unreadable(Service):
        if view.lookup(Service, id) is None:
            yield service_owner(id), _networks_of_versions(view, ServiceId(id))
    for id, parts in view.damaged(Node).items():
        node = view.lookup(Node, id)
        if "attachments" in parts and node is not None and not node.attachments:
            tasks = view.find(Task, node_id=id) if is_docker_node(node) else ()
            used = (one.network for task in tasks for one in task.networks_attachments)
            ingress = (one for one in view.find(Network) if one.spec.ingress)
            found = {network.id for network in (*used, *ingress) if network is not None}
            yield node_owner(id), frozenset(found)


def _has_unread_addresses(task: Task) -> bool:
    return not task.networks_attachments and occupies_networks(task)


def _networks_of_versions(view: View, id: ServiceId) -> frozenset[NetworkId] | None:
    """Return the networks of all versions of a service whose head is unreadable."""
    versions = view.find(SpecVersion, service_id=id)
    if not versions or any(one.startswith(f"{id}/") for one in view.unreadable(SpecVersion)):
        return None
    return _networks(view, [version.spec for version in versions])


def _networks(view: View, specs: Iterable[ServiceSpec]) -> frozenset[NetworkId]:
    """Return the networks of any of ``specs``."""
    known = view.find(Network)
    ingress, door = next((one for one in known if one.spec.ingress), None), door_network(known)
    return frozenset(NetworkId(one.target) for spec in specs for one in wanted_networks(spec, ingress, door))
