"""Certificates that expire soon, for logs, events and ``docker info``.  Pure.

A node renews its certificate while at least a fifth of its life is left.  If less is left, renewal has failed for a
while.  The root is never renewed automatically.
"""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Literal

import msgspec
from cryptography import x509

from skep.manager.ca.admission import lifetime_of
from skep.model.node import Node
from skep.model.swarm import Swarm
from skep.model.values.times import moment, unix_ns
from skep.security.authority import BACKDATE
from skep.store.interface import View

WARN_BEFORE = timedelta(days=30)
OVERDUE = 0.2
"""Remaining share of a certificate's life below which its renewal is overdue.

With the usual 90 days, that is less than ``WARN_BEFORE``, which would affect every healthy node.
"""


class Expiry(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate that expires soon."""

    kind: Literal["swarm", "node"]
    id: str
    name: str
    not_after: datetime
    warning: str
    """The message for users."""


def expiring(view: View, now: datetime) -> Iterator[Expiry]:
    """Yield all certificates that expire within ``WARN_BEFORE``: the root first, then nodes in order of their ids."""
    for swarm in view.find(Swarm):
        root = _root_expiry(swarm)
        if root is not None and swarm.rotation is None and root - now < WARN_BEFORE:
            words = f"the swarm's root certificate {_expires(root, now)}: run docker swarm ca --rotate"
            yield Expiry(
                kind="swarm", id=swarm.id, name=swarm.spec.name, not_after=root, warning=f"WARNING: {words}"
            )
        before = min(WARN_BEFORE, (lifetime_of(swarm) + BACKDATE) * OVERDUE)
        for node in view.find(Node):
            not_after = expiry_of(node)
            if not_after is None or not_after - now >= before:
                continue
            name = node.shown_name
            words = f"the certificate of node {name} {_expires(not_after, now)} and is not renewed"
            yield Expiry(
                kind="node",
                id=node.id,
                name=name,
                not_after=not_after,
                warning=f"WARNING: {words}: check that the node reaches a manager",
            )


def _root_expiry(swarm: Swarm) -> datetime | None:
    """Return when the root expires, or None if it is unreadable, which is reported elsewhere."""
    try:
        return x509.load_pem_x509_certificate(swarm.tls_info.trust_root.encode()).not_valid_after_utc
    except ValueError:
        return None


def expiry_of(node: Node) -> datetime | None:
    """Return when the node's certificate expires, or None if unknown."""
    if node.certificate is None or not node.certificate.not_after:
        return None
    return moment(unix_ns(node.certificate.not_after))


def _expires(not_after: datetime, now: datetime) -> str:
    day = f"{not_after:%Y-%m-%d %H:%M} UTC"
    return f"expired on {day}" if not_after <= now else f"expires on {day}"
