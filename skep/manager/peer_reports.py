"""What managers report to each other with their pings: overload, and missed heartbeats of their nodes.

*Overload*: more nodes reconnect to a manager than it can register at once.  Those nodes are alive: they were sent
``RetryLater``, perhaps by another manager than the one that would mark them down.  So missed heartbeats do not count
while any manager is overloaded.

*Missed heartbeats*: nodes that fail at once are spread over the managers, so each manager may miss one only.  A
manager that marks its one silent node down learns from the others' reports that it is not the only one.

*Without quorum*: the process of a manager answers pings while its etcd member is down, as on a full disk.  It has a
vote and does not cast it, so it does not count where another manager is to be removed.
"""

from collections.abc import Set

import msgspec

from skep.model.ids import NodeId

REPORT_VALID_S = 2.0
"""How long another manager's report is valid."""


class PeerReport(msgspec.Struct, frozen=True):
    """What one manager reports of itself."""

    is_overloaded: bool = False
    missed: int = 0
    """How many of its nodes have missed a heartbeat."""
    is_without_quorum: bool = False
    """Whether its member has no contact with a quorum, or it is about to stop."""


class PeerReports:
    """``own``: set by the dispatcher, sent to the other managers by the link, which records theirs."""

    def __init__(self) -> None:
        self.own = PeerReport()
        self._others: dict[NodeId, tuple[PeerReport, float]] = {}

    def record(self, manager: NodeId, report: PeerReport, now: float) -> None:
        """Record another manager's report at ``now`` (monotonic seconds)."""
        self._others[manager] = (report, now)

    def is_overloaded_anywhere(self, now: float) -> bool:
        """Whether any manager is overloaded at ``now`` (monotonic seconds)."""
        return self.own.is_overloaded or any(report.is_overloaded for report in self._valid(now))

    def missed_elsewhere(self, now: float) -> int:
        """How many nodes of other managers have missed a heartbeat at ``now`` (monotonic seconds)."""
        return sum(report.missed for report in self._valid(now))

    def without_quorum(self) -> Set[NodeId]:
        """Other managers that were without a quorum at their last report."""
        return {manager for manager, (report, _) in self._others.items() if report.is_without_quorum}

    def _valid(self, now: float) -> list[PeerReport]:
        return [report for report, at in self._others.values() if now - at < REPORT_VALID_S]
