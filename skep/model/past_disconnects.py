"""What a node that is cut off may go by: the disconnect labels that its services had when it was last heard."""

from collections.abc import Mapping

from skep.model.labels import disconnect_labels, disconnect_policy
from skep.model.service import PastDisconnect, Service
from skep.model.times import Timestamp

KEPT_MAX = 4
"""Past ones of a service: more changes than that while a node is cut off are not remembered."""


def past_disconnects(
    before: Service, labels: Mapping[str, str], now: Timestamp
) -> tuple[PastDisconnect, ...]:
    """Those of a service whose labels were those of ``before`` until ``now``, and are ``labels`` from now on."""
    past = before.past_disconnects
    if disconnect_policy(before.spec.labels) == disconnect_policy(labels):
        return past
    return (*past, PastDisconnect(labels=disconnect_labels(before.spec.labels), until=now))[-KEPT_MAX:]
