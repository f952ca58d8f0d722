"""Removal of a service by a user, or at the end of a job's time to live."""

from msgspec.structs import replace

from skep.manager.services.spec_history import forget_specs
from skep.model.service import Service
from skep.model.values.times import Timestamp
from skep.store.interface import Transaction
from skep.store.kinds import Payload, previous_registry_auth_id, registry_auth_id


def hide_service(tx: Transaction, service: Service, now: Timestamp) -> None:
    """Hide a service and free its name, ports, references and credentials.  The hidden record owns its tasks.

    The leader deletes the record after the last task.
    """
    for payload_id in (registry_auth_id(service.id), previous_registry_auth_id(service.id)):
        if tx.lookup(Payload, payload_id) is not None:
            tx.delete(Payload, payload_id)
    forget_specs(tx, service.id)
    tx.put(replace(service, removed_at=now))
