"""Calls to this manager's own etcd member, over its unix socket.  Every call has a deadline.

The only module that knows grpclib.  Keys here are etcd's, in full.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message import Message
from grpclib.client import Channel, Stream, StreamStreamMethod, UnaryStreamMethod, UnaryUnaryMethod
from grpclib.config import Configuration

from skep.aio.grpc import breaks_of_grpclib
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.errors import CONNECTION_LOST, Uncertain, answers_of_etcd

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)

WRITE_S = 1.0
"""A write sent in the moment the leader dies is lost without a word; after this time its outcome is looked up."""

READ_S = 2.0
CHANGE_S = 5.0
"""For a change of the membership."""

LOAD_S = 10.0

_WINDOWS = Configuration(
    http2_connection_window_size=16 * 1024 * 1024, http2_stream_window_size=8 * 1024 * 1024
)


class Watching:
    """One open watch stream."""

    def __init__(self, stream: "Stream[pb.WatchRequest, pb.WatchResponse]") -> None:
        self._stream = stream

    async def receive(self) -> pb.WatchResponse:
        """The next response; waits for as long as nothing happens.  Raises: Uncertain: the stream is gone."""
        with answers_of_etcd():
            response = await self._stream.recv_message()
            if response is None:
                await self._stream.recv_trailing_metadata()
                raise Uncertain("the store ended the watch")
        return response

    async def request_progress(self) -> None:
        """Ask for the revision up to which everything was sent."""
        with answers_of_etcd():
            async with asyncio.timeout(READ_S):
                await self._stream.send_message(pb.WatchRequest(progress_request=pb.WatchProgressRequest()))


class Client:
    """etcd's interface, as far as Skep calls it.  Use it in ``async with``."""

    def __init__(self, socket: Path) -> None:
        self._channel = Channel(path=str(socket), config=_WINDOWS)
        kv, maintenance, cluster = "KV", "Maintenance", "Cluster"
        self._range = self._unary(kv, "Range", pb.RangeRequest, pb.RangeResponse)
        self._put = self._unary(kv, "Put", pb.PutRequest, pb.PutResponse)
        self._txn = self._unary(kv, "Txn", pb.TxnRequest, pb.TxnResponse)
        self._compact = self._unary(kv, "Compact", pb.CompactionRequest, pb.CompactionResponse)
        self._status = self._unary(maintenance, "Status", pb.StatusRequest, pb.StatusResponse)
        self._members = self._unary(cluster, "MemberList", pb.MemberListRequest, pb.MemberListResponse)
        self._add = self._unary(cluster, "MemberAdd", pb.MemberAddRequest, pb.MemberAddResponse)
        self._promote = self._unary(
            cluster, "MemberPromote", pb.MemberPromoteRequest, pb.MemberPromoteResponse
        )
        self._remove = self._unary(cluster, "MemberRemove", pb.MemberRemoveRequest, pb.MemberRemoveResponse)
        self._move = self._unary(maintenance, "MoveLeader", pb.MoveLeaderRequest, pb.MoveLeaderResponse)
        self._snapshot = UnaryStreamMethod(
            self._channel, "/etcdserverpb.Maintenance/Snapshot", pb.SnapshotRequest, pb.SnapshotResponse
        )
        self._watch: StreamStreamMethod[pb.WatchRequest, pb.WatchResponse] = StreamStreamMethod(
            self._channel, "/etcdserverpb.Watch/Watch", pb.WatchRequest, pb.WatchResponse
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._channel.close()

    async def range(self, request: pb.RangeRequest, *, timeout_s: float = READ_S) -> pb.RangeResponse:
        """Read keys; linearizable unless the request says otherwise."""
        return await self._call(self._range, request, timeout_s)

    async def put(self, key: bytes, value: bytes, *, timeout_s: float = WRITE_S) -> pb.PutResponse:
        """Write one key without asking what was there."""
        return await self._call(self._put, pb.PutRequest(key=key, value=value), timeout_s)

    async def txn(self, request: pb.TxnRequest, *, timeout_s: float = WRITE_S) -> pb.TxnResponse:
        """One raft entry: compares, then writes."""
        return await self._call(self._txn, request, timeout_s)

    async def compact(self, revision: int, *, timeout_s: float = LOAD_S) -> None:
        """Forget history before ``revision``."""
        await self._call(self._compact, pb.CompactionRequest(revision=revision), timeout_s)

    async def status(self, *, timeout_s: float = READ_S) -> pb.StatusResponse:
        """What this member knows by itself: leader, term, size.  Answered without a quorum."""
        return await self._call(self._status, pb.StatusRequest(), timeout_s)

    async def members(self, *, timeout_s: float = READ_S, is_current: bool = False) -> pb.MemberListResponse:
        """The members of the cluster as this one knows them; with ``is_current`` as a quorum does."""
        return await self._call(self._members, pb.MemberListRequest(linearizable=is_current), timeout_s)

    async def add_learner(self, url: str, *, timeout_s: float = CHANGE_S) -> pb.MemberAddResponse:
        """Take a member in that learns and has no vote yet."""
        request = pb.MemberAddRequest(peer_urls=[url], is_learner=True)
        return await self._call(self._add, request, timeout_s)

    async def promote(self, member_id: int, *, timeout_s: float = CHANGE_S) -> None:
        """Give a learner its vote."""
        await self._call(self._promote, pb.MemberPromoteRequest(id=member_id), timeout_s)

    async def remove(self, member_id: int, *, timeout_s: float = CHANGE_S) -> None:
        """Put a member out; its process ends by itself when it hears of it."""
        await self._call(self._remove, pb.MemberRemoveRequest(id=member_id), timeout_s)

    async def move_leader(self, member_id: int, *, timeout_s: float = CHANGE_S) -> None:
        """Hand raft's leadership over; only the leader's own member does that."""
        await self._call(self._move, pb.MoveLeaderRequest(target_id=member_id), timeout_s)

    async def snapshot(self) -> AsyncIterator[bytes]:
        """The whole store as its member has it now, in pieces; the last 32 bytes are the SHA-256 of the rest.

        Answered without a quorum.  Raises: Uncertain: it broke off, or nothing came for 10 s.
        """
        with answers_of_etcd():
            async with self._snapshot.open() as stream:
                await stream.send_message(pb.SnapshotRequest(), end=True)
                while True:
                    async with asyncio.timeout(LOAD_S):
                        piece = await stream.recv_message()
                    if piece is None:
                        return
                    yield piece.blob

    @asynccontextmanager
    async def watch(self, prefix: bytes, after: int) -> AsyncIterator[Watching]:
        """Follow all keys below ``prefix`` that change after revision ``after``.

        The stream breaks when the member loses its leader, so that silence means that nothing happens.
        """
        stream = self._watch.open(metadata={"hasleader": "true"})
        # Entered and left by hand: grpclib's own exit hides the real error behind "not ended".
        await stream.__aenter__()
        try:
            request = pb.WatchCreateRequest(
                key=prefix, range_end=prefix_end(prefix), start_revision=after + 1, fragment=True
            )
            with answers_of_etcd():
                async with asyncio.timeout(READ_S):
                    await stream.send_message(pb.WatchRequest(create_request=request))
            yield Watching(stream)
        finally:
            with suppress(*CONNECTION_LOST), breaks_of_grpclib():
                _abandon(stream)

    def _unary(self, service: str, name: str, request: type[Q], reply: type[A]) -> "UnaryUnaryMethod[Q, A]":
        return UnaryUnaryMethod(self._channel, f"/etcdserverpb.{service}/{name}", request, reply)

    async def _call(self, method: "UnaryUnaryMethod[Q, A]", request: Q, timeout_s: float) -> A:
        with answers_of_etcd():
            reply: A = await method(request, timeout=timeout_s)
            return reply


def prefix_end(prefix: bytes) -> bytes:
    """The first key after all that begin with ``prefix`` (which ends with a byte below 255)."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def _abandon(stream: "Stream[Any, Any]") -> None:
    """Give the stream back; tell etcd if it is still open."""
    if not stream._send_request_done:
        return
    if stream._stream.closable:
        stream._stream.reset_nowait()
    stream._release_stream()
