"""The containers of this node on its networks, in the form of ``docker network inspect``."""

from collections.abc import Collection, Iterable, Mapping
from ipaddress import IPv4Interface, ip_interface
from typing import Any

from skep.api.formats.network_form import endpoint_id
from skep.dataplane.addresses import mac_of
from skep.dataplane.local.objects import LocalNetwork
from skep.engine.containers.container import Container
from skep.model.network import Network
from skep.model.networks.data_planes import is_overlay
from skep.model.options.labels import LABEL_TASK_ID
from skep.model.task import AssignedTask, TaskState, TaskStatus
from skep.model.values.ids import TaskId


def networks_in_use(
    tasks: Mapping[TaskId, AssignedTask], statuses: Mapping[TaskId, TaskStatus]
) -> dict[str, Network]:
    """Return the overlay networks that this node's active tasks use, by id."""
    return {
        attachment.network.id: attachment.network
        for id, assigned in tasks.items()
        if id not in statuses or statuses[id].state <= TaskState.RUNNING
        for attachment in assigned.task.networks_attachments
        if attachment.network is not None and is_overlay(attachment.network)
    }


def meant_by(word: str, networks: Mapping[str, Network]) -> Network | None:
    """Return the network whose full id, name or unique id prefix is ``word``, in this order.  ``networks`` is by id."""
    by_name = {network.spec.name: network for network in networks.values()}
    if (exact := networks.get(word) or by_name.get(word)) is not None:
        return exact
    beginning = [network for id, network in networks.items() if word and id.startswith(word)]
    return beginning[0] if len(beginning) == 1 else None


def on_overlay(
    network_id: str, tasks: Mapping[TaskId, AssignedTask], containers: Collection[Container]
) -> dict[str, Any]:
    """Return the entries of ``Containers`` for an overlay network, by container id."""
    entries: dict[str, Any] = {}
    for container in containers:
        if container.plain is not None:
            entries |= on_bridge(network_id, (container,))
            continue
        assigned = tasks.get(TaskId(container.labels.get(LABEL_TASK_ID, "")))
        if assigned is None or not container.is_running:
            continue
        for attachment in assigned.task.networks_attachments:
            if attachment.network is not None and attachment.network.id == network_id:
                endpoint = endpoint_id(assigned.task.id, network_id)
                entries[container.id] = _entry(container.name, endpoint, attachment.addresses)
    return entries


def on_gateway(
    gateway: LocalNetwork, users: Iterable[str], containers: Collection[Container]
) -> dict[str, Any]:
    """Return the entries of ``Containers`` for the gateway bridge, with the endpoint names that Docker uses."""
    wanted = set(users)
    return {
        one.id: _entry(
            f"gateway_{one.id[:12]}",
            endpoint_id(one.id, gateway.id),
            (f"{one.sandbox.address}/{one.sandbox.prefix_length}",),
        )
        for one in containers
        if one.id in wanted and one.sandbox is not None
    }


def on_bridge(network_id: str, containers: Collection[Container]) -> dict[str, Any]:
    """Return the entries of ``Containers`` for a bridge network of plain containers."""
    return {
        one.id: _entry(one.name, endpoint_id(one.id, network_id), connected.config.addresses)
        for one in containers
        if one.plain is not None and one.is_running and one.sandbox is not None
        for connected in one.sandbox.endpoints
        if connected.network_id == network_id
    }


def on_builtin(network: LocalNetwork, containers: Collection[Container]) -> dict[str, Any]:
    """Return the entries of ``Containers`` for the networks ``bridge``, ``host`` and ``none``."""
    found: dict[str, Any] = {}
    for one in containers:
        plain, sandbox = one.plain, one.sandbox
        if plain is not None and sandbox is not None and one.is_running and plain.mode.value == network.name:
            addresses = (f"{sandbox.address}/{sandbox.prefix_length}",) if sandbox.address else ()
            found[one.id] = _entry(one.name, endpoint_id(one.id, network.id), addresses)
    return found


def _entry(name: str, endpoint: str, addresses: Iterable[str]) -> dict[str, Any]:
    found = [ip_interface(address) for address in addresses]
    four = next((one for one in found if isinstance(one, IPv4Interface)), None)
    six = next((one for one in found if not isinstance(one, IPv4Interface)), None)
    return {
        "Name": name,
        "EndpointID": endpoint,
        "MacAddress": mac_of(four.ip) if four is not None else "",
        "IPv4Address": str(four or ""),
        "IPv6Address": str(six or ""),
    }
