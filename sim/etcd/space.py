"""How large the files of a simulated etcd are.  What Skep itself writes is too little to count.

Source: etcd 3.5, server/storage/quota.go: what transactions write in nested transactions passes it by.
"""

from skep.model.ids import NodeId
from skep.store.space import QUOTA_BYTES


class Space:
    """In bytes: what is in use on every member, and the file of each."""

    def __init__(self) -> None:
        self.live = 0
        """Values that are there."""
        self.old = 0
        """History: a compaction makes free pages of it."""
        self.has_alarm = False
        self._files: dict[NodeId, int] = {}

    @property
    def in_use(self) -> int:
        return self.live + self.old

    def file(self, member: NodeId) -> int:
        """Only a defragmentation makes it smaller."""
        self._files[member] = max(self._files.get(member, 0), self.in_use)
        return self._files[member]

    def fill(self, members: "tuple[NodeId, ...]", live: int, old: int) -> None:
        """Much is written; beyond the quota by somebody who does not ask for room."""
        self.live, self.old = live, old
        for member in members:
            self.has_alarm |= self.file(member) >= QUOTA_BYTES

    def compact(self) -> None:
        """History is cut."""
        self.old = 0

    def defragment(self, member: NodeId) -> None:
        """The free pages of one member's file are given back."""
        self._files[member] = self.in_use
