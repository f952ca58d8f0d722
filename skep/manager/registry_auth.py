"""Registry credentials of services: kept apart from their specs, used for the tasks that are placed from now on."""

from skep.errors import InvalidArgument
from skep.model.images import registry_of
from skep.model.service import Service
from skep.store.interface import Transaction
from skep.store.kinds import Payload, previous_registry_auth_id, registry_auth_id


def auth_of(tx: Transaction, payload_id: str) -> str:
    """The ``X-Registry-Auth`` kept under this id; empty for none."""
    payload = tx.rely_on(Payload, payload_id)
    return payload.data.decode() if payload is not None else ""


def keep_auth(tx: Transaction, payload_id: str, auth: str) -> None:
    """Keep it under this id, in place of what is there.  Raises: InvalidArgument: it is not UTF-8."""
    if auth:
        try:
            tx.put(Payload(id=payload_id, data=auth.encode()))
        except UnicodeEncodeError:
            raise InvalidArgument("X-Registry-Auth is no base64") from None
    elif tx.lookup(Payload, payload_id) is not None:
        tx.delete(Payload, payload_id)


def follow_rollback(tx: Transaction, service: Service) -> None:
    """The credentials of ``service`` as it is before it returns to its previous spec, for afterwards.

    The newest stay, since those of the previous spec may have expired (Docker returns to them); those of the previous
    spec come back with an image of another registry, which the newest are not for.
    """
    assert service.previous_spec is not None, "it is what the service returns to"
    current, previous = registry_auth_id(service.id), previous_registry_auth_id(service.id)
    newest, older = auth_of(tx, current), auth_of(tx, previous)
    images = [spec.task_template.container_spec for spec in (service.spec, service.previous_spec)]
    present, before = (registry_of(one.image) if one is not None else "" for one in images)
    keep_auth(tx, current, newest or older if present == before else older)
    keep_auth(tx, previous, newest)
