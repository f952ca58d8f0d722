"""What the managers' membership needs of the consensus below it.  ``store.etcd.membership`` is the real one."""

from typing import Protocol

from skep.store.etcd.membership import RaftMember


class Consensus(Protocol):
    """The members of the consensus, seen and changed from this manager."""

    async def all(self, *, is_current: bool = False) -> tuple[RaftMember, ...]:
        """All members as this one knows them; with ``is_current`` as a quorum does.  Raises: Unavailable."""

    async def add(self, name: str, url: str) -> tuple[RaftMember, ...]:
        """Take a member in that learns; gives all.  Raises: Unavailable: not now, for instance another one learns."""

    async def promote(self, name: str) -> None:
        """Give a learner its vote.  Raises: Unavailable: it has not caught up; NoMember: it is none any more."""

    async def remove(self, member: RaftMember) -> None:
        """Put this very member out, if it is in.  Raises: Unavailable."""

    async def move_leader(self, to: RaftMember) -> None:
        """Hand leadership over; for the leader's own manager only.  Raises: Unavailable."""
