"""What expires soon, for logs, events and ``docker info``.  Pure.

A node renews by itself with at least a fifth of its certificate's life left, so one with less has failed to for a
while.  The root does not renew by itself.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from cryptography import x509

from skep.manager.ca.admission import lifetime_of
from skep.model.node import Node
from skep.model.swarm import Swarm
from skep.model.times import unix_ns
from skep.security.authority import BACKDATE
from skep.store.interface import View

WARN_BEFORE = timedelta(days=30)
OVERDUE = 0.2
"""Of a certificate's life: who has less left should have renewed.  Less than ``WARN_BEFORE`` for the usual 90 days;
to warn earlier would be to warn of every healthy node."""


def warnings_of(view: View, now: datetime) -> Iterator[str]:
    """One sentence for everything that expires within ``WARN_BEFORE``, the root first, nodes in order of their ids."""
    for swarm in view.find(Swarm):
        root = x509.load_pem_x509_certificate(swarm.tls_info.trust_root.encode())
        if swarm.rotation is None and root.not_valid_after_utc - now < WARN_BEFORE:
            yield (
                f"WARNING: the swarm's root certificate {_expires(root.not_valid_after_utc, now)}: "
                "run docker swarm ca --rotate"
            )
        before = min(WARN_BEFORE, (lifetime_of(swarm) + BACKDATE) * OVERDUE)
        for node in view.find(Node):
            not_after = expiry_of(node)
            if not_after is not None and not_after - now < before:
                yield (
                    f"WARNING: the certificate of node {node.description.hostname or node.id} "
                    f"{_expires(not_after, now)} and is not renewed: see that it reaches a manager"
                )


def expiry_of(node: Node) -> datetime | None:
    """When the node's certificate expires; None: that is not known."""
    if node.certificate is None or not node.certificate.not_after:
        return None
    return datetime.fromtimestamp(unix_ns(node.certificate.not_after) / 1e9, UTC)


def _expires(not_after: datetime, now: datetime) -> str:
    day = f"{not_after:%Y-%m-%d %H:%M} UTC"
    return f"expired on {day}" if not_after <= now else f"expires on {day}"
