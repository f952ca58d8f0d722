"""Registry credentials of services, stored separately from their specs and used for newly placed tasks.

They are stored with their registry and never sent to another one.  This matters because an update may change the image,
and the user who updates a service may not be the user who provided the credentials.
"""

from skep.errors import InvalidArgument
from skep.model.permissions.registry_auth import address_of, bound_auth, has_credentials, is_for
from skep.model.service import Service, ServiceSpec
from skep.store.interface import Transaction, View
from skep.store.kinds import Payload, previous_registry_auth_id, registry_auth_id


def auth_of(tx: Transaction, payload_id: str) -> str:
    """Return the ``X-Registry-Auth`` stored under this id, or an empty text."""
    payload = tx.rely_on(Payload, payload_id)
    return payload.data.decode() if payload is not None else ""


def shown_auth(view: View, service_id: str) -> str:
    """Return the credentials of a service, or an empty text."""
    payload = view.lookup(Payload, registry_auth_id(service_id))
    return payload.data.decode(errors="replace") if payload is not None else ""


def keep_auth(tx: Transaction, payload_id: str, auth: str) -> None:
    """Store credentials under this id, or delete it if they are empty.  Raises: InvalidArgument: they are not UTF-8."""
    if auth:
        try:
            tx.put(Payload(id=payload_id, data=auth.encode()))
        except UnicodeEncodeError:
            raise InvalidArgument("the header X-Registry-Auth is not base64") from None
    elif tx.lookup(Payload, payload_id) is not None:
        tx.delete(Payload, payload_id)


def auth_for(spec: ServiceSpec, *auths: str) -> str:
    """Return the first of ``auths`` for the registry of the service's image, or an empty text."""
    return next((auth for auth in auths if auth and is_for(address_of(auth), _image_of(spec))), "")


def with_registry(spec: ServiceSpec, auth: str) -> str:
    """Return ``auth`` bound to its registry, so that it is not used for a later image from another registry.

    That is the registry of the image in ``spec``, unless the client names another.
    """
    return bound_auth(auth, _image_of(spec)) if auth else ""


def dropped_warnings(view: View, service: Service, given: str, kept: str) -> list[str]:
    """Return a warning if ``service`` has just lost its registry credentials.

    Args:
        given: Credentials of the request, which override the stored ones.
        kept: Credentials that the service had.
    """
    if not has_credentials(given or kept) or view.lookup(Payload, registry_auth_id(service.id)) is not None:
        return []
    image = _image_of(service.spec)
    return [
        f"image {image} is pulled without credentials: the service's credentials are for another registry"
    ]


def follow_rollback(tx: Transaction, service: Service) -> None:
    """Select the credentials of ``service`` for its rollback, before it returns to its previous spec.

    The newest credentials stay, because the previous spec's, which Docker would restore, may have expired.  If
    the previous image is in another registry, the credentials of the previous spec are restored.
    """
    assert service.previous_spec is not None, "a rollback needs a previous spec"
    current, previous = registry_auth_id(service.id), previous_registry_auth_id(service.id)
    newest = with_registry(service.spec, auth_of(tx, current))
    older = with_registry(service.previous_spec, auth_of(tx, previous))
    keep_auth(tx, current, auth_for(service.previous_spec, newest, older))
    keep_auth(tx, previous, newest)


def _image_of(spec: ServiceSpec) -> str:
    container = spec.task_template.container_spec
    return container.image if container is not None else ""
