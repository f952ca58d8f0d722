"""Calls to this manager's own etcd member, over its unix socket.  Every call has a deadline.

Keys here are etcd's, in full.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import Message

from skep.rpc.calls import Calls
from skep.rpc.client import ClientStream
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.errors import Uncertain, answers_of_etcd

A = TypeVar("A", bound=Message)

WRITE_S = 1.0
"""A write sent in the moment the leader dies is lost without a word; after this time its outcome is looked up."""

WRITE_S_MAX = 7.0
"""Where writes take longer: etcd itself gives up after 5 s and two election timeouts."""

READ_S = 2.0
CHANGE_S = 5.0
"""For a change of the membership."""

LOAD_S = 10.0
DEFRAGMENT_S = 120.0


class Patience:
    """How long the answer to a write is waited for: ``WRITE_S``, and longer while writes take longer."""

    def __init__(self) -> None:
        self.seconds = WRITE_S

    def missed(self) -> None:
        """No answer came in this time."""
        self.seconds = min(2 * self.seconds, WRITE_S_MAX)

    def answered(self, took_s: float) -> None:
        """One came after ``took_s``."""
        if took_s < self.seconds / 4:
            self.seconds = max(self.seconds / 2, WRITE_S)


class Watching:
    """One open watch stream."""

    def __init__(self, stream: ClientStream) -> None:
        self._stream = stream

    async def receive(self) -> pb.WatchResponse:
        """The next response; waits for as long as nothing happens.  Raises: Uncertain: the stream is gone."""
        with answers_of_etcd():
            message = await self._stream.receive()
            if message is None:
                raise Uncertain("the store ended the watch")
        return pb.WatchResponse.FromString(message)

    def offer_to(self, take: Callable[[pb.WatchResponse], bool]) -> None:
        """Show ``take`` first what comes while ``receive`` waits; it says whether that is done with.

        It saves a small change the way through the event loop to whoever waits.
        """
        self._stream.offer_to(lambda message: take(pb.WatchResponse.FromString(message)))

    async def request_progress(self) -> None:
        """Ask for the revision up to which everything was sent."""
        request = pb.WatchRequest(progress_request=pb.WatchProgressRequest())
        with answers_of_etcd():
            self._stream.send(request.SerializeToString())


class Client:
    """etcd's interface, as far as Skep calls it.  Use it in ``async with``."""

    def __init__(self, socket: Path) -> None:
        self._calls = Calls(socket)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._calls.close()

    async def range(self, request: pb.RangeRequest, *, timeout_s: float = READ_S) -> pb.RangeResponse:
        """Read keys; linearizable unless the request says otherwise."""
        return await self._call("KV/Range", pb.RangeResponse, request, timeout_s)

    async def put(self, key: bytes, value: bytes, *, timeout_s: float = WRITE_S) -> pb.PutResponse:
        """Write one key without asking what was there.

        As a nested transaction, which etcd's quota lets through as it does with all others of Skep: the quota is kept
        by Skep (``store.space``), and what settles writes or elects a leader may never be stopped by it.
        Source: etcd 3.5, server/storage/quota.go (costTxn).
        """
        put = pb.RequestOp(request_put=pb.PutRequest(key=key, value=value))
        reply = await self.txn(pb.TxnRequest(success=[nested(put)]), timeout_s=timeout_s)
        return pb.PutResponse(header=reply.header)

    def txn(self, request: pb.TxnRequest, *, timeout_s: float = WRITE_S) -> Awaitable[pb.TxnResponse]:
        """One raft entry: compares, then writes.  On its way at once, if the connection stands; to be awaited."""
        message = request.SerializeToString()
        path = _path("KV/Txn")
        call = self._calls.begin(path, message, timeout_s)
        answer = call.answer() if call is not None else self._calls.unary(path, message, timeout_s)
        return _answered(pb.TxnResponse, answer)

    async def compact(self, revision: int, *, timeout_s: float = LOAD_S) -> None:
        """Forget history before ``revision``; returns when this member's file has its pages back."""
        request = pb.CompactionRequest(revision=revision, physical=True)
        await self._call("KV/Compact", pb.CompactionResponse, request, timeout_s)

    async def status(self, *, timeout_s: float = READ_S) -> pb.StatusResponse:
        """What this member knows by itself: leader, term, size.  Answered without a quorum."""
        return await self._call("Maintenance/Status", pb.StatusResponse, pb.StatusRequest(), timeout_s)

    async def defragment(self) -> None:
        """Give the free pages of this member's file back.  It answers nothing else meanwhile: some 9 s per GB."""
        await self._call(
            "Maintenance/Defragment", pb.DefragmentResponse, pb.DefragmentRequest(), DEFRAGMENT_S
        )

    async def disarm(self) -> int:
        """End all alarms about space, of every member; how many there were."""
        all_of = pb.AlarmRequest(action=pb.AlarmRequest.GET, alarm=pb.NOSPACE)
        found = (await self._call("Maintenance/Alarm", pb.AlarmResponse, all_of, CHANGE_S)).alarms
        for alarm in found:
            request = pb.AlarmRequest(
                action=pb.AlarmRequest.DEACTIVATE, memberID=alarm.memberID, alarm=pb.NOSPACE
            )
            await self._call("Maintenance/Alarm", pb.AlarmResponse, request, CHANGE_S)
        return len(found)

    async def members(self, *, timeout_s: float = READ_S, is_current: bool = False) -> pb.MemberListResponse:
        """The members of the cluster as this one knows them; with ``is_current`` as a quorum does."""
        return await self._call(
            "Cluster/MemberList",
            pb.MemberListResponse,
            pb.MemberListRequest(linearizable=is_current),
            timeout_s,
        )

    async def add_learner(self, url: str, *, timeout_s: float = CHANGE_S) -> pb.MemberAddResponse:
        """Take a member in that learns and has no vote yet."""
        request = pb.MemberAddRequest(peer_urls=[url], is_learner=True)
        return await self._call("Cluster/MemberAdd", pb.MemberAddResponse, request, timeout_s)

    async def promote(self, member_id: int, *, timeout_s: float = CHANGE_S) -> None:
        """Give a learner its vote."""
        await self._call(
            "Cluster/MemberPromote",
            pb.MemberPromoteResponse,
            pb.MemberPromoteRequest(id=member_id),
            timeout_s,
        )

    async def remove(self, member_id: int, *, timeout_s: float = CHANGE_S) -> None:
        """Put a member out; its process ends by itself when it hears of it."""
        await self._call(
            "Cluster/MemberRemove", pb.MemberRemoveResponse, pb.MemberRemoveRequest(id=member_id), timeout_s
        )

    async def move_leader(self, member_id: int, *, timeout_s: float = CHANGE_S) -> None:
        """Hand raft's leadership over; only the leader's own member does that."""
        await self._call(
            "Maintenance/MoveLeader",
            pb.MoveLeaderResponse,
            pb.MoveLeaderRequest(target_id=member_id),
            timeout_s,
        )

    async def snapshot(self) -> AsyncIterator[bytes]:
        """The whole store as its member has it now, in pieces; the last 32 bytes are the SHA-256 of the rest.

        Answered without a quorum.  Raises: Uncertain: it broke off, or nothing came for 10 s.
        """
        request = pb.SnapshotRequest().SerializeToString()
        with answers_of_etcd():
            async with self._calls.stream(
                _path("Maintenance/Snapshot"), request, timeout_s=READ_S, is_last=True
            ) as stream:
                while True:
                    async with asyncio.timeout(LOAD_S):
                        piece = await stream.receive()
                    if piece is None:
                        return
                    yield pb.SnapshotResponse.FromString(piece).blob

    @asynccontextmanager
    async def watch(self, prefix: bytes, after: int) -> AsyncIterator[Watching]:
        """Follow all keys below ``prefix`` that change after revision ``after``.

        The stream breaks when the member loses its leader, so that silence means that nothing happens.
        """
        create = pb.WatchCreateRequest(
            key=prefix, range_end=prefix_end(prefix), start_revision=after + 1, fragment=True
        )
        request = pb.WatchRequest(create_request=create).SerializeToString()
        async with AsyncExitStack() as stack:
            with answers_of_etcd():
                opening = self._calls.stream(
                    _path("Watch/Watch"), request, timeout_s=READ_S, metadata=(("hasleader", "true"),)
                )
                stream = await stack.enter_async_context(opening)
            yield Watching(stream)

    async def _call(self, name: str, reply: type[A], request: Message, timeout_s: float) -> A:
        return await _answered(reply, self._calls.unary(_path(name), request.SerializeToString(), timeout_s))


async def _answered(reply: type[A], answer: Awaitable[bytes]) -> A:
    with answers_of_etcd():
        return reply.FromString(await answer)


def nested(operation: pb.RequestOp) -> pb.RequestOp:
    """``operation`` as a transaction within the transaction."""
    return pb.RequestOp(request_txn=pb.TxnRequest(success=[operation]))


def _path(name: str) -> str:
    return f"/etcdserverpb.{name}"


def prefix_end(prefix: bytes) -> bytes:
    """The first key after all that begin with ``prefix`` (which ends with a byte below 255)."""
    return prefix[:-1] + bytes([prefix[-1] + 1])
