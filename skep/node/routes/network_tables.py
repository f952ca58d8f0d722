"""What a worker can say of a network from its table: who takes part, and its services with their tasks."""

from typing import Any

from skep.api.network_form import endpoint_id
from skep.model.tables import Table, TableEndpoint, TableService


def peers(table: Table) -> list[dict[str, str]]:
    """``Peers`` of ``docker network inspect``; a table knows nodes by their ids."""
    return [{"Name": node.id, "IP": node.underlay} for _, node in sorted(table.nodes.items())]


def services(table: Table) -> dict[str, Any]:
    """``Services`` of ``docker network inspect --verbose``; plain containers stand under no name."""
    shown: dict[str, Any] = {
        service.name: _entry(service, table) for _, service in sorted(table.services.items())
    }
    plain = [_line(one, table) for _, one in sorted(table.endpoints.items()) if not one.service_id]
    if plain:
        shown[""] = {"VIP": "<nil>", "Ports": [], "LocalLBIndex": 0, "Tasks": plain}
    return shown


def _entry(service: TableService, table: Table) -> dict[str, Any]:
    return {
        "VIP": service.virtual_ips[0] if service.virtual_ips else "<nil>",
        "Ports": [f"Target: {port.target}, Publish: {port.published}" for port in service.ports],
        "LocalLBIndex": 0,
        "Tasks": [
            _line(one, table) for _, one in sorted(table.endpoints.items()) if one.service_id == service.id
        ],
    }


def _line(endpoint: TableEndpoint, table: Table) -> dict[str, Any]:
    node = table.nodes.get(endpoint.node_id)
    return {
        "Name": endpoint.name,
        "EndpointID": endpoint_id(endpoint.task_id, table.head.id),
        "EndpointIP": endpoint.addresses[0] if endpoint.addresses else "",
        "Info": {"Host IP": node.underlay if node is not None else ""},
    }
