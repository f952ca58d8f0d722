"""Heartbeat period, and the grace period of nodes without heartbeats."""

from skep.model.options.labels import heartbeat_grace_s
from skep.model.swarm import Swarm
from skep.model.values.times import SECOND_NS
from skep.store.interface import View

DEFAULT_PERIOD_S = 5.0
"""Seconds between heartbeats if the cluster does not configure them."""
GRACE_PERIODS = 3
"""Grace period in heartbeat periods, as in SwarmKit."""
GRACE_PERIODS_MIN = 2
"""Smallest grace period in heartbeat periods.  One lost heartbeat never marks a node down."""


def configured_heartbeats(view: View) -> tuple[float, float | None]:
    """Return the configured heartbeat period and grace period in seconds.  The grace is None if it is not
    configured.
    """
    for swarm in view.find(Swarm):
        period_ns = swarm.spec.dispatcher.heartbeat_period
        period_s = period_ns / SECOND_NS if period_ns > 0 else DEFAULT_PERIOD_S
        return period_s, heartbeat_grace_s(swarm.spec.labels)
    return DEFAULT_PERIOD_S, None


def configured_grace_s(view: View) -> float:
    """Return the grace period of the cluster's nodes in seconds."""
    period_s, configured_s = configured_heartbeats(view)
    return grace_period(period_s, configured_s=configured_s)


def grace_period(period_s: float, *, configured_s: float | None = None) -> float:
    """Return the seconds for which a node without heartbeats is considered alive.

    The result is three periods, or the configured value if that is at least two periods.  So one lost heartbeat never
    marks a node down.

    Args:
        period_s: Positive.  The period last sent to the node, including jitter.

    Source: swarmkit, manager/dispatcher/nodes.go (gracePeriodMultiplier).
    """
    if configured_s is None:
        return GRACE_PERIODS * period_s
    return max(configured_s, GRACE_PERIODS_MIN * period_s)
