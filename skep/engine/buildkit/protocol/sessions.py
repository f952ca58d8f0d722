"""Sessions: connections on which the engine calls its clients for files, secrets, credentials and ssh agents.

A client opens one (``POST /session``, upgraded to HTTP/2), names the methods that it serves, and keeps it open as long
as its build runs.  When it closes, the build ends.  A client may stop or lose its network without notice, so the engine
calls it every few seconds, as BuildKit does.

Source: moby/buildkit, session/manager.go, session/grpc.go.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import quote_plus

from google.protobuf.message import Message

from skep.aio.groups import errors_as_they_are
from skep.errors import (
    AlreadyExists,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SkepError,
    Unavailable,
    Unimplemented,
)
from skep.rpc.client import Bounds, ClientConnection, ClientStream
from skep.rpc.errors import peer_errors
from skep.rpc.headers import request_block

A = TypeVar("A", bound=Message)

SESSIONS_MAX = 64
"""Maximum number of open sessions.  Each may buffer a whole window of unread data."""
WAIT_S = 5.0
"""Seconds to wait for a session: a build may be requested before its session arrives."""
CALL_S = 60.0
"""Seconds for a call.  A client may prompt its user, or run a credential helper."""
SILENT_S = 120.0
"""Seconds without progress after which a client counts as lost, because it does not read or send."""
_CHECK_EVERY_S, _CHECK_S = 15.0, 60.0
"""Seconds between two health checks of a client, and for its response: a client that uploads much may be slow."""

BOUNDS = Bounds(stream_window=1 << 20, connection_window=8 << 20, message=16 << 20)
"""The message limit is BuildKit's."""

_HEALTH = "/grpc.health.v1.Health/Check"
_HEADER = "x-docker-expose-session-"
_WHO = "the client of the build"


class SessionInfo:
    """Client's announcement when it opens a session."""

    __slots__ = ("id", "methods", "shared_key")

    def __init__(self, id: str, shared_key: str, methods: Sequence[str]) -> None:
        self.id = id
        self.shared_key = shared_key
        """Key of the client's directory.  It is the same in every build of that directory."""
        self.methods = frozenset(method.lower() for method in methods)

    @classmethod
    def of(cls, headers: Iterable[tuple[str, str]]) -> "SessionInfo":
        """Read the headers of a request that opens a session.  Raises: InvalidArgument."""
        found: dict[str, list[str]] = {}
        for name, value in headers:
            found.setdefault(name.lower().removeprefix(_HEADER), []).append(value)
        (id, *_), (key, *_) = found.get("uuid", [""]), found.get("sharedkey", [""])
        if not id:
            raise InvalidArgument("a session needs an id")
        return cls(id, key, found.get("grpc-method", []))


class BuildSession:
    """Calls to one client.  ``silent_s``: seconds without progress after which the client counts as lost."""

    def __init__(self, info: SessionInfo, silent_s: float = SILENT_S) -> None:
        self.id = info.id
        self.silent_s = silent_s
        self.shared_key = info.shared_key
        self.connection = ClientConnection(BOUNDS)
        self._methods = info.methods
        self._closed = asyncio.Event()

    def serves(self, method: str) -> bool:
        """Return whether the client serves ``/package.Service/Method``."""
        return method.lower() in self._methods

    async def call(self, method: str, request: Message, response: type[A], *, timeout_s: float = CALL_S) -> A:
        """Make a unary call.

        Raises: SkepError: with the client's status; Unimplemented: the client does not serve this method.
        """
        if not self.serves(method):
            raise Unimplemented(f"method {method} not supported by the client")
        return response.FromString(await self._call(method, request.SerializeToString(), timeout_s))

    async def _call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        with peer_errors(_WHO):
            async with asyncio.timeout(timeout_s):
                with self.connection.stream() as stream:
                    stream.begin(request_block(method, None), request, is_last=True)
                    return await stream.only_message()

    @asynccontextmanager
    async def stream(
        self, method: str, metadata: Sequence[tuple[str, str]] = (), *, silent_s: float | None
    ) -> AsyncIterator["Messages"]:
        """Make a call in which both sides send.  The end of the block abandons an open call.

        ``silent_s``: Longest wait in seconds for each message of the client.  None for no limit.
        """
        if not self.serves(method):
            raise Unimplemented(f"method {method} not supported by the client")
        with peer_errors(_WHO):
            stream = self.connection.open()
            try:
                stream.begin(_uncached_block(method, metadata), None, is_last=False)
                yield Messages(stream, silent_s)
            finally:
                self.connection.release(stream)

    async def keep_checking_while(self, serving: Coroutine[Any, Any, None]) -> None:
        """Serve the connection, and end it when the client no longer responds."""
        async with errors_as_they_are(), asyncio.TaskGroup() as group:
            checking = group.create_task(self._keep_checking(), name="check session")
            await serving
            checking.cancel()

    async def _keep_checking(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_EVERY_S)
            try:
                await self._call(_HEALTH, b"", _CHECK_S)
            except Unavailable:
                self.connection.abort()
                return
            except SkepError:
                return  # the client has no health service, so only a closed connection shows its loss

    async def wait_closed(self) -> None:
        """Wait until the connection has ended."""
        await self._closed.wait()

    def note_closed(self) -> None:
        """Note that the connection has ended."""
        self._closed.set()


