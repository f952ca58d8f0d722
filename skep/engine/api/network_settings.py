"""The networks of a container as the Engine API shows them: ``NetworkSettings``."""

import hashlib
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import Any, TypeAlias

from skep.engine.container import Container
from skep.model.sandbox import Endpoint, NetworkMode

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
}


def network_settings(container: Container) -> dict[str, Any]:
    """Where it is reached; empty once it has ended, as in the engine."""
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
        "Networks": networks(container),
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
    if sandbox.endpoints or not sandbox.address:  # Docker fills these in for its own bridge only
        return settings
    return settings | {
        "Gateway": sandbox.gateway,
        "IPAddress": sandbox.address,
        "IPPrefixLen": sandbox.prefix_length,
        "MacAddress": sandbox.mac_address,
    }


def networks(container: Container) -> dict[str, Any]:
    """The container's networks by name; its way out shows only where it is all it has.

    Source: the responses of an engine of version 20.10 for a task on several overlays.
    """
    sandbox = container.sandbox if container.plain is None or container.is_running else None
    if sandbox is None:
        requested = container.plain.networks if container.plain is not None else ()
        return {
            one.network: _NO_NETWORK
            | {"Aliases": list(one.aliases) or None, "Links": list(one.links) or None}
            for one in requested
        } or _alone(container)
    if sandbox.endpoints:
        return {endpoint.network_name: _overlay(container, endpoint) for endpoint in sandbox.endpoints}
    is_up = container.is_running
    name = sandbox.network or "bridge"
    if container.plain is not None and container.mode in (NetworkMode.NETWORKS, NetworkMode.CONTAINER):
        return {}
    if container.plain is not None or container.mode is NetworkMode.HOST:
        name = container.mode.value
    return {
        name: {
            **_NO_NETWORK,
            "Gateway": sandbox.gateway if is_up else "",
            "IPAddress": sandbox.address if is_up else "",
            "IPPrefixLen": sandbox.prefix_length if is_up else 0,
            "MacAddress": sandbox.mac_address if is_up else "",
        }
    }


def networks_in_lists(container: Container) -> dict[str, Any]:
    """The same without aliases and links, which lists of containers leave out.

    Source: moby, container/view.go.
    """
    return {name: one | {"Aliases": None, "Links": None} for name, one in networks(container).items()}


def _alone(container: Container) -> dict[str, Any]:
    """Of a plain container that does not run and is to have none of its own."""
    if container.plain is None or container.plain.mode in (NetworkMode.NETWORKS, NetworkMode.CONTAINER):
        return {}
    return {container.plain.mode.value: _NO_NETWORK}


def _overlay(container: Container, endpoint: Endpoint) -> dict[str, Any]:
    held = [ip_interface(one) for one in endpoint.config.addresses]
    v4 = next((one for one in held if one.version == 4), None)
    v6 = next((one for one in held if one.version == 6), None)
    response = _NO_NETWORK | {
        "IPAMConfig": _requested(container, endpoint, v4, v6),
        "Aliases": _aliases(container, endpoint),
        "Links": list(endpoint.config.links) or None,
        "NetworkID": endpoint.network_id,
    }
    if not container.is_running:
        return response
    return response | {
        "EndpointID": _endpoint_id(container, endpoint),
        "Gateway": endpoint.config.head.gateway,
        "IPv6Gateway": endpoint.config.head.gateway6,
        "IPAddress": str(v4.ip) if v4 is not None else "",
        "IPPrefixLen": v4.network.prefixlen if v4 is not None else 0,
        "GlobalIPv6Address": str(v6.ip) if v6 is not None else "",
        "GlobalIPv6PrefixLen": v6.network.prefixlen if v6 is not None else 0,
        "MacAddress": endpoint.mac_address,
    }


def _requested(
    container: Container, endpoint: Endpoint, v4: Interface | None, v6: Interface | None
) -> dict[str, str] | None:
    """The addresses that its user chose; on the cluster's networks those that the managers gave, as in Docker."""
    if container.plain is not None and endpoint.config.head.is_of_node:
        names = (endpoint.network_id, endpoint.network_name)
        for one in container.plain.networks:
            if one.network in names and (one.address or one.address6):
                chosen = {"IPv4Address": one.address, "IPv6Address": one.address6}
                return {name: address for name, address in chosen.items() if address}
        return None
    given = {"IPv4Address": str(v4.ip)} if v4 is not None else {}
    return given | ({"IPv6Address": str(v6.ip)} if v6 is not None else {})


def _aliases(container: Container, endpoint: Endpoint) -> list[str]:
    """A task's do not have those of its spec, which the cluster resolves.

    Source: moby 20.10, daemon/container_operations.go (updateNetworkConfig).
    """
    id = container.id[:12]
    if container.plain is not None:
        return [*endpoint.config.aliases, id]
    hostname = container.config.hostname
    return [id, hostname] if hostname not in ("", id) else [id]


def _endpoint_id(container: Container, endpoint: Endpoint) -> str:
    """An id like Docker's, another one for each start: the port is."""
    text = f"{container.id} {endpoint.network_id} {endpoint.port}"
    return hashlib.sha256(text.encode()).hexdigest()
