"""Registrations of services on machines outside of the cluster, as records in the store.

Each record is a payload, so no other API shows it, and managers of older versions ignore it.  The API writes them, and
the leader removes those whose lease is over (``manager.catalog.loop``).  Their number is bounded.

A registration never joins a service or registrations of another stack, because the readers of a service trust
its stack.  Names that differ only in case are the same name, as in DNS.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from skep.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from skep.manager.control.validation.names import check_dns_name
from skep.model.catalog import (
    REGISTRATIONS_MAX,
    STACK_REGISTRATIONS_MAX,
    TAGS_MAX,
    TEXT_MAX,
    TTL_S_MAX,
    TTL_S_MIN,
    ServiceRegistration,
)
from skep.model.networks.addresses import PORT_MAX, is_of_a_machine, parsed
from skep.model.service import Service
from skep.model.values.stacks import stack_of
from skep.store.interface import Transaction, View
from skep.store.kinds import Payload, read_record, write_record
from skep.store.level import REGISTRATIONS

PREFIX: Final = "registration/"
_TAG = re.compile(r"[!-~]+")


class RegistrationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A registration, and the number of its renewals, by which the leader notices each."""

    registration: ServiceRegistration = ServiceRegistration()
    renewals: int = 0


def name_of(registration: ServiceRegistration) -> str:
    """Return the name of a registration: ``postgres@db1``."""
    return f"{registration.service}@{registration.instance}"


def is_record(id: str) -> bool:
    """Return whether the payload with this id is a registration."""
    return id.startswith(PREFIX)


def records_in(view: View) -> Iterator[RegistrationRecord]:
    """Yield all registrations that can be read."""
    for payload in view.find(Payload):
        if is_record(payload.id):
            found = read_record(payload, RegistrationRecord())
            if found.registration.service:
                yield found


def record_in(view: View, name: str) -> RegistrationRecord:
    """Return the registration of this name.  Raises: NotFound."""
    found = read_record(view.lookup(Payload, PREFIX + name), RegistrationRecord())
    if not found.registration.service:
        raise NotFound(f"registration {name} not found")
    return found


def checked(registration: ServiceRegistration) -> ServiceRegistration:
    """Return the registration with its address in the usual form.  Raises: InvalidArgument."""
    check_dns_name(registration.service)
    check_dns_name(registration.instance)
    if not 0 < registration.port <= PORT_MAX:
        raise InvalidArgument(f"invalid port {registration.port}: expected 1 to {PORT_MAX}")
    if not TTL_S_MIN <= registration.ttl <= TTL_S_MAX:
        raise InvalidArgument(f"invalid lease of {registration.ttl} s: expected {TTL_S_MIN} to {TTL_S_MAX} s")
    if len(registration.tags) > TAGS_MAX:
        raise InvalidArgument(f"a registration can have at most {TAGS_MAX} tags")
    for tag in registration.tags:
        if len(tag) > TEXT_MAX or not _TAG.fullmatch(tag):
            raise InvalidArgument(
                f"invalid tag {tag[:TEXT_MAX]!r}: expected up to {TEXT_MAX} printable characters"
            )
    try:
        address = parsed(registration.address)
    except ValueError:
        raise InvalidArgument(
            f"invalid address {registration.address[:TEXT_MAX]!r}: expected an IP address"
        ) from None
    if not is_of_a_machine(address):
        raise InvalidArgument(f"invalid address {address}: expected an address that other machines reach")
    return msgspec.structs.replace(registration, address=str(address))


def register(tx: Transaction, registration: ServiceRegistration) -> None:
    """Add a registration, or replace it and renew its lease.

    Raises:
        FailedPrecondition: A manager is too old to end leases.
        AlreadyExists: The service, or a registration of it, belongs to another stack or has another spelling.
        ResourceExhausted: There are too many.
    """
    if tx.level < REGISTRATIONS:
        raise FailedPrecondition("registrations need managers of this version: upgrade the others first")
    _require_own_service(tx, registration)
    name = name_of(registration)
    found = read_record(tx.lookup(Payload, PREFIX + name), RegistrationRecord())
    others = [one.registration for one in records_in(tx)]
    for one in others:
        if one.service.lower() == registration.service.lower():
            _require_same(registration, one.service, one.stack)
            if (
                one.instance.lower() == registration.instance.lower()
                and one.instance != registration.instance
            ):
                raise AlreadyExists(f"instance {one.instance} of {one.service} exists: use this spelling")
    if not found.registration.service:
        _require_room(tx, registration.stack, others)
    write_record(
        tx, PREFIX + name, RegistrationRecord(registration=registration, renewals=found.renewals + 1)
    )


def _require_room(tx: Transaction, stack: str, others: Sequence[ServiceRegistration]) -> None:
    """Raises: ResourceExhausted."""
    if sum(is_record(payload.id) for payload in tx.find(Payload)) >= REGISTRATIONS_MAX:
        raise ResourceExhausted(
            f"a cluster can have at most {REGISTRATIONS_MAX} registrations: remove others first"
        )
    if stack and sum(one.stack == stack for one in others) >= STACK_REGISTRATIONS_MAX:
        raise ResourceExhausted(
            f"stack {stack} can have at most {STACK_REGISTRATIONS_MAX} registrations: remove others first"
        )


def _require_own_service(tx: Transaction, registration: ServiceRegistration) -> None:
    """Refuse a registration that would join a service of another stack.  Raises: AlreadyExists."""
    for service in tx.find(Service, name=registration.service):
        if service.removed_at is None:
            _require_same(registration, service.spec.name, stack_of(service.spec.labels))


def _require_same(registration: ServiceRegistration, service: str, stack: str) -> None:
    """Raises: AlreadyExists: ``registration`` has another stack, or another spelling of ``service``."""
    if registration.stack != stack:
        raise AlreadyExists(
            f"service {registration.service} belongs to another stack or to none: choose another name"
        )
    if registration.service != service:
        raise AlreadyExists(f"the service is called {service}: use this spelling")


def renew(tx: Transaction, name: str) -> None:
    """Renew the lease of a registration.

    Raises:
        NotFound: It does not exist.
        AlreadyExists: A service of the same name was created since, and belongs to another stack.  Or a registration of
            another stack was made at the same moment at another manager, and the catalog has that one.
    """
    found = record_in(tx, name)
    _require_own_service(tx, found.registration)
    same = found.registration.service.lower()
    first = next(one.registration for one in records_in(tx) if one.registration.service.lower() == same)
    _require_same(found.registration, first.service, first.stack)
    write_record(tx, PREFIX + name, msgspec.structs.replace(found, renewals=found.renewals + 1))


def deregister(tx: Transaction, name: str) -> None:
    """Remove a registration.  Raises: NotFound."""
    record_in(tx, name)
    tx.delete(Payload, PREFIX + name)


def expire(tx: Transaction, name: str, renewals: int) -> bool:
    """Remove a registration unless it was renewed since ``renewals``.  Return whether it was removed."""
    found = tx.rely_on(Payload, PREFIX + name)
    if found is None or read_record(found, RegistrationRecord()).renewals != renewals:
        return False
    tx.delete(Payload, PREFIX + name)
    return True
