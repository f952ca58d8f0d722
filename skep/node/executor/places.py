"""From a task's attachments to the places of its container.  Pure.

Source: moby, libnetwork/drivers/overlay/overlay.go (names of the options), daemon/container_operations.go (ingress
comes first).
"""

from collections.abc import Sequence
from ipaddress import ip_interface, ip_network

from skep.model.network import Network
from skep.model.paths import PROBE_VNI
from skep.model.planes import is_overlay
from skep.model.tables import NetworkHead, Segment
from skep.model.task import NetworkAttachment, Task
from skep.node.executor.interface import Rejected
from skep.node.oci.container import Place

VXLAN_OPTION = "com.docker.network.driver.overlay.vxlanid_list"
MTU_OPTION = "com.docker.network.driver.mtu"
ENCRYPTED_OPTION = "encrypted"
_MTU_MIN, _MTU_MAX = 68, 65535
_VNI_MAX = PROBE_VNI - 1


def places(task: Task) -> tuple[Place, ...]:
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
    """What an attachment says of its network; its table says the rest.  Raises: ValueError."""
    wished = network.spec.driver_configuration
    options = {**(wished.options if wished is not None else {}), **network.driver_state.options}
    mtu = int(options.get(MTU_OPTION) or 0)
    if mtu and not _MTU_MIN <= mtu <= _MTU_MAX:
        raise ValueError(f"invalid MTU: {mtu}")
    return NetworkHead(
        id=network.id,
        name=network.spec.name,
        segments=_segments(network, options.get(VXLAN_OPTION, "")),
        mtu=mtu,
        is_ingress=network.spec.ingress,
        is_internal=network.spec.internal,
        is_encrypted=ENCRYPTED_OPTION in options,
    )


def _segments(network: Network, vxlan_ids: str) -> tuple[Segment, ...]:
    """Each subnet with its VXLAN; one without an id of its own (IPv6 beside IPv4) is carried by the first."""
    configs = network.ipam_options.configs if network.ipam_options is not None else ()
    ids = [int(word) for word in vxlan_ids.split(",") if word.strip()]
    if not all(0 < one <= _VNI_MAX for one in ids):
        raise ValueError(f"invalid VXLAN id in {vxlan_ids}")
    if not ids:
        return ()
    ordered = sorted(configs, key=lambda one: ":" in one.subnet) if len(ids) < len(configs) else configs
    return tuple(
        Segment(
            subnet=str(ip_network(config.subnet, strict=False)),
            gateway=config.gateway.partition("/")[0],
            vni=ids[min(number, len(ids) - 1)] if ":" not in config.subnet or number < len(ids) else ids[0],
        )
        for number, config in enumerate(ordered)
    )


def _place(attachment: NetworkAttachment) -> Place:
    assert attachment.network is not None, "asked before"
    network = attachment.network
    try:
        head = network_head(network)
        addresses: Sequence[str] = [str(ip_interface(one)) for one in attachment.addresses]
    except ValueError as error:
        raise Rejected(f"invalid attachment to network {network.spec.name}: {error}") from error
    if not addresses:
        raise Rejected(f"no address on network {network.spec.name}")
    return Place(
        head=head,
        addresses=tuple(sorted(addresses, key=lambda one: ":" in one)),
        aliases=attachment.aliases,
    )
