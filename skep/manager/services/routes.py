"""The HTTP routes of the cluster's services, and the refusal of taken routes."""

from collections.abc import Iterator

from skep.errors import RouteTaken
from skep.model.door.claims import Claimant, may_conflict, refusals
from skep.model.door.routes import has_routes, http_labels, routes_of
from skep.model.history import stack_of
from skep.model.service import Service, ServiceSpec
from skep.model.values.ids import ServiceId
from skep.store.interface import View


def check_routes(view: View, spec: ServiceSpec, id: ServiceId | None = None) -> None:
    """Refuse a spec with a route that another service has.  Raises: RouteTaken.

    Args:
        id: The service to update, or None for a new one.
    """
    wanted = routes_of(spec.labels)
    if not wanted:
        return
    others = [
        claimant_of(service)
        for service in exposed(view)
        if service.id != id and may_conflict(wanted, http_labels(service.spec.labels).values())
    ]
    claimant = Claimant(id=id or ServiceId(""), name=spec.name, stack=stack_of(spec.labels), routes=wanted)
    for refusal in refusals(claimant, others).values():
        raise RouteTaken(refusal.reason, stack=refusal.stack, unnamed=refusal.unnamed)


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
