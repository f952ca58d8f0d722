"""Revokes certificates before they expire: all certificates of removed nodes, and manager certificates of demoted
managers.

The record is written in the transaction that removes or demotes, and every manager follows these records
(``manager.ca.caller_check``).  A record is kept as long as its certificates could be valid.

Source: swarmkit, manager/controlapi/node.go (RemoveNode: BlacklistedCertificates).
"""

from collections.abc import Iterable

from msgspec.structs import replace

from skep.model.node import Node
from skep.model.node_reports.node_removal import NodeRemoval
from skep.model.values.ids import NodeId
from skep.model.values.times import SECOND_NS, Timestamp, timestamp, unix_ns
from skep.store.interface import Transaction
from skep.store.kinds import Revocation

UNKNOWN_LIFETIME_NS = 20 * 365 * 24 * 3600 * 10**9
"""Lifetime of a record if the lifetime of the certificates is unknown: 20 years, the lifetime of a root."""


def revoke(
    tx: Transaction, node: Node, now_ns: int, *, is_removed: bool, keeps_containers: bool = False
) -> None:
    """Revoke all certificates of ``node``, or only its manager certificates if ``is_removed`` is False.

    ``keeps_containers`` makes a removed node leave its containers running.
    """
    before = tx.rely_on(Revocation, node.id)
    certificate = node.certificate
    serials = {serial.serial: serial for serial in before.serials} if before is not None else {}
    if certificate is not None:
        serials |= {serial.serial: serial for serial in certificate.serials}
    known = [certificate.not_after, certificate.last_not_after] if certificate is not None else []
    if before is not None:
        known.append(before.until)
    until = max((stamp for stamp in known if stamp), default=timestamp(now_ns + UNKNOWN_LIFETIME_NS))
    tx.put(
        Revocation(
            id=node.id,
            until=Timestamp(until),
            is_removed=is_removed,
            serials=tuple(serials[serial] for serial in sorted(serials)),
            before=max(timestamp(now_ns), before.before if before is not None else Timestamp("")),
            foreign=before.foreign if before is not None else (),
            keeps_containers=is_removed and keeps_containers,
            hostname=node.description.hostname if is_removed else "",
        )
    )


def removal_of(revocation: Revocation | None) -> NodeRemoval | None:
    """Return the removal in a record, or None if its node was not removed."""
    if revocation is None or not revocation.is_removed:
        return None
    return NodeRemoval(at=revocation.before, keeps_containers=revocation.keeps_containers)


def revoke_others(tx: Transaction, node_id: NodeId, own_serial: str, window_ns: int) -> None:
    """Revoke every certificate in a manager's name but its own.

    While two roots are trusted, whoever has the old root's key can pose as the manager, and can get a certificate of
    the new root in its name.  All such certificates are recorded, and no further ones can be issued.

    Args:
        window_ns: Time after its expiry during which a certificate may still be renewed.
    """
    node = tx.rely_on(Node, node_id, "certificate")
    if node is None or node.certificate is None:
        return
    before = tx.rely_on(Revocation, node_id) or Revocation(id=node_id, until=Timestamp(""))
    known = {one.serial: one for one in (*before.foreign, *node.certificate.serials)}
    if own_serial not in known:
        return  # its own certificate cannot be determined
    foreign = tuple(known[serial] for serial in sorted(known) if serial != own_serial)
    if foreign == before.foreign:
        return
    ends = [timestamp(unix_ns(one.not_after) + window_ns) for one in foreign]
    tx.put(replace(before, foreign=foreign, until=max([before.until, *ends])))


def is_foreign(revocation: Revocation | None, serial: str) -> bool:
    """Return whether this certificate in a node's name does not belong to the node."""
    return revocation is not None and any(one.serial == serial for one in revocation.foreign)


def is_revoked(revocation: Revocation | None, issued_s: int, serial: str = "") -> bool:
    """Return whether a manager's certificate is revoked, by its serial number or by its age.

    External authorities backdate certificates differently, so the age alone is not sufficient.

    Args:
        issued_s: Time of issue in Unix seconds, or 0 if unknown.
    """
    if revocation is None:
        return False
    if serial and any(one.serial == serial for one in revocation.serials):
        return True
    if not revocation.before or not issued_s:
        return False
    return issued_s <= unix_ns(revocation.before) // SECOND_NS


def issue_not_before_s(revocation: Revocation | None) -> int:
    """Return the earliest time of issue, in Unix seconds, that is not revoked even if the issuer's clock is behind."""
    if revocation is None or not revocation.before:
        return 0
    return unix_ns(revocation.before) // SECOND_NS + 1


def expired(revocations: Iterable[Revocation], now_ns: int) -> list[Revocation]:
    """Return the records that are no longer needed."""
    return [revocation for revocation in revocations if unix_ns(revocation.until) < now_ns]


def forget(tx: Transaction, revocation: Revocation) -> None:
    """Delete a record, unless it was renewed in the meantime."""
    if tx.lookup(Revocation, revocation.id) == revocation:
        tx.delete(Revocation, revocation.id)
