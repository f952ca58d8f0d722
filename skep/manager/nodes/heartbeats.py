"""Heartbeat period, and grace periods: how long a node without heartbeats counts as alive.

The manager that holds a node's session decides, in *its own loop's time* (``aio.own_time``): time in which the loop did
not run, or in which this manager was cut off, does not count.  So a busy manager never marks its nodes down.
"""

from skep.model.options.labels import heartbeat_grace_s
from skep.model.swarm import Swarm
from skep.model.values.times import SECOND_NS, Timestamp, timestamp
from skep.store.interface import View

DEFAULT_PERIOD_S = 5.0
"""Seconds between heartbeats if the cluster does not configure them."""
GRACE_PERIODS = 3
"""Grace period in heartbeat periods, as in SwarmKit."""
GRACE_PERIODS_MIN = 2
"""Smallest grace period in heartbeat periods.  One lost heartbeat never marks a node down."""

AWAY_GRACE_S = 12.0
"""Minimum grace in seconds of a node whose process announced a planned stop: an upgrade moves no tasks."""
RECOVERY_GRACE_S = 12.0
"""Minimum grace in seconds of an engine that lost its manager: it needs 11 s to find another one."""
SUSPENDED_S_MAX = 120.0
"""Maximum seconds for which missed heartbeats are ignored."""
_REGAIN_RATE = 0.1
"""Seconds of that allowance regained per second: it takes ten times as long to regain as to use."""
HEARTBEAT_COST_S = 195e-6
"""Processor time in seconds of one unary heartbeat (of a Docker Engine)."""
STREAM_HEARTBEAT_COST_S = 2 * 11e-6
"""Processor time in seconds of one heartbeat on an open stream (of a Skep node), with its response."""
HEARTBEAT_SHARE_MAX = 0.05
"""Share of one core that heartbeats may take."""


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


def certain_contact(view: View, seen_ns: int) -> Timestamp:
    """Return a time at which a node was certainly in contact with its manager, which was seen last at ``seen_ns`` (Unix
    time).

    The node may have died before its manager, which waits for a grace period until it marks a node down.
    """
    return timestamp(seen_ns - round(configured_grace_s(view) * SECOND_NS))


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


def grace_when_away(period_s: float, *, configured_s: float | None = None) -> float:
    """Return the grace in seconds of a node that announced a planned stop."""
    return max(grace_period(period_s, configured_s=configured_s), AWAY_GRACE_S)


def grace_after_loss(period_s: float, *, is_skep: bool, configured_s: float | None = None) -> float:
    """Return the grace in seconds of a node whose manager was lost, and which has to find another one first.

    A skep node does that within a heartbeat.  An engine does not.
    """
    grace_s = grace_period(period_s, configured_s=configured_s)
    return grace_s if is_skep else max(grace_s, RECOVERY_GRACE_S)


def grace_after_absence(period_s: float, *, configured_s: float | None = None) -> float:
    """Return the grace in seconds of all nodes of a manager that was itself away (restarted, cut off).

    It is the longest grace: nodes that have another manager are there already, and nodes without one retry with growing
    delays.
    """
    return max(2 * grace_period(period_s, configured_s=configured_s), RECOVERY_GRACE_S)


def grace_after_adoption(
    period_s: float, *, is_skep: bool, recovers: bool, configured_s: float | None = None
) -> float:
    """Return the grace in seconds of a node whose session was taken over from a lost manager.

    Args:
        is_skep: Whether the node is a Skep node.
        recovers: Whether the adopting manager has itself just returned.  Then there may have been no manager at all,
            and nodes that have retried for long retry rarely.
    """
    if recovers:
        return grace_after_absence(period_s, configured_s=configured_s)
    return grace_after_loss(period_s, is_skep=is_skep, configured_s=configured_s)


def heartbeat_period(configured_s: float, *, skep_nodes: int, docker_nodes: int) -> float:
    """Return the seconds between heartbeats: as configured, or longer if all nodes' heartbeats would cost too much."""
    cost_s = skep_nodes * STREAM_HEARTBEAT_COST_S + docker_nodes * HEARTBEAT_COST_S
    return max(configured_s, cost_s / HEARTBEAT_SHARE_MAX)


def suspension_left(left_s: float, passed_s: float, *, is_overloaded: bool) -> float:
    """Return the seconds for which missed heartbeats may still be ignored, after ``passed_s`` seconds.

    The allowance is bounded, so that permanent overload cannot keep every lost node alive.
    """
    if is_overloaded:
        return max(left_s - passed_s, 0.0)
    return min(left_s + passed_s * _REGAIN_RATE, SUSPENDED_S_MAX)
