"""Registry credentials of services: kept apart from their specs, used for the tasks that are placed from now on.

They are kept with the registry that they were given for, and sent to no other: an update may change the image, and
the user who updates a service need not be the one whose credentials it has.
"""

from skep.errors import InvalidArgument
from skep.model.registry_auth import address_of, bound_auth, has_credentials, is_for
from skep.model.service import Service, ServiceSpec
from skep.store.interface import Transaction, View
from skep.store.kinds import Payload, previous_registry_auth_id, registry_auth_id


def auth_of(tx: Transaction, payload_id: str) -> str:
    """The ``X-Registry-Auth`` kept under this id; empty for none."""
    payload = tx.rely_on(Payload, payload_id)
    return payload.data.decode() if payload is not None else ""


def shown_auth(view: View, service_id: str) -> str:
    """The credentials that a service has; empty for none."""
    payload = view.lookup(Payload, registry_auth_id(service_id))
    return payload.data.decode(errors="replace") if payload is not None else ""


def keep_auth(tx: Transaction, payload_id: str, auth: str) -> None:
    """Keep it under this id, in place of what is there.  Raises: InvalidArgument: it is not UTF-8."""
    if auth:
        try:
            tx.put(Payload(id=payload_id, data=auth.encode()))
        except UnicodeEncodeError:
            raise InvalidArgument("X-Registry-Auth is no base64") from None
    elif tx.lookup(Payload, payload_id) is not None:
        tx.delete(Payload, payload_id)


def auth_for(spec: ServiceSpec, *auths: str) -> str:
    """The first of ``auths`` that is for the registry of the service's image; empty for none."""
    return next((auth for auth in auths if auth and is_for(address_of(auth), _image_of(spec))), "")


def with_registry(spec: ServiceSpec, auth: str) -> str:
    """``auth`` with the registry that it is for, so that no later image of the service is pulled with it.

    That is the registry of the image in ``spec``, unless the client names another.
    """
    return bound_auth(auth, _image_of(spec)) if auth else ""


def dropped_warnings(view: View, service: Service, given: str, kept: str) -> list[str]:
    """A sentence if ``service`` has just lost its registry credentials.

    Args:
        given: the credentials of the request, which count before those kept.
        kept: what the service had.
    """
    if not has_credentials(given or kept) or view.lookup(Payload, registry_auth_id(service.id)) is not None:
        return []
    image = _image_of(service.spec)
    return [f"image {image} is pulled without credentials: those of the service are for another registry"]


def follow_rollback(tx: Transaction, service: Service) -> None:
    """The credentials of ``service`` as it is before it returns to its previous spec, for afterwards.

    The newest stay, since those of the previous spec may have expired (Docker returns to them); those of the previous
    spec come back with an image of another registry, which the newest are not for.
    """
    assert service.previous_spec is not None, "it is what the service returns to"
    current, previous = registry_auth_id(service.id), previous_registry_auth_id(service.id)
    newest = with_registry(service.spec, auth_of(tx, current))
    older = with_registry(service.previous_spec, auth_of(tx, previous))
    keep_auth(tx, current, auth_for(service.previous_spec, newest, older))
    keep_auth(tx, previous, newest)


def _image_of(spec: ServiceSpec) -> str:
    container = spec.task_template.container_spec
    return container.image if container is not None else ""
