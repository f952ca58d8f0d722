"""Converts a network of the cluster to the flat form of ``/networks``.

Source: moby 20.10, daemon/cluster/convert/network.go (BasicNetworkFromGRPC), api/types/types.go (NetworkResource).
"""

import hashlib
from typing import Any

from skep.api.formats.networks import SWARM, SubnetBody
from skep.model.network import IPAMOptions, Network, is_ingress
from skep.model.networks.data_planes import is_overlay
from skep.model.values.meta import Driver


def known_driver(network: Network) -> Driver:
    """Return the allocated driver, or before the allocation the requested one."""
    if network.driver_state.name:
        return network.driver_state
    return network.spec.driver_configuration or Driver()


def endpoint_id(user: str, network_id: str) -> str:
    """Return the endpoint id of a task or container on a network, which is the same on every node and at any time."""
    return hashlib.sha256(f"{network_id}/{user}".encode()).hexdigest()


def flat_form(network: Network) -> dict[str, Any]:
    """Return the network in the form of lists, without its containers."""
    spec, driver = network.spec, known_driver(network)
    requested = (
        spec.ipam_options if is_overlay(network) else None
    )  # the cluster allocates addresses for overlay networks only
    ipam = network.ipam_options or requested or IPAMOptions()
    return {
        "Name": spec.name,
        "Id": network.id,
        "Created": network.created_at,
        "Scope": SWARM,
        "Driver": driver.name,
        "EnableIPv4": True,
        "EnableIPv6": spec.ipv6_enabled,
        "IPAM": {
            "Driver": ipam.driver.name,
            "Options": dict(ipam.driver.options) or None,
            "Config": [
                SubnetBody(
                    subnet=config.subnet,
                    ip_range=config.range,
                    gateway=config.gateway,
                    auxiliary_addresses=config.auxiliary_addresses,
                )
                for config in ipam.configs
            ],
        },
        "Internal": spec.internal,
        "Attachable": spec.attachable,
        "Ingress": is_ingress(network),
        "ConfigFrom": {"Network": spec.config_from.network if spec.config_from else ""},
        "ConfigOnly": False,
        "Containers": None,
        "Options": dict(driver.options) or None,
        "Labels": dict(spec.labels) or None,
    }
