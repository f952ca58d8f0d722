"""A container's networks as the Engine API shows them: ``NetworkSettings``."""

import hashlib
from collections.abc import Mapping
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import Any, TypeAlias

from skep.engine.containers.container import Container, PlainOptions
from skep.engine.containers.request import ENDPOINT_SYSCTLS
from skep.model.networks.sandbox import Endpoint, NetworkMode

Interface: TypeAlias = IPv4Interface | IPv6Interface

_NO_NETWORK: dict[str, Any] = {
    "IPAMConfig": None,
    "Links": None,
    "Aliases": None,
    "NetworkID": "",
    "EndpointID": "",
    "Gateway": "",
    "IPAddress": "",
    "IPPrefixLen": 0,
    "IPv6Gateway": "",
    "GlobalIPv6Address": "",
    "GlobalIPv6PrefixLen": 0,
    "MacAddress": "",
    "DriverOpts": None,
    "DNSNames": None,
    "GwPriority": 0,
}


def network_settings(container: Container, ids: Mapping[str, str]) -> dict[str, Any]:
    """Return the container's addresses and ports, empty once it has ended, as in Docker.

    ``ids`` are the ids of the predefined networks by name.
    """
    sandbox = container.sandbox if container.is_running else None
    settings: dict[str, Any] = {
        "Bridge": "",
        "SandboxID": "",
        "HairpinMode": False,
        "LinkLocalIPv6Address": "",
        "LinkLocalIPv6PrefixLen": 0,
        "Ports": {},
        "SandboxKey": "",
        "SecondaryIPAddresses": None,
        "SecondaryIPv6Addresses": None,
        "EndpointID": "",
        "Gateway": "",
        "GlobalIPv6Address": "",
        "GlobalIPv6PrefixLen": 0,
        "IPAddress": "",
        "IPPrefixLen": 0,
        "IPv6Gateway": "",
        "MacAddress": "",
        "Networks": networks(container, ids),
    }
    if sandbox is None:
        return settings
    bound: dict[str, Any] = dict.fromkeys(container.config.exposed_ports)
    for port in sandbox.ports:
        key = f"{port.target_port}/{port.protocol}"
        bound[key] = [
            *(bound.get(key) or ()),
            {"HostIp": port.host_ip or "0.0.0.0", "HostPort": str(port.published_port)},
        ]
    settings |= {"SandboxID": container.id, "SandboxKey": sandbox.netns, "Ports": bound}
    if not sandbox.address or (sandbox.endpoints and not _is_on_bridge(container)):
        return settings  # Docker sets the following fields only for its own bridge
    return settings | {
        "Gateway": sandbox.gateway,
        "IPAddress": sandbox.address,
        "IPPrefixLen": sandbox.prefix_length,
        "MacAddress": sandbox.mac_address,
    }


def _is_on_bridge(container: Container) -> bool:
    """Return whether a plain container has chosen the node's bridge, and does not only use it for outgoing traffic."""
    return container.plain is not None and container.mode is NetworkMode.BRIDGE


def networks(container: Container, ids: Mapping[str, str]) -> dict[str, Any]:
    """Return the container's networks by name.  A task's gateway bridge only appears if it has no other network.

    Source: the responses of Docker 20.10 for a task on several overlays.
    """
    if container.plain is not None:
        return _of_plain(container, container.plain, ids)
    sandbox = container.sandbox
    if sandbox is None:
        return {}
    if sandbox.endpoints:
        return {endpoint.network_name: _overlay(container, endpoint) for endpoint in sandbox.endpoints}
    name = container.mode.value if container.mode is NetworkMode.HOST else sandbox.network or "bridge"
    return {name: _predefined(container, ids.get(name, ""))}


def _of_plain(container: Container, plain: PlainOptions, ids: Mapping[str, str]) -> dict[str, Any]:
    sandbox = container.sandbox if container.is_running else None
    if sandbox is None:
        others = {
            one.network: _NO_NETWORK
            | {
                "Aliases": list(one.aliases) or None,
                "Links": list(one.links) or None,
                "GwPriority": one.gw_priority,
                "DriverOpts": _driver_options(one.sysctls),
            }
            for one in plain.networks
        }
    else:
        others = {endpoint.network_name: _overlay(container, endpoint) for endpoint in sandbox.endpoints}
    if plain.mode in (NetworkMode.NETWORKS, NetworkMode.CONTAINER):
        return others
    name = plain.mode.value
    return {name: _predefined(container, ids.get(name, "")), **others}


