"""The client of this manager's own etcd member.  It uses one connection to the unix socket, and every call has a
deadline.

A small API request makes one or two of these calls, which are most of its cost.  Headers and message are therefore sent
with one write, and a response wakes its caller once, in however many reads it arrives.  If a connection breaks, or the
peer closes it with GOAWAY, all its calls fail, and the next call opens another connection.

Keys are complete etcd keys, with the prefix.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import Message

from skep.rpc import headers
from skep.rpc.client import Bounds, ClientConnection, ClientStream
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.errors import Interrupted, Uncertain, etcd_errors

M = TypeVar("M", bound=Message)

BOUNDS = Bounds(stream_window=8 * 1024 * 1024, connection_window=16 * 1024 * 1024, message=512 * 1024 * 1024)
"""etcd responds to a read of many keys with one message, and is trusted not to exhaust the memory with it."""

WRITE_S = 1.0
"""Timeout of a write in seconds.  A leader that is dying does not respond, so the outcome is then determined in another
way.
"""

WRITE_S_MAX = 7.0
"""Maximum timeout of a write: etcd itself stops waiting after 5 s and two election timeouts."""

READ_S = 2.0
"""Timeout of a read."""
CHANGE_S = 5.0
"""Timeout of a membership change."""

LOAD_S = 10.0
"""Timeout of a compaction, of a page of a full read, and of each part of a snapshot."""
RESTART_S, RECONNECT_S = 0.5, 0.01
"""Seconds for which a call waits for the socket of a member that restarts, and seconds between its attempts.