class Messages:
    """One streaming call: sends and receives encoded messages."""

    def __init__(self, stream: ClientStream, silent_s: float | None) -> None:
        self._stream = stream
        self._silent_s = silent_s

    async def send(self, message: Message) -> None:
        """Send a message.  Waits while the client reads slowly.  Raises: CallFailed, Lost, TimeoutError."""
        self._stream.send(message.SerializeToString())
        await self._drain()

    async def end(self) -> None:
        """End sending.  Raises: as ``send``."""
        await self._drain()
        self._stream.end_sending()

    async def finish(self) -> None:
        """End sending and wait for the client's status.  Messages received before it are discarded.

        Raises: as ``receive``.
        """
        async with asyncio.timeout(self._silent_s):
            await self.end()
            while await self._stream.receive() is not None:
                pass

    async def receive(self) -> bytes | None:
        """Return the next message, or None after the last.  Raises: CallFailed, Lost, TimeoutError."""
        # A timer for each of the 32,000 messages of 1 GB takes a tenth of the transfer's time.
        if self._stream.has_message:
            return await self._stream.receive()
        async with asyncio.timeout(self._silent_s):
            return await self._stream.receive()

    async def _drain(self) -> None:
        async with asyncio.timeout(self._silent_s):
            await self._stream.drain()

    @property
    def has_more(self) -> bool:
        """Whether ``receive`` returns a message without waiting."""
        return self._stream.has_message


def _uncached_block(method: str, metadata: Sequence[tuple[str, str]]) -> bytes:
    """Encode headers without the cache of encoded headers, which is useless for headers of a single call."""
    return request_block.__wrapped__(method, None, tuple(metadata))


def header_values(name: str, values: Sequence[str]) -> Sequence[tuple[str, str]]:
    """Return ``values`` as headers.

    If one is not ASCII, all are percent-encoded, and another header marks them as encoded.

    Source: session/filesync/filesync.go, encodeOpts.
    """
    if all(value.isascii() for value in values):
        return [(name, value) for value in values]
    return [*((name, quote_plus(os.fsencode(value))) for value in values), (f"{name}-encoded", "1")]


class BuildSessions:
    """All sessions of this engine by id."""

    def __init__(self, sessions_max: int = SESSIONS_MAX, silent_s: float = SILENT_S) -> None:
        self._sessions_max, self._silent_s = sessions_max, silent_s
        self._sessions: dict[str, BuildSession] = {}
        self._arrived = asyncio.Condition()

    def __len__(self) -> int:
        return len(self._sessions)

    @asynccontextmanager
    async def register(self, info: SessionInfo) -> AsyncIterator[BuildSession]:
        """Register a session while the block runs, which serves its connection.

        Raises: AlreadyExists; ResourceExhausted: there are too many.
        """
        if info.id in self._sessions:
            raise AlreadyExists(f"session {info.id} already exists")
        if len(self._sessions) >= self._sessions_max:
            raise ResourceExhausted(f"there are {self._sessions_max} build sessions already")
        session = self._sessions[info.id] = BuildSession(info, self._silent_s)
        try:
            async with self._arrived:
                self._arrived.notify_all()
            yield session
        finally:
            del self._sessions[info.id]
            session.note_closed()

    async def get(self, id: str) -> BuildSession:
        """Return a session, after a short wait if it has not arrived yet.  Raises: NotFound."""
        # BuildKit's clients may add a prefix that distinguishes uses of one session.
        id = id.partition(":")[2] or id
        try:
            async with asyncio.timeout(WAIT_S), self._arrived:
                await self._arrived.wait_for(lambda: id in self._sessions)
                return self._sessions[id]
        except TimeoutError as error:
            raise NotFound(f"no active session for {id}: context deadline exceeded") from error
