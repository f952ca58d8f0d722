"""A node's own networks as API objects: the networks of scope local in ``docker network ls``.

A node without a Docker Engine has Docker's three predefined networks, its gateway bridge under Docker's name,
configurations (``--config-only``) with settings for other networks, and its users' bridge networks for plain
containers.  If the machine has a Docker Engine, bridge networks belong to the engine.
"""

from collections.abc import Mapping, Sequence
from ipaddress import ip_network
from typing import Any, Final

import msgspec

from skep.api.formats.networks import LOCAL, NetworkFacts, SubnetBody
from skep.model.network import MTU_OPTION
from skep.model.networks.routes import Subnet
from skep.model.networks.tables import NetworkHead, ParentLink, Segment
from skep.model.values.ids import NetworkId
from skep.model.values.times import Timestamp

MTU: Final = 1500
"""Ethernet's."""
LOCAL_ID_LENGTH: Final = 64
"""Number of characters of a local network's id, as in Docker.  Ids of cluster objects have 25."""
GATEWAY: Final = "docker_gwbridge"
"""Docker's name for the gateway bridge."""


PARENT_OPTION: Final = "parent"
PARENT_MODES: Final[Mapping[str, tuple[str, ...]]] = {
    "macvlan": ("bridge", "private", "vepa", "passthru"),
    "ipvlan": ("l2", "l3", "l3s"),
}
"""Drivers of networks on the machine's own devices, with their modes, the default first."""
DUMMIES: Final = {"macvlan": "dm", "ipvlan": "di"}
"""Name prefixes of the dummy devices for networks without a parent device.  The start of the network's id follows."""
VLAN, DUMMY = "vlan", "dummy"


class LocalNetwork(msgspec.Struct, frozen=True, kw_only=True):
    """One network of the node.  ``id`` has 64 hexadecimal digits and stays the same over restarts."""

    id: str
    name: str
    driver: str
    created_at: Timestamp
    configs: tuple[SubnetBody, ...] = ()
    shown: tuple[SubnetBody, ...] = ()
    """The subnets as the user requested them, without gateways that Skep has chosen.  Empty to show ``configs``."""
    ipam_driver: str = "default"
    ipam_options: Mapping[str, str] | None = None
    is_configuration: bool = False
    config_from: str = ""
    """Name of the ``--config-only`` network with its settings, or empty."""
    is_internal: bool = False
    is_attachable: bool = False
    has_ipv6: bool = False
    options: Mapping[str, str] = {}
    labels: Mapping[str, str] = {}
    made: str = ""
    """Kind of the parent device if the node creates the device, otherwise empty."""
    cluster_id: str = ""
    """Id of the cluster network that this network implements on this node, or empty for one of the node's own."""


def facts_of(network: LocalNetwork, *, is_used: bool) -> NetworkFacts:
    """Return the properties that filters test."""
    return NetworkFacts(
        id=network.id,
        name=network.name,
        driver=network.driver,
        scope=LOCAL,
        labels=network.labels,
        is_used=is_used,
    )


def flat_form(network: LocalNetwork, containers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the network as ``/networks`` shows it."""
    return {
        "Name": network.name,
        "Id": network.id,
        "Created": network.created_at,
        "Scope": LOCAL,
        "Driver": network.driver,
        "EnableIPv4": True,
        "EnableIPv6": network.has_ipv6,
        "IPAM": {
            "Driver": network.ipam_driver,
            "Options": network.ipam_options,
            "Config": _shown(network),
        },
        "Internal": network.is_internal,
        "Attachable": network.is_attachable,
        "Ingress": False,
        "ConfigFrom": {"Network": network.config_from},
        "ConfigOnly": network.is_configuration,
        "Containers": containers,
        "Options": network.options,
        "Labels": network.labels,
    }


def _shown(network: LocalNetwork) -> list[SubnetBody]:
    """Return, for each IP version, the subnets that the user requested, or else the chosen one."""
    found: list[SubnetBody] = []
    for settled in network.configs or network.shown:
        named = [one for one in network.shown if (":" in one.subnet) is (":" in settled.subnet)]
        found += named or [settled]
    return found


def subnets_of(network: LocalNetwork) -> list[Subnet]:
    """Return a user network's IPv4 subnet, then its IPv6 subnet if it has one."""
    return [ip_network(one.subnet) for one in network.configs]


def is_chosen(network: LocalNetwork, version: int) -> bool:
    """Return whether the user has chosen the network's subnet of this IP version."""
    return any((":" in one.subnet) is (version == 6) for one in network.shown)


def head_of(network: LocalNetwork) -> NetworkHead:
    """Return the network's head in the form that overlays use.  It has no other nodes."""
    parent = parent_of(network)
    return NetworkHead(
        id=NetworkId(network.id),
        name=network.name,
        segments=tuple(Segment(one.subnet, one.gateway, 0) for one in network.configs),
        mtu=int(network.options.get(MTU_OPTION) or (0 if parent is not None else MTU)),
        is_internal=network.is_internal or (parent is not None and parent.made == DUMMY),
        parent=parent,
    )


def parent_of(network: LocalNetwork) -> ParentLink | None:
    """Return the parent device of a network, or None for a bridge network."""
    if network.driver not in PARENT_MODES:
        return None
    mode = network.options.get(f"{network.driver}_mode") or PARENT_MODES[network.driver][0]
    return ParentLink(kind=network.driver, device=device_of(network), mode=mode, made=network.made)


def device_of(network: LocalNetwork) -> str:
    """Return the name of a network's parent device: the user's choice, else a dummy device for this network."""
    return network.options.get(PARENT_OPTION) or f"{DUMMIES[network.driver]}-{network.id[:12]}"


def is_local(id: str) -> bool:
    """Return whether an id belongs to a node's own network.

    It has 64 digits then.  Ids of cluster networks have 25 characters.
    """
    return len(id) == LOCAL_ID_LENGTH


def find(networks: Sequence[LocalNetwork], word: str) -> LocalNetwork | None:
    """Find a network by its full id, else by name, else by a unique id prefix."""
    for network in networks:
        if network.id == word:
            return network
    for network in networks:
        if network.name == word:
            return network
    beginning = [network for network in networks if word and network.id.startswith(word)]
    return beginning[0] if len(beginning) == 1 else None
