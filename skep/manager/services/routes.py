"""The HTTP routes of the cluster's services, the refusal of taken routes, and the nodes with proxies."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set

from msgspec.structs import replace

from skep.aio.time_slices import SlicedWork
from skep.errors import InvalidArgument, RouteTaken, Unavailable
from skep.model.door import settings
from skep.model.door.claims import Claimant, Refusal, may_conflict, refusals, reserved, settled
from skep.model.door.routes import has_routes, http_labels, parsed_routes, routes_of
from skep.model.door.settings import is_door
from skep.model.door.traffic import UNREADABLE, RouteShown, RouteTraffic, with_traffic
from skep.model.network import Network
from skep.model.node import Node, is_lost
from skep.model.options.autoscaling import is_at_zero
from skep.model.quota import StackQuota
from skep.model.service import Service, ServiceSpec, UpdateState
from skep.model.staging.updates import stages_of
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, ServiceId
from skep.model.values.stacks import stack_of
from skep.model.values.times import Timestamp
from skep.store.interface import View


def check_routes(view: View, spec: ServiceSpec, id: ServiceId | None = None) -> None:
    """Refuse a spec with a route that another service has, or with a host that the quotas of stacks refuse.

    Raises: RouteTaken; Unavailable: the quotas cannot be read.

    Args:
        id: The service to update, or None for a new one.
    """
    wanted = routes_of(spec.labels)
    if not wanted:
        return
    present = view.lookup(Service, id) if id is not None else None
    _check_reserved(view, stack_of(spec.labels), {route.host for route in wanted}, present)
    # A second service with the same name is refused because of its name, with Docker's message, when it is stored.
    others = [
        claimant_of(service)
        for service in exposed(view)
        if service.id != id
        and service.spec.name.lower() != spec.name.lower()
        and may_conflict(wanted, http_labels(service.spec.labels).values())
    ]
    claimant = Claimant(id=id or ServiceId(""), name=spec.name, stack=stack_of(spec.labels), routes=wanted)
    for refusal in refusals(claimant, others).values():
        raise RouteTaken(refusal.reason, stack=refusal.stack, unnamed=refusal.unnamed)


def _check_reserved(view: View, stack: str, hosts: Set[str], present: Service | None) -> None:
    """Check hosts that a service does not have yet against the quotas of stacks.  Raises: RouteTaken; Unavailable."""
    is_in_it = present is not None and stack_of(present.spec.labels) == stack
    new = hosts - (hosts_in(present.spec) if present is not None and is_in_it else set())
    if not new:
        return
    for why in view.unreadable(StackQuota).values():
        raise Unavailable(
            f"a quota cannot be read here, so its hosts are unknown: {why}. Try again, which may reach another manager."
        )
    hosts_of = {one.spec.name: one.spec.hosts for one in view.find(StackQuota) if one.spec.hosts}
    for host in sorted(new):
        if (refusal := reserved(host, stack, hosts_of)) is not None:
            raise RouteTaken(refusal.reason, stack=refusal.stack, unnamed=refusal.unnamed)


def hosts_in(spec: ServiceSpec) -> set[str]:
    """Return the hosts of a service's routes."""
    return {route.host for route in routes_of(spec.labels)}


def route_problems(view: View, service: Service, sees: Callable[[str], bool]) -> Iterator[str]:
    """Yield a sentence for each route of a service that does not work.

    Args:
        sees: Returns whether the reader sees the services of a stack.
    """
    if problem := label_problem(service):
        yield problem
    wanted = routes_of(service.spec.labels)
    if not wanted:
        return
    others = [
        one
        for one in exposed(view)
        if one.id == service.id or may_conflict(wanted, http_labels(one.spec.labels).values())
    ]
    shown = _worded(settled(map(claimant_of, others)).refused.get(service.id, {}), sees)
    proxies = doors_in(view)
    door, has_proxy = _network_of(view, proxies), runs_a_proxy(view, proxies)
    tasks = [one for one in view.find(Task, service_id=service.id) if one.is_wanted]
    for route in wanted:
        if problem := route_problem(service, tasks, door, shown, route.address, has_proxy=has_proxy):
            yield f"route {route.address}: {problem}"


def shown_routes(
    view: View,
    sees: Callable[[str], bool],
    traffic: Iterable[RouteTraffic],
    expires: Callable[[str], Timestamp],
) -> SlicedWork[list[RouteShown]]:
    """Return the routes that a reader sees, in order.  Pauses for the event loop.

    Args:
        sees: Returns whether the reader sees the services of a stack.
        expires: Returns the end of a host's certificate, or an empty text.
    """
    counted = {(one.service_id, one.route): one for one in traffic}
    services, proxies = list(exposed(view)), doors_in(view)
    claims, door = settled(map(claimant_of, services)), _network_of(view, proxies)
    has_proxy = runs_a_proxy(view, proxies)
    found = []
    for service in services:
        yield
        if not sees(stack_of(service.spec.labels)):
            continue
        tasks = [one for one in view.find(Task, service_id=service.id) if one.is_wanted]
        refused = _worded(claims.refused.get(service.id, {}), sees)
        if problem := label_problem(service):
            found.append(_shown(service, UNREADABLE, tasks, problem))
        for route in routes_of(service.spec.labels):
            problem = route_problem(service, tasks, door, refused, route.address, has_proxy=has_proxy)
            shown = replace(
                _shown(service, route.address, tasks, problem),
                port=route.options.port,
                certificate_expires=expires(route.host),
            )
            found.append(with_traffic(shown, counted.get((service.id, route.address))))
    return sorted(found, key=lambda one: (one.route, one.service))


