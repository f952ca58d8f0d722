"""Interface to the consensus members, implemented by ``store.etcd.membership``."""

from typing import Protocol

from skep.store.etcd.membership import RaftMember


class Consensus(Protocol):
    """The members of the consensus, as this manager sees and changes them."""

    async def all(self, *, is_current: bool = False) -> tuple[RaftMember, ...]:
        """Return all members that this member knows, or with ``is_current`` the members that a quorum knows.  Raises
        Unavailable.
        """

    async def add(self, name: str, url: str) -> tuple[RaftMember, ...]:
        """Add a member as a learner.  Returns all members.

        Raises:
            Unavailable: Not possible now, for example because there is a learner already.
        """

    async def promote(self, name: str) -> None:
        """Make a learner a voter.  Raises Unavailable if it has not caught up, or NoMember if it was removed."""

    async def remove(self, member: RaftMember) -> None:
        """Remove this member, if it exists.  Raises Unavailable."""

    async def move_leader(self, to: RaftMember) -> None:
        """Transfer leadership.  Only for the leader's own manager.  Raises Unavailable."""
