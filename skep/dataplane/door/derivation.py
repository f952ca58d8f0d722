"""Derives the state of HAProxy on this node from the table of the door's network.  Pure."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from msgspec.structs import replace

from skep.dataplane.door.configuration import (
    DoorState,
    RouteBackend,
    ServerLine,
    backend_name,
    key_of,
    slotted,
)
from skep.model.door.claims import Claimant, settled
from skep.model.door.payloads import NOTHING, DoorPayload
from skep.model.door.routes import HttpRoute, has_routes, routes_of
from skep.model.door.settings import DOOR_MEASURES, DoorSettings, is_door, settings_of
from skep.model.networks.tables import NetworkTable, TableEndpoint, TableService
from skep.model.options.autoscaling import wakes_on_request
from skep.model.staging.shares import shares_of
from skep.model.values.ids import NodeId, ServiceId
from skep.model.values.stacks import STACK_LABEL


def proxies_on(table: NetworkTable, node_id: NodeId) -> list[TableEndpoint]:
    """Return the door's own tasks on a node."""
    proxies = {id for id, one in table.services.items() if is_door(one.labels)}
    return [one for one in table.endpoints.values() if one.node_id == node_id and one.service_id in proxies]


def counted_services(table: NetworkTable) -> frozenset[ServiceId]:
    """Return the services whose requests are counted for autoscaling."""
    counted = (id for id, one in table.services.items() if any(name in one.labels for name in DOOR_MEASURES))
    return frozenset(counted)


def claimant(service: TableService) -> Claimant:
    """Return a service with its routes."""
    return Claimant(
        id=service.id,
        name=service.name,
        stack=service.labels.get(STACK_LABEL, ""),
        created_at=service.created_at,
        routes=routes_of(service.labels),
    )


def state_of(
    table: NetworkTable,
    before: DoorState,
    settings: DoorSettings | None = None,
    payload: DoorPayload = NOTHING,
    *,
    has_ipv6: bool = False,
    lost: Collection[str] = (),
) -> DoorState:
    """Return what HAProxy serves.  Tasks of ``before`` keep their server lines.

    Args:
        has_ipv6: Whether the kernel of this node has IPv6.
        lost: Tasks whose server lines stay, without requests, until the connections to them have ended.
        payload: Certificates and challenges.
        settings: Used instead of the labels of the door's service.
    """
    exposed = [claimant(one) for one in table.services.values() if has_routes(one.labels)]
    claims = settled(exposed)
    servers = _servers(table, claims.accepted)
    routes: dict[str, str] = {}
    backends: dict[str, RouteBackend] = {}
    for id, accepted in claims.accepted.items():
        for route in accepted:
            is_secure = route.host in payload.certificates and route.options.tls != "off"
            name = routes[key_of(route)] = backend_name(id, route, is_secure=is_secure)
            if name not in backends:
                backend = _backend(name, id, route, before.backends.get(name), servers[id], lost)
                holds = wakes_on_request(table.services[id].labels)
                backends[name] = replace(backend, is_secure=is_secure, holds=holds)
    if settings is None:
        door = min(filter(lambda one: is_door(one.labels), table.services.values()), key=_age, default=None)
        settings = settings_of(door.labels) if door is not None else DoorSettings()
    return DoorState(
        settings=replace(settings, has_ipv6=has_ipv6),
        backends=backends,
        routes=routes,
        certificates=payload.certificates,
        challenges=payload.challenges,
    )


def _age(service: TableService) -> tuple[str, str]:
    return service.created_at, service.id


def _backend(
    name: str,
    service: ServiceId,
    route: HttpRoute,
    before: RouteBackend | None,
    servers: Sequence[ServerLine],
    lost: Collection[str],
) -> RouteBackend:
    former = before.servers if before is not None else ()
    present = {one.task for one in servers}
    silent = [replace(one, is_ready=False) for one in former if one.task in lost and one.task not in present]
    return RouteBackend(
        name=name,
        service=service,
        options=route.options,
        stripped=route.path if route.options.strip_prefix else "",
        servers=slotted(former, [*servers, *silent]),
    )


def _servers(
    table: NetworkTable, accepted: Mapping[ServiceId, object]
) -> Mapping[ServiceId, list[ServerLine]]:
    running: dict[ServiceId, list[TableEndpoint]] = {id: [] for id in accepted}
    for one in table.endpoints.values():
        if one.service_id in running and one.addresses and one.is_running:
            running[one.service_id].append(one)
    return {id: [*_lines(table.services[id], tasks)] for id, tasks in running.items()}


def _lines(service: TableService, running: Iterable[TableEndpoint]) -> Iterator[ServerLine]:
    """Yield the server line of each running task.  Tasks without a share of the connections are not ready."""
    tasks = tuple(running)
    shares = shares_of(service, (one for one in tasks if one.gets_connections and not one.is_left_out))
    weights = {one.task_id: weight for one, weight in shares.weighted()}
    versions = service.split.versions if service.split is not None else ()
    for one in tasks:
        yield ServerLine(
            task=one.task_id,
            address=one.addresses[0],
            is_ready=one.task_id in weights,
            weight=weights.get(one.task_id, 1),
            is_new=one.version in versions,
        )
