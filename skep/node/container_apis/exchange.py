"""Handles one connection of a container to its API socket.

A container with full access is connected to the node's front, and nothing is changed.  For any other container, a
connection carries a single exchange: the request is checked, and only its head is sent on, over a separate connection
to the front.  Later data from the container reaches no server, so a second request cannot hide behind the first.
"""

import asyncio
import select
import socket
from collections.abc import Callable
from weakref import WeakValueDictionary

import structlog

from skep.aio.clock import Clock
from skep.aio.time_slices import result_in_slices
from skep.api.http.connection import Connection, Gone
from skep.api.http.framing import RequestHead, Sized, parse_request
from skep.errors import InvalidArgument, SkepError, Unavailable
from skep.model.permissions.access import ALL, Binding, Identity, Origin, Role
from skep.model.permissions.rights import ApiAccess
from skep.model.values.ids import ContainerId
from skep.node.container_apis.policy import ResponsePassing, check, redacted
from skep.node.events import READER
from skep.node.front.server import refusal
from skep.node.front.splice import relay

log = structlog.get_logger()

HEAD_S = 30.0
"""Seconds for the head of a request to arrive."""
DOCUMENT_S = 60.0
"""Seconds for a JSON document to be answered and read by the container."""
DOCUMENT_BYTES_MAX = 64 << 20
"""Longest document in bytes from which secrets are removed.  Limited, because it is read into memory."""
_DOCUMENTS_MAX, _OWN_DOCUMENTS_MAX = 16, 2
"""Limits for the documents that are redacted at the same time, for all containers and for one container."""
_HANG_UP_POLL_S = 1.0
"""Seconds between checks whether the client has hung up while it waits for a response."""
_DROPPED = (b"keep-alive", b"upgrade", b"http2-settings", b"expect", b"accept-encoding", b"te", b"trailer")

Dispatch = Callable[[socket.socket, Identity], None]
"""Serves one end of a connection as the node's front does."""


