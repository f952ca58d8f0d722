"""The calls of ``store.etcd.client.Client`` on a simulated member.  Results have the fields of etcd's messages."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import TypeVar, cast

import msgspec

from sim.etcd.member import Member
from sim.etcd.raft import Raft
from sim.world.links import Links
from skep.model.values.ids import NodeId
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.client import CHANGE_S, LOAD_S, READ_S, WRITE_S, EtcdClient, WatchStream, nested
from skep.store.etcd.errors import Busy, Uncertain, error_of
from skep.store.etcd.membership import name_in
from skep.store.etcd.peers import peer_url
from skep.store.etcd.requests import etcd_key
from skep.store.transactions.updates import NO_LEADER

T = TypeVar("T")

STATUS_S = (0.3, 1.0)
"""Delay of a status response while nothing changes, which keeps idle managers cheap.  A change is returned at once."""
DEFRAGMENT_S = (0.1, 3.0)
PEER_PORT = 2378
RESPONSE_REVISIONS = 50
"""Maximum number of revisions in one watch response."""
FRAGMENTED = 0.05
"""Probability that a response with several events has two fragments. etcd splits a response that exceeds a message."""


class SimulatedClient(EtcdClient):
    """The client of one manager, connected to its own member."""

    def __init__(self, raft: Raft, member: Member, links: Links, random: Random) -> None:
        self._raft = raft
        self._member = member
        self._links = links
        self._random = random
        self._last_status: tuple[int, int] | None = None

    async def __aexit__(self, *_: object) -> None:
        """Do nothing, because there is no connection to close."""

    async def range(self, request: pb.RangeRequest, *, timeout_s: float = READ_S) -> pb.RangeResponse:
        async def read_range() -> pb.RangeResponse:
            await asyncio.sleep(0)  # a caller that reads in a loop lets other tasks run
            if not request.serializable:
                await self._raft.wait_readable(self._member)
            return self._as_on_disk(self._raft.kv.range(request, self._member.applied))

        return await self._within(read_range(), timeout_s)

    async def put(self, key: bytes, value: bytes, *, timeout_s: float = WRITE_S) -> pb.PutResponse:
        put = pb.RequestOp(request_put=pb.PutRequest(key=key, value=value))
        reply = await self.txn(pb.TxnRequest(success=[nested(put)]), timeout_s=timeout_s)
        return pb.PutResponse(header=reply.header)

    async def txn(self, request: pb.TxnRequest, *, timeout_s: float = WRITE_S) -> pb.TxnResponse:
        return await self._within(self._raft.write(self._member, request), timeout_s)

    async def compact(self, revision: int, *, timeout_s: float = LOAD_S) -> None:
        async def compact_later() -> None:
            await self._raft.wait_readable(self._member)
            self._raft.kv.compact(revision)
            self._raft.space.compact()

        await self._within(compact_later(), timeout_s)

    async def defragment(self) -> None:
        """Defragment the member's database, which blocks its disk meanwhile."""
        was_held = self._member.held is not None
        self._raft.hang(self._member.id)
        try:
            await self._within(asyncio.sleep(self._random.uniform(*DEFRAGMENT_S)), LOAD_S)
        finally:
            if not was_held:
                self._raft.resume(self._member.id)
        self._raft.space.defragment(self._member.id)

    async def disarm(self) -> int:
        was_armed = self._raft.space.has_alarm
        await self._within(self._raft.wait_readable(self._member), READ_S)
        self._raft.space.has_alarm = False
        return int(was_armed)

    async def status(self, *, timeout_s: float = READ_S) -> pb.StatusResponse:
        return await self._within(self._read_status(), timeout_s)

    async def members(self, *, timeout_s: float = READ_S, is_current: bool = False) -> pb.MemberListResponse:
        if is_current:
            await self._within(self._raft.wait_readable(self._member), timeout_s)
        return pb.MemberListResponse(members=self._members())

    async def add_learner(self, url: str, *, timeout_s: float = CHANGE_S) -> pb.MemberAddResponse:
        await self._changing(timeout_s)
        if any(not member.is_voter for member in self._raft.members.values()):
            raise error_of("etcdserver: too many learner members in cluster")
        id = NodeId(name_in(url))
        if id in self._raft.members:
            raise error_of("etcdserver: Peer URLs already exists: peerURLs exists")
        self._raft.add(id, is_voter=False)
        return pb.MemberAddResponse(members=self._members())

    async def promote(self, member_id: int, *, timeout_s: float = CHANGE_S) -> None:
        await self._changing(timeout_s)
        member = self._raft.numbered(member_id)
        if member.is_voter:
            raise error_of("etcdserver: can only promote a learner member")
        if not self._raft.promote(member.id):
            raise error_of("etcdserver: can only promote a learner member which is in sync with leader")

    async def remove(self, member_id: int, *, timeout_s: float = CHANGE_S) -> None:
        await self._changing(timeout_s)
        self._raft.remove(self._raft.numbered(member_id).id)

    async def _changing(self, timeout_s: float) -> None:
        """Commit a raft entry for a change of members.  Raises: Uncertain: it cannot be committed."""
        put = pb.RequestOp(request_put=pb.PutRequest(key=etcd_key("probe/members"), value=b""))
        await self.txn(pb.TxnRequest(success=[nested(put)]), timeout_s=timeout_s)

    async def move_leader(self, member_id: int, *, timeout_s: float = CHANGE_S) -> None:
        leads = self._raft.current
        if leads is None or leads.member is not self._member:
            raise Busy("this member does not lead")
        if not self._raft.transfer(self._raft.numbered(member_id).id):
            raise Uncertain(NO_LEADER)

    @asynccontextmanager
    async def watch(self, prefix: bytes, after: int) -> AsyncIterator[WatchStream]:
        if not self._member.is_running:
            raise Uncertain("the store does not respond: connection refused")
        stream = SimulatedWatchStream(self._raft, self._member, self._links, self._random, after)
        self._member.watchers.append(stream)
        try:
            yield stream
        finally:
            self._member.watchers.remove(stream)

    async def _read_status(self) -> pb.StatusResponse:
        until = asyncio.get_running_loop().time() + self._random.uniform(*STATUS_S)
        now = asyncio.get_running_loop().time
        while (known := self._known()) == self._last_status or now() < self._member.stale_until:
            left_s = max(until, self._member.stale_until) - now()
            if left_s <= 0:
                break
            await self._raft.wait_changed(left_s)
        self._last_status = known
        leader, term = known
        header = pb.ResponseHeader(member_id=self._member.number, cluster_id=1, raft_term=term)
        space = self._raft.space
        return pb.StatusResponse(
            header=header,
            leader=leader,
            raft_term=term,
            db_size=space.file(self._member.id),
            db_size_in_use=space.in_use,
            errors=["alarm:NOSPACE"] if space.has_alarm else [],
        )

    def _members(self) -> list[pb.Member]:
        return [
            pb.Member(
                id=member.number,
                name=member.id,
                peer_urls=[peer_url(member.id, PEER_PORT)],
                is_learner=not member.is_voter,
            )
            for member in self._raft.members.values()
        ]

    def _as_on_disk(self, response: pb.RangeResponse) -> pb.RangeResponse:
        """Return the values as this member's disk has them.  A corrupted value stays corrupted until it is written
        again.
        """
        for kv in response.kvs if self._member.corrupted else ():
            if self._member.corrupted.get(kv.key) == kv.mod_revision and kv.value:
                kv.value = kv.value[:-1] + bytes([kv.value[-1] ^ 1])
        return response

    def _known(self) -> tuple[int, int]:
        leadership = self._member.leadership
        return (leadership.member.number if leadership else 0), self._member.term

    async def _within(self, work: Awaitable[T], timeout_s: float) -> T:
        """Return the result of ``work``.  Raises: Uncertain: no response in time."""
        try:
            async with asyncio.timeout(timeout_s):
                response = await work
        except TimeoutError as error:
            await self._links.wait_thawed(self._member.id)
            raise Uncertain(NO_LEADER) from error
        await self._links.wait_thawed(self._member.id)
        if not self._member.is_running:
            raise Uncertain("the store does not respond: connection lost")
        return response