def _shown(service: Service, route: str, tasks: Sequence[Task], problem: str) -> RouteShown:
    return RouteShown(
        route=route,
        service=service.spec.name,
        service_id=service.id,
        tasks=len(tasks),
        state="failing" if problem else "at zero" if is_at_zero(service.spec) else "ok",
        problem=problem,
        new_percent=service.split.percent if service.split is not None else None,
    )


def door_network(view: View) -> Network | None:
    """Return the front door's network, or None without proxies: it stays while services with routes use it."""
    return _network_of(view, doors_in(view))


def _network_of(view: View, proxies: Collection[ServiceId]) -> Network | None:
    """Return the front door's network, with ``proxies`` from ``doors_in``."""
    services = (view.lookup(Service, id) for id in proxies)
    if not any(one is not None and one.removed_at is None for one in services):
        return None
    return settings.door_network(view.find(Network))


def runs_a_proxy(view: View, proxies: Collection[ServiceId]) -> bool:
    """Return whether a task of ``proxies`` runs on a node that is not down."""
    return any(not is_lost(view.lookup(Node, id)) for id in proxies_in(view, proxies))


def doors_in(view: View) -> frozenset[ServiceId]:
    """Return the services whose tasks are proxies."""
    return frozenset(service.id for service in view.find(Service) if is_door(service.spec.labels))


def proxies_in(view: View, doors: Collection[ServiceId]) -> frozenset[NodeId]:
    """Return the nodes on which a task of ``doors`` runs.

    Only these nodes are believed about requests over the front door.
    """
    tasks = (task for id in sorted(doors) for task in view.find(Task, service_id=id))
    return frozenset(
        task.node_id for task in tasks if task.is_wanted and task.status.state is TaskState.RUNNING
    )


def _worded(refused: Mapping[str, Refusal], sees: Callable[[str], bool]) -> dict[str, Refusal]:
    """Return refusals without the names of services that the reader does not see."""
    return {
        address: one if sees(one.stack) else replace(one, reason=one.unnamed)
        for address, one in refused.items()
    }


def exposed(view: View) -> Iterator[Service]:
    """Yield the services with routes."""
    for service in view.find(Service):
        if service.removed_at is None and has_routes(service.spec.labels):
            yield service


def claimant_of(service: Service) -> Claimant:
    """Return a service with its routes."""
    return Claimant(
        id=service.id,
        name=service.spec.name,
        stack=stack_of(service.spec.labels),
        created_at=service.created_at,
        routes=routes_of(service.spec.labels),
    )


# -- problems ----------------------------------------------------------------------------------------------------


def label_problem(service: Service) -> str:
    """Return the error in the labels of a service's routes, or an empty text."""
    try:
        parsed_routes(service.spec.labels)
    except InvalidArgument as error:
        return str(error)
    return ""


def route_problem(
    service: Service,
    tasks: Collection[Task],
    door: Network | None,
    refused: Mapping[str, Refusal],
    address: str,
    *,
    has_proxy: bool,
) -> str:
    """Return why a route of ``service`` does not work, with the next step, or an empty text.

    Args:
        tasks: Tasks of the service that shall run.
        door: The network of the front door, or None without a front door.
        refused: Refused routes of the service.
        address: Host and path of the route.
        has_proxy: Whether a proxy runs.
    """
    if door is None:
        return "there is no front door. Create it with skep door up"
    if (refusal := refused.get(address)) is not None:
        return refusal.reason
    if not has_proxy:
        return "no proxy of the front door runs. Run skep door status"
    if is_at_zero(service.spec):
        return ""
    present = [task for task in tasks if task.status.state is TaskState.RUNNING]
    if not present:
        return "no task of the service runs"
    away = [task for task in present if not is_attached(task, door)]
    if away:
        return (
            f"{len(away)} of {len(present)} tasks {'is' if len(away) == 1 else 'are'} not on the network "
            f"{door.spec.name}, and older than the route or the front door. {_replacement(service)}"
        )
    return ""


def _replacement(service: Service) -> str:
    """Return what replaces tasks.  A forced update would begin a staged update in progress once more."""
    status = service.update_status
    is_updating = status is not None and status.state in (UpdateState.UPDATING, UpdateState.PAUSED)
    if is_updating and stages_of(service.spec.labels):
        return f"The update in progress replaces them (skep explain {service.spec.name})"
    return f"Replace them with docker service update --force {service.spec.name}"


def is_attached(task: Task, network: Network) -> bool:
    """Return whether the task is on the network."""
    return any(one.network is not None and one.network.id == network.id for one in task.networks_attachments)
