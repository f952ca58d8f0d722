"""From a task's attachments to the places of its container.  Pure.

Source: moby, daemon/container_operations.go (ingress comes first).
"""

from collections.abc import Sequence
from ipaddress import ip_interface, ip_network

from skep.agent.executor.interface import Rejected
from skep.model.network import MTU_OPTION, MTUS, Network
from skep.model.overlays import VXLAN_ID_MAX, VXLAN_OPTION, head_of, options_of
from skep.model.planes import is_overlay
from skep.model.sandbox import EndpointConfig
from skep.model.tables import NetworkHead
from skep.model.task import NetworkAttachment, Task


def places(task: Task) -> tuple[EndpointConfig, ...]:
    """The overlay networks of ``task`` in the order of its interfaces: ingress first, the others as attached.

    Raises: Rejected: an attachment makes no sense.
    """
    found = [
        _place(one)
        for one in task.networks_attachments
        if one.network is not None and is_overlay(one.network)
    ]
    return tuple(sorted(found, key=lambda one: not one.head.is_ingress))


def network_head(network: Network) -> NetworkHead:
    """What an attachment says of its network; its table says the rest.  Raises: ValueError: it makes no sense."""
    options = options_of(network)
    mtu = int(options.get(MTU_OPTION) or 0)
    if mtu and mtu not in MTUS:
        raise ValueError(f"invalid MTU: {mtu}")
    words = options.get(VXLAN_OPTION, "")
    if not all(0 < int(word) <= VXLAN_ID_MAX for word in words.split(",") if word.strip()):
        raise ValueError(f"invalid VXLAN id in {words}")
    for config in network.ipam_options.configs if network.ipam_options is not None else ():
        ip_network(config.subnet, strict=False)
    return head_of(network)


def _place(attachment: NetworkAttachment) -> EndpointConfig:
    assert attachment.network is not None, "asked before"
    network = attachment.network
    try:
        head = network_head(network)
        addresses: Sequence[str] = [str(ip_interface(one)) for one in attachment.addresses]
    except ValueError as error:
        raise Rejected(f"invalid attachment to network {network.spec.name}: {error}") from error
    if not addresses:
        raise Rejected(f"no address on network {network.spec.name}")
    return EndpointConfig(
        head=head,
        addresses=tuple(sorted(addresses, key=lambda one: ":" in one)),
        aliases=attachment.aliases,
    )
