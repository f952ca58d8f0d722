"""Earlier disconnect labels of services, which a disconnected node may still apply."""

from collections.abc import Mapping

from skep.model.options.labels import disconnect_labels, disconnect_policy
from skep.model.service import PastDisconnect, Service
from skep.model.values.times import Timestamp

KEPT_MAX = 4
"""Earlier labels kept for a service.  If they change more often while a node is disconnected, the oldest are lost."""


def past_disconnects(
    before: Service, labels: Mapping[str, str], now: Timestamp
) -> tuple[PastDisconnect, ...]:
    """Return the past disconnect labels of a service whose labels change from those in ``before`` to ``labels``."""
    past = before.past_disconnects
    if disconnect_policy(before.spec.labels) == disconnect_policy(labels):
        return past
    return (*past, PastDisconnect(labels=disconnect_labels(before.spec.labels), until=now))[-KEPT_MAX:]