A restart before another member is added takes a tenth of a second, and must not fail requests.
"""
DEFRAGMENT_S = 120.0
"""Timeout of a defragmentation, which takes some 9 s per GB."""


class AdaptiveTimeout:
    """The timeout of a write, which is ``WRITE_S`` or, while writes take longer, more."""

    def __init__(self) -> None:
        self.seconds = WRITE_S

    def expired(self) -> None:
        """Record that no response arrived in this time."""
        self.seconds = min(2 * self.seconds, WRITE_S_MAX)

    def responded(self, took_s: float) -> None:
        """Record a response after ``took_s``."""
        if took_s < self.seconds / 4:
            self.seconds = max(self.seconds / 2, WRITE_S)


class WatchStream:
    """An open watch of etcd."""

    def __init__(self, stream: ClientStream) -> None:
        self._stream = stream

    async def receive(self) -> pb.WatchResponse:
        """Wait for the next response and return it.  Raises Uncertain if the stream ended."""
        with etcd_errors():
            message = await self._stream.receive()
            if message is None:
                raise Uncertain("the store ended the watch")
        return pb.WatchResponse.FromString(message)

    def offer_to(self, take: Callable[[pb.WatchResponse], bool]) -> None:
        """Call ``take`` with each response that arrives while ``receive`` waits.

        If it returns True, ``receive`` does not return the response.  A small change is then processed without another
        turn of the event loop.
        """
        self._stream.offer_to(lambda message: take(pb.WatchResponse.FromString(message)))

    async def request_progress(self) -> None:
        """Request a response with the revision up to which everything has been sent."""
        request = pb.WatchRequest(progress_request=pb.WatchProgressRequest())
        with etcd_errors():
            self._stream.send(request.SerializeToString())


class EtcdClient:
    """The calls of etcd's API that Skep uses.  Use it in ``async with``."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._connection: ClientConnection | None = None
        self._connecting = asyncio.Lock()

    async def __aenter__(self) -> "EtcdClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection.  Calls in flight fail."""
        if self._connection is not None:
            self._connection.abort()

    async def range(self, request: pb.RangeRequest, *, timeout_s: float = READ_S) -> pb.RangeResponse:
        """Read keys.  Linearizable unless the request says otherwise."""
        return await self.call("KV/Range", pb.RangeResponse, request, timeout_s)

    async def put(self, key: bytes, value: bytes, *, timeout_s: float = WRITE_S) -> pb.PutResponse:
        """Write one key unconditionally.

        Like all writes of Skep, it is a nested transaction, because etcd does not apply its quota to those.  Skep keeps
        the quota itself (``store.space``), and must never be refused a write that determines an outcome or elects a
        leader.  Source: etcd 3.5, server/storage/quota.go (costTxn).
        """
        put = pb.RequestOp(request_put=pb.PutRequest(key=key, value=value))
        reply = await self.txn(pb.TxnRequest(success=[nested(put)]), timeout_s=timeout_s)
        return pb.PutResponse(header=reply.header)

    def txn(self, request: pb.TxnRequest, *, timeout_s: float = WRITE_S) -> Awaitable[pb.TxnResponse]:
        """Send one raft entry with compares and writes.  If there is a connection, it is sent before this returns."""
        message = request.SerializeToString()
        path = _path("KV/Txn")
        call = self.begin(path, message, timeout_s)
        response = call.response() if call is not None else self.unary(path, message, timeout_s)
        return _decode_response(pb.TxnResponse, response)

    async def compact(self, revision: int, *, timeout_s: float = LOAD_S) -> None:
        """Discard the history before ``revision``.  Returns once the pages in this member's file are free."""
        request = pb.CompactionRequest(revision=revision, physical=True)
        await self.call("KV/Compact", pb.CompactionResponse, request, timeout_s)

    async def status(self, *, timeout_s: float = READ_S) -> pb.StatusResponse:
        """Return this member's leader, term and size.  Works without a quorum."""
        call = partial(self.call, "Maintenance/Status", pb.StatusResponse, pb.StatusRequest(), timeout_s)
        try:
            return await call()
        except Interrupted:
            return await call()  # of the restarted member: requests of users begin with this call

    async def defragment(self) -> None:
        """Return the free pages of this member's file to the disk.  The member is blocked for some 9 s per GB."""
        await self.call("Maintenance/Defragment", pb.DefragmentResponse, pb.DefragmentRequest(), DEFRAGMENT_S)

    async def disarm(self) -> int:
        """Clear the NOSPACE alarms of every member.  Returns how many there were."""
        all_of = pb.AlarmRequest(action=pb.AlarmRequest.GET, alarm=pb.NOSPACE)
        found = (await self.call("Maintenance/Alarm", pb.AlarmResponse, all_of, CHANGE_S)).alarms
        for alarm in found:
            request = pb.AlarmRequest(
                action=pb.AlarmRequest.DEACTIVATE, memberID=alarm.memberID, alarm=pb.NOSPACE
            )
            await self.call("Maintenance/Alarm", pb.AlarmResponse, request, CHANGE_S)
        return len(found)

    async def members(self, *, timeout_s: float = READ_S, is_current: bool = False) -> pb.MemberListResponse:
        """Return the members that this member knows, or with ``is_current`` the members according to a linearizable
        read.
        """
        return await self.call(
            "Cluster/MemberList",
            pb.MemberListResponse,
            pb.MemberListRequest(linearizable=is_current),
            timeout_s,
        )

    async def add_learner(self, url: str, *, timeout_s: float = CHANGE_S) -> pb.MemberAddResponse:
        """Add a member as a learner, without a vote."""
        request = pb.MemberAddRequest(peer_urls=[url], is_learner=True)
        return await self.call("Cluster/MemberAdd", pb.MemberAddResponse, request, timeout_s)

    async def promote(self, member_id: int, *, timeout_s: float = CHANGE_S) -> None:
        """Make a learner a voter."""
        await self.call(
            "Cluster/MemberPromote",
            pb.MemberPromoteResponse,
            pb.MemberPromoteRequest(id=member_id),
            timeout_s,
        )

    async def remove(self, member_id: int, *, timeout_s: float = CHANGE_S) -> None:
        """Remove a member.  Its process exits when that is committed."""
        await self.call(
            "Cluster/MemberRemove", pb.MemberRemoveResponse, pb.MemberRemoveRequest(id=member_id), timeout_s
        )

    async def move_leader(self, member_id: int, *, timeout_s: float = CHANGE_S) -> None:
        """Transfer raft's leadership.  Only the leader itself accepts this."""
        await self.call(
            "Maintenance/MoveLeader",
            pb.MoveLeaderResponse,
            pb.MoveLeaderRequest(target_id=member_id),
            timeout_s,
        )

    async def snapshot(self) -> AsyncIterator[bytes]:
        """Yield the whole store of this member in chunks.  The last 32 bytes are the SHA-256 of the rest.

        Works without a quorum.  Raises Uncertain if it was interrupted or nothing arrived for 10 s.
        """
        request = pb.SnapshotRequest().SerializeToString()
        with etcd_errors():
            async with self.stream(
                _path("Maintenance/Snapshot"), request, timeout_s=READ_S, is_last=True
            ) as stream:
                while True:
                    async with asyncio.timeout(LOAD_S):
                        chunk = await stream.receive()
                    if chunk is None:
                        return
                    yield pb.SnapshotResponse.FromString(chunk).blob

    @asynccontextmanager
    async def watch(self, prefix: bytes, after: int) -> AsyncIterator[WatchStream]:
        """Watch all keys below ``prefix`` for changes after revision ``after``.

        The stream ends if the member loses its leader, so silence means that nothing has changed.
        """
        create = pb.WatchCreateRequest(
            key=prefix, range_end=prefix_end(prefix), start_revision=after + 1, fragment=True
        )
        request = pb.WatchRequest(create_request=create).SerializeToString()
        async with AsyncExitStack() as stack:
            with etcd_errors():
                opening = self.stream(
                    _path("Watch/Watch"), request, timeout_s=READ_S, metadata=(("hasleader", "true"),)
                )
                stream = await stack.enter_async_context(opening)
            yield WatchStream(stream)

    async def call(self, name: str, reply: type[M], request: Message, timeout_s: float) -> M:
        return await _decode_response(reply, self.unary(_path(name), request.SerializeToString(), timeout_s))

    # -- gRPC ------------------------------------------------------------------------------------------------------

    async def unary(self, path: str, request: bytes, timeout_s: float) -> bytes:
        """Return the response to ``request``.  Raises CallFailed, TimeoutError, or OSError without a connection."""
        call = self.begin(path, request, timeout_s)
        if call is None:
            deadline = asyncio.get_running_loop().time() + timeout_s
            async with asyncio.timeout_at(deadline):
                connection = await self._ensure_connected()
            left_s = deadline - asyncio.get_running_loop().time()
            call = UnaryCall(connection, headers.request_block(path, timeout_s), request, left_s)
        return await call.response()

    def begin(self, path: str, request: bytes, timeout_s: float) -> "UnaryCall | None":
        """Send ``request`` now, and return the call to await its response, or None without a connection."""
        connection = self._connection
        if connection is None or connection.is_lost or connection.is_used_up:
            return None
        return UnaryCall(connection, headers.request_block(path, timeout_s), request, timeout_s)

    @asynccontextmanager
    async def stream(
        self,
        path: str,
        request: bytes,
        *,
        timeout_s: float,
        metadata: tuple[tuple[str, str], ...] = (),
        is_last: bool = False,
    ) -> AsyncIterator[ClientStream]:
        """Open a streaming call that begins with ``request`` and ends with the context.

        Args:
            is_last: Whether ``request`` is the only message.
            timeout_s: Timeout of the connection.

        Raises:
            TimeoutError: The connection took too long.
            OSError: The connection failed.
        """
        async with asyncio.timeout(timeout_s):
            connection = await self._ensure_connected()
        with connection.stream() as stream:
            stream.begin(headers.request_block(path, None, metadata), request, is_last=is_last)
            yield stream

    async def _ensure_connected(self) -> ClientConnection:
        if self._connection is None or self._connection.is_lost:
            async with self._connecting:
                if self._connection is None or self._connection.is_lost:
                    self._connection = await self._connect()
        return self._connection

    async def _connect(self) -> ClientConnection:
        loop = asyncio.get_running_loop()
        until = loop.time() + RESTART_S
        while True:
            try:
                _, connection = await loop.create_unix_connection(
                    partial(ClientConnection, BOUNDS), str(self._socket)
                )
                return connection
            except (FileNotFoundError, ConnectionRefusedError):
                if loop.time() >= until:
                    raise
                await asyncio.sleep(RECONNECT_S)


