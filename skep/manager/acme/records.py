"""Records of certificates in the store: the account at the authority, and one record per host name.

Each record is a payload, so it is encrypted, no API shows it, and managers of older versions ignore it.  The API writes
the account and asks for renewals, and the leader writes everything else.  All records are bounded.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import msgspec

from skep.store.interface import View
from skep.store.kinds import Payload, id_of_name, name_in_id, read_record

ACCOUNT_ID: Final = "acme/account"
NAMES_ID: Final = "acme/names"
NAMES_MAX = 1000
"""Largest number of names for which certificates are ordered.  The loop reads all records before each step."""
RECORDS_MAX = 2 * NAMES_MAX
"""Largest number of records.  Certificates that are not renewed stay until they expire."""


class AcmeAccount(msgspec.Struct, frozen=True, kw_only=True):
    """The account at an authority.

    Attributes:
        directory: URL of the authority's directory.
        roots: Trusted roots (PEM) for connections to the authority, or empty to use the roots of the system.
        key: Private key of the account (PEM).  It identifies the account, so it is stored before its first use.
        url: URL of the account, or empty before the authority knows it.
        failing_since_ns: Time of the first failure since the authority's last response, or 0.
    """

    email: str
    directory: str
    roots: str = ""
    key: str
    url: str = ""
    failures: int = 0
    error: str = ""
    failing_since_ns: int = 0
    retry_at_ns: int = 0

    def __repr__(self) -> str:
        return f"AcmeAccount(email={self.email!r}, directory={self.directory!r})"


class CertificateOrder(msgspec.Struct, frozen=True, kw_only=True):
    """An order that is not over.

    Attributes:
        key: Private key (PEM) of the certificate to issue.  It is stored before the order is sent, so the next leader
            can use the certificate.
        url: URL of the order, or empty before the authority has responded.
        challenges: Key authorizations by token, which the door serves.
        opened_ns: Time at which the challenges were stored.
        dns: Values of TXT records by name, which the leader's hook writes (DNS-01).
    """

    key: str
    began_ns: int
    url: str = ""
    challenges: dict[str, str] = {}
    dns: dict[str, str] = {}
    opened_ns: int = 0

    def __repr__(self) -> str:
        return f"CertificateOrder(url={self.url!r})"


class HostCertificate(msgspec.Struct, frozen=True, kw_only=True):
    """The certificate of one host name, its order and its failures.

    Attributes:
        pem: The certificate chain and its private key, as HAProxy reads them.  Empty without a certificate.
        authority: Directory of the certificate's authority.
        tried: Directory of the authority to which the order and the failures belong.
        renew_at_ns: Time from which it is renewed.
        retry_at_ns: Time before which nothing is ordered, after a failure and after a success.
        blocked_until_ns: Time until which the authority refuses orders (``Retry-After``), whoever asks for them.
        is_asked: Whether a user has asked for a renewal.
        ask_at_ns: Time from which the authority is asked when to renew it (RFC 9773).
        left: Values of TXT records by name that former orders have left in the zone.
    """

    name: str
    pem: str = ""
    authority: str = ""
    tried: str = ""
    not_before_ns: int = 0
    not_after_ns: int = 0
    renew_at_ns: int = 0
    order: CertificateOrder | None = None
    failures: int = 0
    error: str = ""
    failing_since_ns: int = 0
    retry_at_ns: int = 0
    blocked_until_ns: int = 0
    is_asked: bool = False
    ask_at_ns: int = 0
    left: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"HostCertificate(name={self.name!r})"


class KnownNames(msgspec.Struct, frozen=True):
    """The names with a record, sorted."""

    names: tuple[str, ...] = ()


def record_id(name: str) -> str:
    """Return the id of the payload with the record of a name."""
    return f"acme/name/{id_of_name(name)}"


def account_in(view: View) -> AcmeAccount | None:
    """Return the account, or None if no authority is configured."""
    found = read_record(view.lookup(Payload, ACCOUNT_ID), AcmeAccount(email="", directory="", key=""))
    return found if found.directory else None


def names_in(view: View) -> tuple[str, ...]:
    """Return the names with a record, sorted.  Without a readable list, the records' ids tell them."""
    payload = view.lookup(Payload, NAMES_ID)
    if payload is None and NAMES_ID not in view.unreadable(Payload):
        return ()
    if payload is not None:
        with suppress(msgspec.DecodeError):
            return msgspec.json.decode(payload.data, type=KnownNames).names
    ids = {*view.ids(Payload), *view.unreadable(Payload)}
    first = record_id("")
    return tuple(sorted(name_in_id(id[len(first) :]) for id in ids if id.startswith(first)))


def records_in(view: View) -> dict[str, HostCertificate]:
    """Return the records by name, sorted."""
    return {name: record_in(view, name) for name in names_in(view)}


def record_in(view: View, name: str) -> HostCertificate:
    """Return the record of a name.  It is empty if nothing is recorded or readable."""
    return readable_record(view, name) or HostCertificate(name=name)


def readable_record(view: View, name: str) -> HostCertificate | None:
    """Return the record of a name, which is empty if nothing is recorded, or None if it cannot be read."""
    id = record_id(name)
    if (payload := view.lookup(Payload, id)) is None:
        return None if id in view.unreadable(Payload) else HostCertificate(name=name)
    with suppress(msgspec.DecodeError):
        found = msgspec.json.decode(payload.data, type=HostCertificate)
        if found.name == name:
            return found
    return None


def locked_names(view: View) -> frozenset[str]:
    """Return the names whose records cannot be replaced, because the store cannot read them."""
    first = record_id("")
    unreadable = view.unreadable(Payload)
    return frozenset(name_in_id(id[len(first) :]) for id in unreadable if id.startswith(first))


def challenges_in(records: Mapping[str, HostCertificate]) -> dict[str, str]:
    """Return the key authorizations that every door serves, by token."""
    orders = (record.order for record in records.values())
    return {token: text for order in orders if order is not None for token, text in order.challenges.items()}