def _predefined(container: Container, network_id: str) -> dict[str, Any]:
    """Return a predefined network's entry.  As in Docker, its id appears after the container's first start."""
    sandbox = container.sandbox if container.is_running else None
    shown = _NO_NETWORK | {"NetworkID": network_id if container.was_started else ""}
    if sandbox is None:
        return shown
    return shown | {
        "EndpointID": _endpoint_id(container, network_id, sandbox.port),
        "Gateway": sandbox.gateway,
        "IPAddress": sandbox.address,
        "IPPrefixLen": sandbox.prefix_length,
        "MacAddress": sandbox.mac_address,
    }


def networks_in_lists(container: Container, ids: Mapping[str, str]) -> dict[str, Any]:
    """Return the networks without names and links, which lists of containers leave out.

    Source: moby, container/view.go.
    """
    left_out = {"Aliases": None, "DNSNames": None, "Links": None}
    return {name: one | left_out for name, one in networks(container, ids).items()}


def _overlay(container: Container, endpoint: Endpoint) -> dict[str, Any]:
    held = [ip_interface(one) for one in endpoint.config.addresses]
    v4 = next((one for one in held if one.version == 4), None)
    v6 = next((one for one in held if one.version == 6), None)
    response = _NO_NETWORK | {
        "IPAMConfig": _requested(container, endpoint, v4, v6),
        "Aliases": list(_aliases(container, endpoint)) or None,
        "DNSNames": _dns_names(container, endpoint),
        "Links": list(endpoint.config.links) or None,
        "NetworkID": endpoint.network_id,
        "GwPriority": endpoint.config.gw_priority,
        "DriverOpts": _driver_options(endpoint.config.sysctls),
    }
    if not container.is_running:
        return response
    return response | {
        "EndpointID": _endpoint_id(container, endpoint.network_id, endpoint.port),
        "Gateway": endpoint.config.head.gateway,
        "IPv6Gateway": endpoint.config.head.gateway6,
        "IPAddress": str(v4.ip) if v4 is not None else "",
        "IPPrefixLen": v4.network.prefixlen if v4 is not None else 0,
        "GlobalIPv6Address": str(v6.ip) if v6 is not None else "",
        "GlobalIPv6PrefixLen": v6.network.prefixlen if v6 is not None else 0,
        "MacAddress": endpoint.mac_address,
    }


def _driver_options(sysctls: str) -> dict[str, str] | None:
    return {ENDPOINT_SYSCTLS: sysctls} if sysctls else None


def _requested(
    container: Container, endpoint: Endpoint, v4: Interface | None, v6: Interface | None
) -> dict[str, str] | None:
    """Return the addresses that the user chose.

    On cluster networks, return those from the managers, as Docker does.
    """
    if container.plain is not None and endpoint.config.head.is_of_node:
        names = (endpoint.network_id, endpoint.network_name)
        for one in container.plain.networks:
            if one.network in names and (one.address or one.address6):
                chosen = {"IPv4Address": one.address, "IPv6Address": one.address6}
                return {name: address for name, address in chosen.items() if address}
        return None
    given = {"IPv4Address": str(v4.ip)} if v4 is not None else {}
    return given | ({"IPv6Address": str(v6.ip)} if v6 is not None else {})


def _aliases(container: Container, endpoint: Endpoint) -> tuple[str, ...]:
    """Return the aliases that the user chose.  Omits aliases from a task's spec, which the cluster resolves."""
    return endpoint.config.aliases if container.plain is not None else ()


def _dns_names(container: Container, endpoint: Endpoint) -> list[str]:
    """Return the container's names on the network.

    Source: moby, daemon/container_operations.go (buildEndpointDNSNames).
    """
    own = (container.name, *_aliases(container, endpoint), container.id[:12], container.config.hostname)
    return list(filter(None, dict.fromkeys(own)))


def _endpoint_id(container: Container, network_id: str, port: str) -> str:
    """Return an endpoint id in Docker's form.

    It differs for each start, because it is derived from the bridge port's name.
    """
    text = f"{container.id} {network_id} {port}"
    return hashlib.sha256(text.encode()).hexdigest()
