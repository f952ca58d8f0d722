"""A client of BuildKit's protocols that acts as buildx does, and can also be hostile."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import Message

from skep.engine.buildkit import buildkit_pb2 as pb
from skep.engine.buildkit.protocol.sessions import BOUNDS
from skep.rpc.client import ClientConnection, ClientStream
from skep.rpc.core import MESSAGE_HEAD
from skep.rpc.headers import request_block
from skep.rpc.server import PeerLimits, ServerConnection, ServerStream
from skep.rpc.status import CallFailed, StatusCode

A = TypeVar("A", bound=Message)

_DIFF_COPY = "/moby.filesync.v1.FileSync/DiffCopy"
_FILE_SEND = "/moby.filesync.v1.FileSend/DiffCopy"
LIMIT_S = 60.0


def a_file(path: str, content: str, **fields: int) -> tuple[pb.Stat, bytes]:
    return pb.Stat(path=os.fsencode(path), mode=0o644, size=len(content), **fields), content.encode()


def a_link(path: str, target: str) -> tuple[pb.Stat, bytes]:
    return pb.Stat(path=os.fsencode(path), mode=(1 << 27) | 0o777, linkname=target.encode()), b""


Tree = Sequence[tuple[pb.Stat, bytes]]


class FileServer:
    """Serves directories, one per request: for the Dockerfile, for ``.dockerignore``, for the context."""

    def __init__(
        self,
        *trees: Tree,
        packets: Sequence[pb.Packet] | None = None,
        stays: bool = True,
        receives: Sequence[pb.Packet] | None = None,
        takes: bool = True,
    ) -> None:
        """Prepare the responses.

        Args:
            packets: sent instead of the last tree, whatever is requested.
            stays: whether the call stays open after ``packets``.
            receives: sent to an engine that offers the files of a result, or None for a client that accepts none.
            takes: if False, the client does not read what follows, and the call stays open.
        """
        self.methods = [_DIFF_COPY] if receives is None else [_DIFF_COPY, _FILE_SEND]
        self._receives = receives or ()
        self._trees = list(trees)
        self._packets = packets
        self._stays = stays
        self._takes = takes
        self.requested: list[str] = []
        """Paths of the requested files."""

    async def handle(self, stream: ServerStream) -> None:
        if stream.request.path == _FILE_SEND:
            for packet in self._receives:
                await stream.send_message(packet)
            if not self._takes:
                await asyncio.Event().wait()
            await stream.send_status()
            return
        if stream.request.path != _DIFF_COPY:
            await stream.send_status(CallFailed(StatusCode.UNIMPLEMENTED, "not served"))
            return
        tree = self._trees.pop(0)
        if not self._trees and self._packets is not None:
            for packet in self._packets:
                await stream.send_message(packet)
            while self._stays and await stream.recv_data(MESSAGE_HEAD.size):
                pass
        else:
            await self._serve(stream, tree)
        await stream.send_status()

    async def _serve(self, stream: ServerStream, tree: Tree) -> None:
        for stat, _ in tree:
            await stream.send_message(pb.Packet(type=pb.Packet.STAT, stat=stat))
        await stream.send_message(pb.Packet(type=pb.Packet.STAT))
        while head := await stream.recv_data(MESSAGE_HEAD.size):
            packet = pb.Packet.FromString(await stream.recv_data(MESSAGE_HEAD.unpack(head)[1]))
            if packet.type == pb.Packet.REQ:
                stat, content = tree[packet.id]
                self.requested.append(os.fsdecode(stat.path))
                await stream.send_message(pb.Packet(type=pb.Packet.DATA, id=packet.id, data=content))
                await stream.send_message(pb.Packet(type=pb.Packet.DATA, id=packet.id))
            elif packet.type == pb.Packet.FIN:
                await stream.send_message(pb.Packet(type=pb.Packet.FIN))
            elif packet.type == pb.Packet.ERR:
                return


class _Head(asyncio.Protocol):
    """Waits for the response's head, and leaves the rest to the next protocol."""

    def __init__(self) -> None:
        self._received = b""
        self.is_whole = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if b"\r\n\r\n" in self._received:
            self.is_whole.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_whole.set()

    def parts(self) -> tuple[bytes, bytes]:
        head, _, rest = self._received.partition(b"\r\n\r\n")
        return head, rest