class _Header(msgspec.Struct, frozen=True):
    revision: int
    cluster_id: int = 1


class _Response(msgspec.Struct, frozen=True):
    """The fields of a ``pb.WatchResponse`` that ``follow`` reads.  The events are not copied."""

    header: _Header
    events: list[pb.Event] = []
    created: bool = False
    canceled: bool = False
    compact_revision: int = 0
    cancel_reason: str = ""
    fragment: bool = False


class SimulatedWatchStream(WatchStream):
    """One open watch on a member, of all keys."""

    def __init__(self, raft: Raft, member: Member, links: Links, random: Random, after: int) -> None:
        self._raft = raft
        self._member = member
        self._links = links
        self._random = random
        self._sent = after
        self._shown = member.applied
        self._responses: deque[_Response] = deque([_Response(_Header(member.applied), created=True)])
        self._lost = ""
        self._ready = asyncio.Event()
        self._take: Callable[[pb.WatchResponse], bool] = lambda _: False
        self._is_waited_for = False

    def show(self, revision: int, lag_s: float) -> None:
        """Record that the member has applied ``revision``.  The watch sends it ``lag_s`` later, in order."""
        if lag_s > 0:
            self._raft.loop.call_later(lag_s, self._show, revision)
        else:
            self._show(revision)

    def lose(self, reason: str) -> None:
        """Break the stream."""
        self._lost = reason
        self._ready.set()

    async def receive(self) -> pb.WatchResponse:
        while True:
            await self._links.wait_thawed(self._member.id)
            if self._lost:
                raise Uncertain(self._lost)
            if not self._responses and self._sent < self._shown:
                self._responses.extend(self._next())
            if self._responses:
                return cast("pb.WatchResponse", self._responses.popleft())
            self._ready.clear()
            self._is_waited_for = True
            try:
                await self._ready.wait()
            finally:
                self._is_waited_for = False

    def offer_to(self, take: Callable[[pb.WatchResponse], bool]) -> None:
        self._take = take

    async def request_progress(self) -> None:
        self._responses.append(_Response(_Header(min(self._sent, self._shown))))
        self._ready.set()

    def _next(self) -> list[_Response]:
        """Return the fragments of the next response, usually a single one."""
        kv = self._raft.kv
        if self._sent + 1 <= kv.compacted:
            self._sent = self._shown
            return [_Response(_Header(self._shown), canceled=True, compact_revision=kv.compacted)]
        first, self._sent = self._sent + 1, min(self._shown, self._sent + RESPONSE_REVISIONS)
        header, events = _Header(self._sent), kv.events(first, self._sent)
        if len(events) > 1 and self._random.random() < FRAGMENTED:
            cut = self._random.randrange(1, len(events))
            return [_Response(header, events[:cut], fragment=True), _Response(header, events[cut:])]
        return [_Response(header, events)]

    def _show(self, revision: int) -> None:
        self._shown = max(self._shown, revision)
        if self._is_offered():
            self._responses.extend(self._next())
            if len(self._responses) == 1 and self._take(cast("pb.WatchResponse", self._responses[0])):
                self._responses.clear()
                if self._sent == self._shown:
                    return
        self._ready.set()

    def _is_offered(self) -> bool:
        """Return whether ``receive`` waits with an empty queue, so that a new response is offered to the consumer
        first.
        """
        return (
            self._is_waited_for
            and not self._ready.is_set()
            and not self._responses
            and self._sent < self._shown
            and not self._links.is_frozen(self._member.id)
        )
