"""A task's places on its networks.

Networks of the node itself (``host``, ``bridge``, ``none``) need nothing from the cluster.  On an overlay network a
task gets an address of its own, and stays NEW, saying why, until there is one: it never runs without a network
that it asked for.  A task that publishes ports in ingress mode is on the ingress network too, before all others: the
one network that both data planes have, each for its own nodes' tasks.

Source: swarmkit, manager/allocator/network.go (taskCreateNetworkAttachments).
"""

from collections.abc import Callable, Sequence

import msgspec

from skep.manager.allocator.addresses import NoAddress
from skep.manager.allocator.subnets import has_addresses
from skep.model.ids import NetworkId
from skep.model.network import Network
from skep.model.planes import is_overlay
from skep.model.service import NetworkAttachmentConfig, ServiceSpec
from skep.model.task import NetworkAttachment


class Attached(msgspec.Struct, frozen=True):
    """Every network of the task is ready for it."""

    attachments: tuple[NetworkAttachment, ...] = ()


class NotAttached(msgspec.Struct, frozen=True):
    """The task has to wait; ``reason`` is what the user reads on it."""

    reason: str


class Networks(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster's networks as an attachment sees them."""

    find: Callable[[NetworkId], Network | None]
    ingress: Network | None = None
    """The network of published ports, as far as it is allocated; None: there is none."""
    failure: Callable[[NetworkId], str] = lambda _: "not yet"
    """Why a network has no addresses to give."""


def attachments_for(
    spec: ServiceSpec,
    networks: Networks,
    give: Callable[[Network, str], tuple[str, ...]],
    wished: Sequence[NetworkAttachment] = (),
) -> Attached | NotAttached:
    """The attachments of a task made from ``spec``, or why there are none yet.

    Args:
        give: gives addresses of a network, one of each version; the second argument is a wished one.  Raises:
            NoAddress.
        wished: attachments that name an address (``docker run --ip``).
    """
    attachments = []
    addresses = {one.network.id: one.addresses[0] for one in wished if one.network and one.addresses}
    for wanted in wanted_networks(spec, networks.ingress):
        network = networks.find(NetworkId(wanted.target))
        if network is None:
            return NotAttached(f"network {wanted.target} not found")
        if not is_overlay(network):
            attachments.append(NetworkAttachment(network=network, aliases=wanted.aliases))
            continue
        if not has_addresses(network):
            name = network.spec.name or network.id
            return NotAttached(f"network {name} is not allocated: {networks.failure(network.id)}")
        try:
            given = give(network, addresses.get(network.id, ""))
        except NoAddress as error:
            return NotAttached(str(error))
        attachments.append(NetworkAttachment(network=network, addresses=given, aliases=wanted.aliases))
    return Attached(tuple(attachments))


def wanted_networks(spec: ServiceSpec, ingress: Network | None) -> list[NetworkAttachmentConfig]:
    """The task template's networks; the service's own list is the older spelling of the same."""
    wanted = spec.task_template.networks or spec.networks
    if ingress is not None and spec.publishes_in_ingress:
        return [NetworkAttachmentConfig(target=ingress.id), *wanted]
    return list(wanted)
