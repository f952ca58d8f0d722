"""Reports that managers send each other with their pings: overload, and missed heartbeats of their nodes.

*Overload*: More nodes reconnect to a manager than it can register at once.  It sends ``RetryLater`` to nodes that are
alive, although another manager may be counting their missed heartbeats.  Therefore missed heartbeats do not count while
any manager is overloaded.

*Missed heartbeats*: Nodes that fail at once are spread over the managers, so each manager may miss only one.  A manager
that is about to mark its only silent node down learns from the others' reports that other nodes are silent as well.

*Registering nodes*: The write of a node's session may take longer than the grace of its former manager, which would
mark a node down that is alive.

*Without quorum*: A manager's process answers pings while its etcd member is down, for example because of a full disk.
Its member does not vote, so the manager does not count as available when another manager is being removed.
"""

from collections.abc import Set

import msgspec

from skep.model.values.ids import NodeId

REPORT_VALID_S = 2.0
"""Seconds for which another manager's report is valid."""

REGISTERING_MAX = 128
"""Registering nodes in a report.  As many register at a time (``dispatcher/admission``)."""


class PeerReport(msgspec.Struct, frozen=True):
    """One manager's report about itself."""

    is_overloaded: bool = False
    missed: int = 0
    """Number of its nodes that have missed a heartbeat."""
    registering: tuple[NodeId, ...] = ()
    """Nodes that are registering with it, at most ``REGISTERING_MAX``."""
    is_without_quorum: bool = False
    """Whether its member has no contact with a quorum, or is about to stop."""


class PeerReports:
    """Reports of all managers.  The dispatcher sets ``own``.  The link sends it and records the others' reports."""

    def __init__(self) -> None:
        self.own = PeerReport()
        self._others: dict[NodeId, tuple[PeerReport, float]] = {}

    def record(self, manager: NodeId, report: PeerReport, now: float) -> None:
        """Record another manager's report at ``now`` (monotonic seconds)."""
        self._others[manager] = (report, now)

    @property
    def is_alone(self) -> bool:
        """Whether no other manager has sent a report."""
        return not self._others

    def is_overloaded_anywhere(self, now: float) -> bool:
        """Return whether any manager is overloaded at ``now`` (monotonic seconds)."""
        return self.own.is_overloaded or any(report.is_overloaded for report in self._valid(now))

    def missed_elsewhere(self, now: float) -> int:
        """Return how many nodes of other managers have missed a heartbeat at ``now`` (monotonic seconds)."""
        return sum(report.missed for report in self._valid(now))

    def registering_elsewhere(self, now: float) -> Set[NodeId]:
        """Return the nodes that were registering with another manager shortly before ``now`` (monotonic seconds)."""
        return {node_id for report in self._valid(now) for node_id in report.registering}

    def without_quorum(self) -> Set[NodeId]:
        """Return the other managers that were without a quorum at their last report."""
        return {manager for manager, (report, _) in self._others.items() if report.is_without_quorum}

    def _valid(self, now: float) -> list[PeerReport]:
        return [report for report, at in self._others.values() if now - at < REPORT_VALID_S]
