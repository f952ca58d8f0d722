"""Whose connections have room: so many for each container, so many in all, and none takes the others' places."""

from collections.abc import Mapping
from enum import Enum

import msgspec

from skep.model.ids import ContainerId

EACH_MAX = 32
"""Connections of one container."""
ALL_MAX = 512
"""Of all containers of this node."""


class Decision(Enum):
    """What becomes of a new connection without an eviction."""

    SERVE = "serve"
    WAIT = "wait"


class Evict(msgspec.Struct, frozen=True):
    """Serve the new connection, and close one of this container, which has the most."""

    container: ContainerId


def decide(
    id: ContainerId, counts: Mapping[ContainerId, int], each_max: int = EACH_MAX, all_max: int = ALL_MAX
) -> Decision | Evict:
    """What becomes of a new connection of ``id``.

    When all places are taken, the container with the most gives one to a container with at least two fewer: so every
    container comes to an equal share, whatever the others do.

    Args:
        counts: connections that each container has.
    """
    own = counts.get(id, 0)
    if own >= each_max:
        return Decision.WAIT
    if sum(counts.values()) < all_max:
        return Decision.SERVE
    most = max(counts, key=lambda one: (counts[one], one))
    return Evict(most) if counts[most] >= own + 2 else Decision.WAIT
