"""A node's own networks as objects: what ``docker network ls`` shows of scope local.

A node without a Docker Engine has the three that Docker always has, its gateway bridge under Docker's name,
configurations (``--config-only``) from which other networks may take their settings, and its users' bridge networks for
plain containers.  Where there is an engine, bridge networks are the engine's.
"""

from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Final

import msgspec

from skep.api.networks import LOCAL, Facts, SubnetBody
from skep.model.ids import NetworkId
from skep.model.network import MTU_OPTION
from skep.model.tables import NetworkHead, ParentLink, Segment
from skep.model.times import Timestamp

MTU: Final = 1500
LOCAL_ID_LENGTH: Final = 64
GATEWAY: Final = "docker_gwbridge"
"""Docker's name of the bridge by which containers on overlay networks reach the world."""


PARENT_OPTION: Final = "parent"
PARENT_MODES: Final[Mapping[str, tuple[str, ...]]] = {
    "macvlan": ("bridge", "private", "vepa", "passthru"),
    "ipvlan": ("l2", "l3", "l3s"),
}
"""Drivers of networks on the machine's own devices, with their modes, the default first."""


class LocalNetwork(msgspec.Struct, frozen=True, kw_only=True):
    """One network of the node.  ``id``: 64 hexadecimal digits, the same over restarts."""

    id: str
    name: str
    driver: str
    created_at: Timestamp
    configs: tuple[SubnetBody, ...] = ()
    shown: tuple[SubnetBody, ...] = ()
    """Its subnets as its user has named them, without the gateway that was chosen; empty: ``configs`` are shown."""
    ipam_driver: str = "default"
    ipam_options: Mapping[str, str] | None = None
    is_configuration: bool = False
    config_from: str = ""
    """Name of the configuration that its settings are from."""
    is_internal: bool = False
    is_attachable: bool = False
    has_ipv6: bool = False
    options: Mapping[str, str] = {}
    labels: Mapping[str, str] = {}
    cluster_id: str = ""
    """Id of the cluster's network that this is, on this node, for its tasks; empty: the node's own."""


def facts_of(network: LocalNetwork, *, is_used: bool) -> Facts:
    """What filters ask for."""
    return Facts(
        id=network.id,
        name=network.name,
        driver=network.driver,
        scope=LOCAL,
        labels=network.labels,
        is_used=is_used,
    )


def flat_form(network: LocalNetwork, containers: Mapping[str, Any]) -> dict[str, Any]:
    """The network in the form of ``/networks``."""
    return {
        "Name": network.name,
        "Id": network.id,
        "Created": network.created_at,
        "Scope": LOCAL,
        "Driver": network.driver,
        "EnableIPv6": network.has_ipv6,
        "IPAM": {
            "Driver": network.ipam_driver,
            "Options": network.ipam_options,
            "Config": list(network.shown or network.configs),
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


def subnet_of(network: LocalNetwork) -> IPv4Network:
    """Of a user's bridge network, which has one."""
    return IPv4Network(network.configs[0].subnet)


def gateway_of(network: LocalNetwork) -> IPv4Address:
    """The address of the bridge itself."""
    return IPv4Address(network.configs[0].gateway)


def head_of(network: LocalNetwork) -> NetworkHead:
    """A network as overlays have one: it has no other node to reach."""
    parent = parent_of(network)
    return NetworkHead(
        id=NetworkId(network.id),
        name=network.name,
        segments=(Segment(str(subnet_of(network)), str(gateway_of(network)), 0),),
        mtu=int(network.options.get(MTU_OPTION) or (0 if parent is not None else MTU)),
        is_internal=network.is_internal,
        parent=parent,
    )


def parent_of(network: LocalNetwork) -> ParentLink | None:
    """The machine's device that a network is on; None: it is a bridge network."""
    if network.driver not in PARENT_MODES:
        return None
    mode = network.options.get(f"{network.driver}_mode") or PARENT_MODES[network.driver][0]
    return ParentLink(kind=network.driver, device=network.options[PARENT_OPTION], mode=mode)


def is_local(id: str) -> bool:
    """Whether a network's id is one of a node's own: 64 digits, where the cluster's has 25, as in Docker."""
    return len(id) == LOCAL_ID_LENGTH


def find(networks: Sequence[LocalNetwork], word: str) -> LocalNetwork | None:
    """What a user means by ``word``: full id, else name, else the only one whose id begins so."""
    for network in networks:
        if network.id == word:
            return network
    for network in networks:
        if network.name == word:
            return network
    beginning = [network for network in networks if word and network.id.startswith(word)]
    return beginning[0] if len(beginning) == 1 else None