class UnaryCall:
    """A call whose request was sent, with one response."""

    def __init__(self, connection: ClientConnection, block: bytes, request: bytes, timeout_s: float) -> None:
        self._connection = connection
        self._stream = connection.open()
        # A timer costs half as much as asyncio.timeout, which has to handle tasks and cancellation.
        self._expiry = asyncio.get_running_loop().call_later(timeout_s, self._stream.expire)
        self._stream.begin(block, request, is_last=True)

    async def response(self) -> bytes:
        """Return the response.  Raises CallFailed, TimeoutError or Lost."""
        try:
            return await self._stream.only_message()
        finally:
            self._expiry.cancel()
            self._connection.release(self._stream)


async def _decode_response(reply: type[M], response: Awaitable[bytes]) -> M:
    with etcd_errors():
        return reply.FromString(await response)


def nested(operation: pb.RequestOp) -> pb.RequestOp:
    """Return ``operation`` as a nested transaction."""
    return pb.RequestOp(request_txn=pb.TxnRequest(success=[operation]))


def _path(name: str) -> str:
    return f"/etcdserverpb.{name}"


def prefix_end(prefix: bytes) -> bytes:
    """Return the first key after all keys that begin with ``prefix``, whose last byte is below 255."""
    return prefix[:-1] + bytes([prefix[-1] + 1])
