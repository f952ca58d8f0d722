"""A node's own networks as objects: what ``docker network ls`` shows of scope local.

A node without a Docker Engine has the three that Docker always has, its gateway bridge under Docker's name, and
configurations (``--config-only``) from which a cluster's network may take its settings.  Bridge networks are for
plain containers, which only an engine runs; where there is one, such networks are the engine's.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from skep.api.networks import LOCAL, Facts, SubnetBody
from skep.model.times import Timestamp

GATEWAY: Final = "docker_gwbridge"
"""Docker's name of the bridge by which containers on overlay networks reach the world."""


class LocalNetwork(msgspec.Struct, frozen=True, kw_only=True):
    """One network of the node.  ``id``: 64 hexadecimal digits, the same over restarts."""

    id: str
    name: str
    driver: str
    created_at: Timestamp
    configs: tuple[SubnetBody, ...] = ()
    ipam_driver: str = "default"
    ipam_options: Mapping[str, str] | None = None
    is_configuration: bool = False
    has_ipv6: bool = False
    options: Mapping[str, str] = {}
    labels: Mapping[str, str] = {}


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
            "Config": list(network.configs),
        },
        "Internal": False,
        "Attachable": False,
        "Ingress": False,
        "ConfigFrom": {"Network": ""},
        "ConfigOnly": network.is_configuration,
        "Containers": containers,
        "Options": network.options,
        "Labels": network.labels,
    }


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
