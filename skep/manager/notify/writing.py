"""Transactions of notifications: targets by the API, incidents and deliveries by the leader."""

from collections.abc import Sequence

from skep.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from skep.manager.control.validation.names import check_file_name
from skep.manager.notify.deliveries import claimed, settled
from skep.manager.notify.incidents import IncidentChanges, changed
from skep.manager.notify.records import (
    INCIDENTS_ID,
    TARGETS_ID,
    TARGETS_MAX,
    Delivery,
    Incidents,
    Target,
    Targets,
    delivery_id,
    delivery_in,
    incidents_in,
    targets_in,
)
from skep.model.options.notifications import STACK_TOPICS
from skep.store.interface import Transaction
from skep.store.kinds import Payload, write_record
from skep.store.level import NOTIFICATIONS

NAME_CHARACTERS_MAX = 64
"""Longest name of a target, as of a secret."""


def add_target(tx: Transaction, target: Target) -> Target:
    """Add a target.  Raises: InvalidArgument; AlreadyExists; FailedPrecondition: a manager is too old to notify it."""
    if tx.level < NOTIFICATIONS:
        raise FailedPrecondition("notifications need managers of this version: upgrade the others first")
    check_file_name(target.name)
    if target.stacks and (others := [one.value for one in target.topics if one not in STACK_TOPICS]):
        raise InvalidArgument(
            f"no stack has problems of the topic {', '.join(others)}: add a target without stacks for it"
        )
    present = targets_in(tx)
    if any(one.name == target.name for one in present):
        raise AlreadyExists(
            f"notification target {target.name} already exists: remove it first (skep notify rm {target.name})"
        )
    if len(present) >= TARGETS_MAX:
        raise InvalidArgument(f"a cluster can have at most {TARGETS_MAX} notification targets")
    _write_targets(tx, (*present, target))
    return target


def remove_target(tx: Transaction, name: str) -> None:
    """Remove a target.  Raises: NotFound."""
    present = targets_in(tx)
    removed = find_target(present, name)
    _write_targets(tx, tuple(one for one in present if one is not removed))
    if tx.rely_on(Payload, delivery_id(name)) is not None:
        tx.delete(Payload, delivery_id(name))


def find_target(targets: Sequence[Target], name: str) -> Target:
    """Return the target of this name.  Raises: NotFound."""
    for target in targets:
        if target.name == name:
            return target
    raise NotFound(f"notification target {name} not found")


def _write_targets(tx: Transaction, targets: tuple[Target, ...]) -> None:
    write_record(tx, TARGETS_ID, Targets(targets))


def write_changes(tx: Transaction, changes: IncidentChanges, now_ns: int) -> None:
    """Begin and end incidents, and queue their notices, in one transaction."""
    tx.rely_on(Payload, TARGETS_ID)
    targets = targets_in(tx)
    known = {one.name: delivery_in(tx, one) for one in targets}
    incidents, deliveries = changed(incidents_in(tx), known, targets, changes, now_ns)
    write_record(tx, INCIDENTS_ID, Incidents(incidents))
    for name, delivery in deliveries.items():
        write_record(tx, delivery_id(name), delivery)


def forget_incidents(tx: Transaction) -> None:
    """Forget all incidents after the last target was removed.  A later target starts with its own."""
    tx.rely_on(Payload, TARGETS_ID)
    if not targets_in(tx) and tx.rely_on(Payload, INCIDENTS_ID) is not None:
        tx.delete(Payload, INCIDENTS_ID)


def claim(tx: Transaction, target: Target, now_ns: int) -> Delivery | None:
    """Record the next message to a target before it is sent.  Returns None without one, or without the target."""
    delivery = _delivery(tx, target)
    if delivery is None:
        return None
    sending = claimed(delivery, now_ns)
    write_record(tx, delivery_id(target.name), sending)
    return sending if sending.sending else None


def settle(tx: Transaction, target: Target, number: int, error: str, now_ns: int, chance: float) -> None:
    """Record the result of an attempt."""
    delivery = _delivery(tx, target)
    if delivery is not None:
        write_record(tx, delivery_id(target.name), settled(delivery, number, error, now_ns, chance))


def _delivery(tx: Transaction, target: Target) -> Delivery | None:
    """Return the deliveries to a target that still exists, or None."""
    tx.rely_on(Payload, TARGETS_ID)
    return delivery_in(tx, target) if any(one.id == target.id for one in targets_in(tx)) else None
