"""The database sizes of a simulated etcd.  The writes of a simulated run are too small to count.

Source: etcd 3.5, server/storage/quota.go: puts in nested transactions are not checked against the quota.
"""

from skep.model.values.ids import NodeId
from skep.store.space import QUOTA_BYTES


class Space:
    """Bytes in use, which are the same on every member, and each member's file size."""

    def __init__(self) -> None:
        self.live = 0
        """Bytes of current values."""
        self.old = 0
        """Bytes of history.  A compaction turns them into free pages."""
        self.has_alarm = False
        self._files: dict[NodeId, int] = {}

    @property
    def in_use(self) -> int:
        return self.live + self.old

    def file(self, member: NodeId) -> int:
        """Return the file size of ``member``, which only a defragmentation reduces."""
        self._files[member] = max(self._files.get(member, 0), self.in_use)
        return self._files[member]

    def fill(self, members: "tuple[NodeId, ...]", live: int, old: int) -> None:
        """Set the size of current values and history.  Raise the alarm if the total exceeds the quota."""
        self.live, self.old = live, old
        for member in members:
            self.has_alarm |= self.file(member) >= QUOTA_BYTES

    def compact(self) -> None:
        """Drop the history."""
        self.old = 0

    def defragment(self, member: NodeId) -> None:
        """Release the free pages of one member's file."""
        self._files[member] = self.in_use
