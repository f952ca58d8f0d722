"""Tracks which manager sends each node its tables, and which sessions have changed since a revision of the store."""

from collections.abc import Iterator
from itertools import takewhile

from skep.manager.discovery.versioned_table import counted
from skep.model.node import SessionOwner
from skep.model.values.ids import NodeId


class TableSessions:
    """The sessions over which nodes receive tables.  A node without one is down, a Docker node or removed."""

    def __init__(self, revision: int) -> None:
        self.changed_at = revision
        """The revision of the last change."""
        self.managers: dict[NodeId, int] = {}
        """Number of such sessions by manager."""
        self._sessions: dict[NodeId, SessionOwner] = {}
        self._changes: dict[NodeId, int] = {}
        """The revision of each session's last change, the earliest first."""

    def of(self, node_id: NodeId) -> SessionOwner | None:
        """Return the node's session, or None."""
        return self._sessions.get(node_id)

    def set(self, node_id: NodeId, session: SessionOwner | None, revision: int) -> bool:
        """Set the node's session.  Returns whether it changed."""
        before = self._sessions.pop(node_id, None)
        if session is not None:
            self._sessions[node_id] = session
        if session == before:
            return False
        self._changes.pop(node_id, None)
        if before is not None:
            counted(self.managers, before.manager_id, -1)
        if session is not None:
            counted(self.managers, session.manager_id, 1)
            self._changes[node_id] = revision
        self.changed_at = revision
        return True

    def changed_since(self, revision: int) -> Iterator[tuple[NodeId, SessionOwner]]:
        """Iterate over the sessions that changed after ``revision``, at a cost proportional to their number."""
        for node_id, _ in takewhile(lambda change: change[1] > revision, reversed(self._changes.items())):
            yield node_id, self._sessions[node_id]