async def _upgrade(
    socket: Path,
    target: str,
    headers: Sequence[tuple[str, str]],
    begin: Callable[[asyncio.Transport], asyncio.Protocol],
) -> asyncio.Transport:
    """Upgrade a connection to the protocol that ``begin`` returns.  Raises: ConnectionError: with the response's
    body.
    """
    transport, response = await asyncio.get_running_loop().create_unix_connection(_Head, str(socket))
    lines = [f"POST {target} HTTP/1.1", "Host: x", "Connection: Upgrade", "Upgrade: h2c"]
    lines += [f"{name}: {value}" for name, value in headers]
    transport.write("\r\n".join((*lines, "", "")).encode())
    async with asyncio.timeout(LIMIT_S):
        await response.is_whole.wait()
    head, rest = response.parts()
    if not head.startswith(b"HTTP/1.1 101"):
        transport.abort()
        raise ConnectionError(rest.decode())
    protocol = begin(transport)
    transport.set_protocol(protocol)
    if rest:
        protocol.data_received(rest)
    return transport


@asynccontextmanager
async def session(
    socket: Path, id: str, files: FileServer, *, key: str = ""
) -> AsyncIterator[asyncio.Transport]:
    """Run a session that serves ``files``."""
    connection = ServerConnection(files.handle)

    def begin(transport: asyncio.Transport) -> asyncio.Protocol:
        connection.begin(transport, PeerLimits(streams=32, stream_window=1 << 20, connection_window=8 << 20))
        return connection

    headers = [("X-Docker-Expose-Session-Uuid", id), ("X-Docker-Expose-Session-Sharedkey", key)]
    headers += [("X-Docker-Expose-Session-Grpc-Method", method) for method in files.methods]
    transport = await _upgrade(socket, "/session", headers, begin)
    try:
        yield transport
    finally:
        connection.abort()
        await connection.wait_closed()


class Calls:
    """Calls of the control connection."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection

    async def call(self, method: str, request: Message, response: type[A], *, build: str = "") -> A:
        metadata = (("buildkit-controlapi-buildid", build),) if build else ()
        async with asyncio.timeout(LIMIT_S):
            with self._connection.stream() as stream:
                stream.begin(request_block(method, None, metadata), request.SerializeToString(), is_last=True)
                return response.FromString(await stream.only_message())

    @contextmanager
    def stream(self, method: str, metadata: tuple[tuple[str, str], ...]) -> Iterator[ClientStream]:
        """Open a bidirectional call.  It is abandoned at the end of the block."""
        with self._connection.stream() as stream:
            stream.begin(request_block(method, None, metadata), None, is_last=False)
            yield stream

    async def solve(self, request: pb.SolveRequest) -> pb.SolveResponse:
        return await self.call("/moby.buildkit.v1.Control/Solve", request, pb.SolveResponse)

    async def status(self, ref: str) -> list[pb.StatusResponse]:
        """Return everything that a build reports."""
        found = []
        async with asyncio.timeout(LIMIT_S):
            with self._connection.stream() as stream:
                block = request_block("/moby.buildkit.v1.Control/Status", None)
                stream.begin(block, pb.StatusRequest(ref=ref).SerializeToString(), is_last=True)
                while (data := await stream.receive()) is not None:
                    found.append(pb.StatusResponse.FromString(data))
        return found


class _Sending(asyncio.Transport):
    """Sends written data as messages of a call."""

    def __init__(self, stream: ClientStream) -> None:
        super().__init__()
        self._stream = stream
        self._is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._is_closed and not self._stream.has_ended:
            self._stream.send(pb.BytesMessage(data=bytes(data)).SerializeToString())

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def close(self) -> None:
        self._is_closed = True

    abort = close


@asynccontextmanager
async def session_by_call(calls: Calls, id: str, files: FileServer) -> AsyncIterator[None]:
    """Run a session that serves ``files`` by a call of the control connection."""
    metadata = ("x-docker-expose-session-uuid", id), ("x-docker-expose-session-grpc-method", _DIFF_COPY)
    served = ServerConnection(files.handle)
    with calls.stream("/moby.buildkit.v1.Control/Session", metadata) as stream:
        limits = PeerLimits(streams=32, stream_window=1 << 20, connection_window=8 << 20)
        served.begin(_Sending(stream), limits)

        async def receive() -> None:
            while (data := await stream.receive()) is not None:
                served.data_received(pb.BytesMessage.FromString(data).data)

        receiving = asyncio.create_task(receive())
        try:
            yield
        finally:
            receiving.cancel()
            await asyncio.wait([receiving])
            served.abort()
            await served.wait_closed()


@asynccontextmanager
async def control(socket: Path) -> AsyncIterator[Calls]:
    """Open a control connection."""
    connection = ClientConnection(BOUNDS)

    def begin(transport: asyncio.Transport) -> asyncio.Protocol:
        connection.connection_made(transport)
        return connection

    await _upgrade(socket, "/grpc", (), begin)
    try:
        yield Calls(connection)
    finally:
        connection.abort()
