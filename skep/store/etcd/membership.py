"""Changes of etcd's membership, one at a time, and what the members are now.

A member comes in as a learner, which costs no quorum while it is away, and gets its vote when it has caught up.
Whether a change leaves a quorum is judged before it (``manager.membership.quorum``): etcd's own check is off, since
it refuses every join while any member is down.
"""

import asyncio
from collections.abc import Sequence

import msgspec
import structlog

from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.client import Client
from skep.store.etcd.errors import NoLearner, NoMember
from skep.store.etcd.member import Member

log = structlog.get_logger()


class RaftMember(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """One member as etcd lists it.  ``name``: its node's id, also of one that has never started."""

    name: str
    url: str
    id: int
    is_learner: bool = False
    has_started: bool = True


class RaftMembers:
    """The membership as seen and changed through this manager's own member."""

    def __init__(self, client: Client, member: Member) -> None:
        self._client = client
        self._own = member
        self._one_at_a_time = asyncio.Lock()

    async def all(self, *, is_current: bool = False) -> tuple[RaftMember, ...]:
        """All members in order of name.  Raises: Unavailable."""
        return parsed_members((await self._client.members(is_current=is_current)).members)

    async def add(self, name: str, url: str) -> tuple[RaftMember, ...]:
        """Take ``name`` in as a learner; gives all members.

        A learner of that name is of an attempt that failed, and is removed first.
        Raises: Busy: another one is learning; Unavailable.
        """
        async with self._one_at_a_time:
            for member in await self.all(is_current=True):
                if member.name == name and member.is_learner:
                    await self._client.remove(member.id)
            reply = await self._client.add_learner(url)
            self._own.is_one_of_several()
        log.info("manager learns", node=name)
        return parsed_members(reply.members)

    async def promote(self, name: str) -> None:
        """Give ``name`` its vote; again is harmless.

        Raises: StillLearning: it has not caught up; NoMember: it was removed meanwhile; Unavailable.
        """
        member = await self._member(name)
        if member is None:
            raise NoMember(f"{name} is no member of the cluster's store")
        if member.is_learner:
            try:
                await self._client.promote(member.id)
            except NoLearner:
                return
            log.info("manager votes", node=name)

    async def remove(self, member: RaftMember) -> None:
        """Put this member out, and no later one of its name; one that is out already is fine.  Raises: Unavailable."""
        try:
            await self._client.remove(member.id)
        except NoMember:
            return
        log.info("manager removed", node=member.name)

    async def move_leader(self, to: RaftMember) -> None:
        """Hand raft's leadership over; for the leader's own member only.  Raises: Unavailable."""
        await self._client.move_leader(to.id)

    async def _member(self, name: str) -> RaftMember | None:
        return next((one for one in await self.all(is_current=True) if one.name == name), None)


def parsed_members(members: Sequence[pb.Member]) -> tuple[RaftMember, ...]:
    """etcd's members as ours.  One that has never started has no name, but its URL has."""
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
    """``https://<node id>:2378`` -> the node's id."""
    return url.partition("://")[2].rpartition(":")[0]