class Exchanges:
    """Handles connections.

    ``dispatch`` serves the other end of a connection as the node's front serves TCP connections.
    """

    def __init__(self, dispatch: Dispatch, clock: Clock) -> None:
        self._dispatch = dispatch
        self._clock = clock
        self._documents = asyncio.Semaphore(_DOCUMENTS_MAX)
        self._own_documents: WeakValueDictionary[ContainerId, asyncio.Semaphore] = WeakValueDictionary()
        """Semaphore of each container that currently waits for a document."""

    async def carry_out(self, connected: socket.socket, id: ContainerId, access: ApiAccess) -> None:
        """Serve a connection of a container until its end, and close it."""
        client = await Connection.over(connected)
        try:
            if access is ApiAccess.FULL:
                full = Identity(name=id, origin=Origin.CONTAINER, bindings=ALL)
                await relay(client, await self._front(full), b"", is_one_exchange=False)
            else:
                await self._answer(client, id, access)
        except Gone:
            client.abort()
        except SkepError as error:
            await client.refuse(refusal(error))
        except BaseException:
            client.abort()
            raise

    async def _answer(self, client: Connection, id: ContainerId, access: ApiAccess) -> None:
        """Answer a container's request.  Raises: SkepError, Gone."""
        try:
            async with asyncio.timeout(HEAD_S):
                raw = await client.read_head()
        except TimeoutError:
            raw = b""
        if not raw:
            client.close()
            return
        request = parse_request(raw)
        passing = check(access, request.method, request.target)
        viewer = Identity(name=id, origin=Origin.CONTAINER, bindings=(Binding(Role.VIEWER),))
        body = request.body()
        if not body.is_complete or (isinstance(body, Sized) and body.bytes_left):
            raise InvalidArgument("requests with a body need full access to the API")
        if passing is ResponsePassing.REDACTED:
            own = self._own_documents.setdefault(id, asyncio.Semaphore(_OWN_DOCUMENTS_MAX))
            async with own:  # held until the container has read the document, which is in memory
                await self._pass_document(client, request, viewer)
        else:
            await self._pass(client, request, viewer, access)

    async def _pass(
        self, client: Connection, request: RequestHead, identity: Identity, access: ApiAccess
    ) -> None:
        """Pass the response on as it arrives, until either end closes."""
        server = await self._front(identity)
        marks = ((READER.encode(), b"1"),) if access is ApiAccess.READ else ()
        try:
            await server.send(_head(request, request.head.first_line.rpartition(b" ")[2], *marks))
            async with asyncio.TaskGroup() as group:
                left = group.create_task(self._end_with(client, server), name="container's API client")
                while data := await server.read():
                    await client.send(data)
                left.cancel()
        except* Gone:
            client.abort()
        finally:
            server.abort()
        client.close()

    async def _pass_document(self, client: Connection, request: RequestHead, identity: Identity) -> None:
        """Fetch a JSON document, remove its secrets and send it.  Raises: SkepError, Gone."""
        try:
            async with asyncio.timeout(DOCUMENT_S), self._documents:
                # HTTP/1.0, so that the response has no chunks and ends with its connection.
                head, document = await self._fetch(request, identity)
                if document and head.split(b" ", 2)[1].startswith(b"2"):
                    document = await result_in_slices(redacted(document), self._clock)
        except TimeoutError as error:
            raise Unavailable("the response takes too long") from error
        try:
            async with asyncio.timeout(DOCUMENT_S):
                await client.send(_with_length(head, len(document)) + document)
                await client.linger()
        except TimeoutError:
            client.abort()

    async def _fetch(self, request: RequestHead, identity: Identity) -> tuple[bytes, bytes]:
        """Return head and body of the front's response.  Raises: Unavailable: it is too long."""
        server = await self._front(identity)
        try:
            await server.send(_head(request, b"HTTP/1.0"))
            head = await server.read_head()
            if not head:
                raise Unavailable("the API of this node closed the connection without a response")
            document = bytearray()
            while data := await server.read():
                document += data
                if len(document) > DOCUMENT_BYTES_MAX:
                    raise Unavailable("the response is too long without full access to the API")
            return head, bytes(document)
        finally:
            server.abort()

    async def _end_with(self, client: Connection, server: Connection) -> None:
        """End the exchange when the client disconnects.

        Its data is dropped.  A half-close does not count as disconnecting.
        """
        while await client.read():
            pass
        while not _has_hung_up(client):
            await self._clock.sleep(_HANG_UP_POLL_S)
        server.abort()

    async def _front(self, identity: Identity) -> Connection:
        """Open a new connection to the node's front.  Raises: Unavailable."""
        try:
            ours, theirs = socket.socketpair()
            self._dispatch(theirs, identity)
            return await Connection.over(ours)
        except OSError as error:
            raise Unavailable(f"the API of this node cannot be reached: {error}") from error


def _has_hung_up(client: Connection) -> bool:
    """Return whether the other end, which no longer sends, no longer reads either."""
    if client.is_lost:
        return True
    looking = select.poll()
    looking.register(client.transport.get_extra_info("socket").fileno(), 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in looking.poll(0))


def _head(request: RequestHead, version: bytes, *marks: tuple[bytes, bytes]) -> bytes:
    """Return the request's head to send on: with the path that was checked, the headers ``marks``, and one exchange per
    connection.
    """
    line = b"%s %s %s" % (request.method.encode(), request.target.encode(), version)
    head = type(request.head)(line, request.head.headers)
    return head.with_headers((b"Connection", b"close"), *marks, without=_DROPPED)


def _with_length(head: bytes, length: int) -> bytes:
    """Return the head of a response with another ``length`` of the body."""
    first, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    dropped = (b"content-length", b"transfer-encoding", b"connection", b"keep-alive")
    kept = [line for line in lines if line.partition(b":")[0].strip().lower() not in dropped]
    status = b"HTTP/1.1 " + first.partition(b" ")[2]
    return b"\r\n".join((status, *kept, b"Content-Length: %d" % length, b"Connection: close", b"", b""))
