"""The options of an overlay network, by Docker's names.

Source: moby, libnetwork/drivers/overlay/overlay.go (names of the options), ov_network.go (parseNetworkOptions: the
value of ``encrypted`` does not matter).
"""

from collections.abc import Mapping
from typing import Final

from skep.model.door.settings import is_door
from skep.model.network import MTU_OPTION, Network, subnet_of
from skep.model.networks.addresses import is_subnet
from skep.model.networks.paths import PROBE_VNI
from skep.model.networks.tables import NetworkHead, Segment
from skep.model.swarm import DEFAULT_DATA_PATH_PORT

VXLAN_OPTION: Final = "com.docker.network.driver.overlay.vxlanid_list"
"""Option with comma-separated VXLAN ids, one per IPv4 subnet in the same order.  IPv6 subnets share the first."""
ENCRYPTED_OPTION: Final = "encrypted"
VXLAN_ID_MAX: Final = PROBE_VNI - 1
"""Largest VXLAN id of a network.  Probes use the next one."""


def options_of(network: Network) -> Mapping[str, str]:
    """Return the requested and the allocated options; the latter take precedence."""
    requested = network.spec.driver_configuration
    return {**(requested.options if requested is not None else {}), **network.driver_state.options}


def is_encrypted(network: Network) -> bool:
    """Return whether the network was created with ``--opt encrypted``."""
    requested = network.spec.driver_configuration
    return requested is not None and ENCRYPTED_OPTION in requested.options


def vxlan_ids(options: Mapping[str, str]) -> list[int]:
    """Return the VXLAN ids in ``options``; items that are not numbers are ignored."""
    return [int(item) for item in options.get(VXLAN_OPTION, "").split(",") if is_number(item.strip())]


def is_number(text: str) -> bool:
    """Return whether ``text`` is a whole number without a sign, of at most nine digits."""
    return 0 < len(text) <= 9 and text.isascii() and text.isdigit()


def head_of(network: Network, port: int = DEFAULT_DATA_PATH_PORT) -> NetworkHead:
    """Return the network's properties for the data plane.  ``port``: the cluster's UDP port for VXLAN.

    Invalid options and subnets are ignored.
    """
    options = options_of(network)
    mtu = options.get(MTU_OPTION, "")
    return NetworkHead(
        id=network.id,
        name=network.spec.name,
        segments=_segments(network, vxlan_ids(options)),
        mtu=int(mtu) if is_number(mtu) else 0,
        port=port,
        is_ingress=network.spec.ingress,
        is_internal=network.spec.internal,
        is_encrypted=ENCRYPTED_OPTION in options,
        is_door=is_door(network.spec.labels),
    )


def _segments(network: Network, ids: list[int]) -> tuple[Segment, ...]:
    """Return each subnet with its VXLAN id.  A subnet without one (IPv6 in addition to IPv4) uses the first id."""
    configs = network.ipam_options.configs if network.ipam_options is not None and ids else ()
    known = [one for one in configs if is_subnet(one.subnet)]
    if len(ids) < len(known):
        known.sort(key=lambda one: ":" in one.subnet)
    return tuple(
        Segment(
            subnet=str(subnet_of(config)),
            gateway=config.gateway.partition("/")[0],
            vni=(ids[position:] or ids)[0],
        )
        for position, config in enumerate(known)
    )
