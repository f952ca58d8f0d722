"""Which nodes are still believed alive.

The manager that holds a node's session judges it, in *its own loop's time*: time in which the loop stood still, or
in which this manager was cut off, did not pass for any node.  So a busy manager never takes its nodes down.
"""

import msgspec

GRACE_PERIODS = 3
RECOVERY_GRACE_S = 12.0
"""Least grace after this manager was away: an engine needs 11 s to find another one."""

HEARTBEAT_COST_S = 195e-6
"""Processor time of one unary heartbeat (a Docker Engine's)."""
STREAM_HEARTBEAT_COST_S = 2 * 11e-6
"""Processor time of one heartbeat on an open stream (a Skep node's), with its answer."""
HEARTBEAT_SHARE_MAX = 0.05
"""Share of one core that heartbeats may take."""


def grace_period(period_s: float, *, recovering: bool = False) -> float:
    """Seconds for which a silent node is still believed alive.

    Three heartbeats, so that a lost one never takes a node down; longer while ``recovering``, when every agent
    first has to find a manager again.

    Args:
        period_s: positive; the period last told to the node, jitter included.

    Source: swarmkit, manager/dispatcher/nodes.go (gracePeriodMultiplier).
    """
    grace_s = GRACE_PERIODS * period_s
    return max(2 * grace_s, RECOVERY_GRACE_S) if recovering else grace_s


def heartbeat_period(wished_s: float, *, skep_nodes: int, docker_nodes: int) -> float:
    """Seconds between heartbeats: as wished, stretched where there are so many nodes that it would cost too much."""
    cost_s = skep_nodes * STREAM_HEARTBEAT_COST_S + docker_nodes * HEARTBEAT_COST_S
    return max(wished_s, cost_s / HEARTBEAT_SHARE_MAX)


class OwnTime(msgspec.Struct, frozen=True, kw_only=True):
    """Time as this loop lived it."""

    seconds: float = 0.0
    """Own time; only differences mean something."""
    seen_at: float
    """The clock's monotonic time at the last look."""

    def after(self, now: float, tick_s: float, *, is_current: bool = True) -> "OwnTime":
        """Own time at ``now``, one tick later.

        A tick that took longer than twice its length was a standstill of this loop, which no node shall pay for.
        While this manager is not current, own time stands still: it could not hear what others heard.
        """
        passed = min(max(now - self.seen_at, 0.0), 2 * tick_s) if is_current else 0.0
        return OwnTime(seconds=self.seconds + passed, seen_at=now)
