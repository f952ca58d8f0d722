"""Errors of decisions, in the message of the service's update, before the update's own message."""

from msgspec.structs import replace

from skep.model.service import Service, UpdateState, UpdateStatus
from skep.model.values.ids import ServiceId
from skep.store.interface import Transaction

FAILED = "orchestration failed"
"""First words of a service's message when its decision raised an error."""
UPDATE_SEPARATOR = "; the update: "
"""Separates such an error from the message of the service's update."""


def has_error(service: Service | None, error: str = "") -> bool:
    """Whether the service shows ``error``, or by default any error of an earlier decision."""
    status = service.update_status if service is not None else None
    return status is not None and status.message.startswith(f"{FAILED}: {error}")


def _own_message(status: UpdateStatus) -> str:
    """Return the message of the update itself, such as a pause, whose cause is stored nowhere else."""
    if not status.message.startswith(FAILED):
        return status.message
    return status.message.rpartition(UPDATE_SEPARATOR)[2] if UPDATE_SEPARATOR in status.message else ""


def set_error(tx: Transaction, service_id: ServiceId, error: str) -> None:
    """Write the error of a decision to the service, before the update's own message."""
    service = tx.lookup(Service, service_id)
    if service is not None:
        status = service.update_status or UpdateStatus()
        own = _own_message(status)
        message = f"{FAILED}: {error}" + (f"{UPDATE_SEPARATOR}{own}" if own else "")
        tx.put(replace(service, update_status=replace(status, message=message)))


def clear_error(tx: Transaction, service_id: ServiceId) -> None:
    """Clear the error and keep the update's own message."""
    service = tx.lookup(Service, service_id)
    if service is not None and service.update_status is not None and has_error(service):
        status = service.update_status
        own = _own_message(status) or ("update in progress" if status.state is UpdateState.UPDATING else "")
        status = replace(status, message=own)
        tx.put(replace(service, update_status=status if status.state is not None else None))
