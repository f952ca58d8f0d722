"""Reads and changes the members of etcd's cluster, one at a time.

A member joins as a learner, which does not count for the quorum, and is promoted when it has caught up.
``manager.membership.roles`` checks beforehand that a change leaves a quorum. etcd's own check is off, because it
refuses every join while any member is down.
"""

import asyncio
from collections.abc import Sequence

import msgspec
import structlog

from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.client import EtcdClient
from skep.store.etcd.errors import NoLearner, NoMember
from skep.store.etcd.process.member import EtcdMember

log = structlog.get_logger()


class RaftMember(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A member in etcd's list.  ``name`` is its node's id, even if it has never started."""

    name: str
    url: str
    id: int
    is_learner: bool = False
    has_started: bool = True


class RaftMembers:
    """Reads and changes the membership through this manager's own member."""

    def __init__(self, client: EtcdClient, member: EtcdMember) -> None:
        self._client = client
        self._own = member
        self._one_at_a_time = asyncio.Lock()
        self._is_only_member = False

    def is_only_member(self) -> bool:
        """Return whether this manager's member is known to be the only one.  No other manager can then write."""
        return self._is_only_member

    async def count(self) -> None:
        """Find out whether there are other members.  Call it at the start, before one can be added.  Raises
        Unavailable.
        """
        self._is_only_member = len(await self.all(is_current=True)) == 1
        if not self._is_only_member:  # the last start did not know of the others yet
            await self._own.expect_others()

    async def all(self, *, is_current: bool = False) -> tuple[RaftMember, ...]:
        """Return all members in order of name.  Raises Unavailable."""
        return parsed_members((await self._client.members(is_current=is_current)).members)

    async def add(self, name: str, url: str) -> tuple[RaftMember, ...]:
        """Add ``name`` as a learner.  Returns all members.

        An existing learner of that name was left by a failed attempt, and is removed first.

        Raises:
            Busy: There is another learner.
            Unavailable: The store did not respond.
        """
        async with self._one_at_a_time:
            for member in await self.all(is_current=True):
                if member.name == name and member.is_learner:
                    await self._client.remove(member.id)
            # It stays False until the next start, because this manager cannot tell whether it has the last write of the
            # others.
            self._is_only_member = False
            await self._own.expect_others()
            reply = await self._client.add_learner(url)
        log.info("learner added", node=name)
        return parsed_members(reply.members)

    async def promote(self, name: str) -> None:
        """Promote ``name`` to a voter.  Idempotent.

        Raises:
            StillLearning: It has not caught up.
            NoMember: It was removed meanwhile.
            Unavailable: The store did not respond.
        """
        member = await self._member(name)
        if member is None:
            raise NoMember(f"{name} is not a member of the cluster's store")
        if member.is_learner:
            try:
                await self._client.promote(member.id)
            except NoLearner:
                return
            log.info("manager promoted to voter", node=name)

    async def remove(self, member: RaftMember) -> None:
        """Remove the member with this id, and not a later one with the same name.  Idempotent.  Raises Unavailable."""
        try:
            await self._client.remove(member.id)
        except NoMember:
            return
        log.info("manager removed", node=member.name)

    async def move_leader(self, to: RaftMember) -> None:
        """Transfer raft's leadership.  Only for the leader's own member.  Raises Unavailable."""
        await self._client.move_leader(to.id)

    async def _member(self, name: str) -> RaftMember | None:
        return next((one for one in await self.all(is_current=True) if one.name == name), None)


def parsed_members(members: Sequence[pb.Member]) -> tuple[RaftMember, ...]:
    """Return the members in etcd's messages.  One that has never started has its name only in its URL."""
    return tuple(
        sorted(
            RaftMember(
                name=name_in(url := member.peer_urls[0] if member.peer_urls else ""),
                url=url,
                id=member.id,
                is_learner=member.is_learner,
                has_started=bool(member.name),
            )
            for member in members
        )
    )


def name_in(url: str) -> str:
    """Return the node's id in ``https://<node id>:2378``."""
    return url.partition("://")[2].rpartition(":")[0]
