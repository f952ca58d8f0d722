"""Limits connections for each container and in total, so that no container takes the others' share."""

from collections.abc import Mapping
from enum import Enum

import msgspec

from skep.model.values.ids import ContainerId

EACH_MAX = 32
"""Limit for the connections of one container."""
ALL_MAX = 512
"""Limit for the connections of all containers of this node together."""


class AdmissionDecision(Enum):
    """The decision about a new connection if no other connection is closed for it."""

    SERVE = "serve"
    WAIT = "wait"


class Evict(msgspec.Struct, frozen=True):
    """Serve the new connection, and close one connection of container ``id``, which has most connections."""

    container: ContainerId


def decide(
    id: ContainerId, counts: Mapping[ContainerId, int], each_max: int = EACH_MAX, all_max: int = ALL_MAX
) -> AdmissionDecision | Evict:
    """Decide on a new connection of ``id``.

    At the total limit, the container with most connections loses one, if the new connection's container has at least
    two fewer.  So every container gets an equal share, whatever the others do.

    ``counts`` is the number of connections of each container.
    """
    own = counts.get(id, 0)
    if own >= each_max:
        return AdmissionDecision.WAIT
    if sum(counts.values()) < all_max:
        return AdmissionDecision.SERVE
    most = max(counts, key=lambda one: (counts[one], one))
    return Evict(most) if counts[most] >= own + 2 else AdmissionDecision.WAIT
