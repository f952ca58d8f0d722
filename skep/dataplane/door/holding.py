"""Holds requests for services that are scaled to zero, until a task serves.

HAProxy connects to a socket of this node in its volume, with the PROXY protocol, and sends the request with the service
in a header.  Once HAProxy has a task of the service, the node connects to another socket, where the newest HAProxy
process routes the request, and passes bytes in both directions.  So a held request outlives a reload.

HAProxy's container can replace these sockets, but gains nothing by it: it sees all requests anyway.
"""

import asyncio
import os
import socket
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import structlog

from skep.aio.event import Event
from skep.aio.failures import isolate
from skep.aio.race import LostRace, run_unless
from skep.dataplane.door.configuration import HELD_FOR, HOLD, RELEASED, DoorState, page
from skep.model.values.ids import ServiceId

log = structlog.get_logger(__name__)

HEAD_S_MAX = 5.0
"""Seconds for a request's head, which HAProxy has completely when it connects."""
LINGER_S = 2.0
"""Seconds in which HAProxy reads a refusal, before the rest of the request is discarded with the connection."""
_READER_BYTES: Final = 32 << 10
"""Bytes of a request that are read while it is held.  HAProxy's heads have at most 16 KiB."""
_PIECE_BYTES: Final = 64 << 10
"""Bytes that are passed on at once."""
_BACKLOG: Final = 1024
"""Connections that wait to be accepted.  More than may be held, so that each of the others gets its page."""
_PROXY_BYTES: Final = 16
"""Bytes of the PROXY protocol's head.  The last two are the length of its addresses."""


class HoldLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of what a node holds.

    Args:
        seconds: Time for a task to start.  Browsers and load balancers wait for a minute.
        of_service: Most requests of a service.  A page with many parts sends a few dozen at once.
        of_node: Most requests.  Each may keep 100 KiB of memory.
    """

    seconds: float = 30.0
    of_service: int = 100
    of_node: int = 500


class HeldRequests:
    """The requests that wait on this node."""

    def __init__(self, limits: HoldLimits | None = None) -> None:
        self._limits = limits or HoldLimits()
        self.changed = Event()
        """Set when a service gets its first held request."""
        self.opened: Counter[ServiceId] = Counter()
        """Connections of each service since the start of this process."""
        self._held: Counter[ServiceId] = Counter()
        self._open: Counter[ServiceId] = Counter()
        self._serving: Collection[str] = frozenset()
        self._serves: dict[ServiceId, asyncio.Event] = {}
        """Set when a task of a service with held requests serves."""
        self._group: asyncio.TaskGroup | None = None
        self._server: asyncio.Server | None = None
        self._place: tuple[Path, int] | None = None
        """The directory of the sockets, and the inode of the served socket."""

    async def listen(self, directory: Path) -> None:
        """Serve the socket in ``directory``, if it is not served yet.  Raises: OSError."""
        with suppress(FileNotFoundError):
            if self._place == (directory, (directory / HOLD).lstat().st_ino):
                return
        self.close()
        listener = _bound(directory)
        self._server = await asyncio.start_unix_server(self._accept, sock=listener, limit=_READER_BYTES)
        self._place = directory, (directory / HOLD).lstat().st_ino

    async def run(self) -> None:
        """Hold requests until cancelled."""
        try:
            async with asyncio.TaskGroup() as self._group:
                await asyncio.Event().wait()
        finally:
            self._group = None
            self.close()

    def close(self) -> None:
        """Stop accepting connections.  Their clients get a page of HAProxy."""
        if self._server is not None:
            self._server.close()
        self._server = self._place = None

    def apply(self, state: DoorState) -> None:
        """Release the requests of services that HAProxy can reach now."""
        self._serving = {
            one.service for one in state.backends.values() if any(server.is_ready for server in one.servers)
        }
        for id, serves in self._serves.items():
            if id in self._serving:
                serves.set()

    def held(self) -> Sequence[ServiceId]:
        """Return the services with held requests."""
        return list(self._held)

    def open(self) -> Mapping[ServiceId, int]:
        """Return the number of held and released connections of each service."""
        return self._open

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._group is None:
            writer.close()
        else:
            serving = isolate(self._serve(reader, writer), "held request lost")
            self._group.create_task(serving, name="held request")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
                async with asyncio.timeout(HEAD_S_MAX):
                    head = await _head(reader)
                id = ServiceId(_service(head))
                self.opened[id] += 1
                self._open[id] += 1
                try:
                    await self._pass_on(id, bytearray(head), reader, writer)
                finally:
                    _release(self._open, id)
        finally:
            writer.close()

    async def _pass_on(
        self, id: ServiceId, sent: bytearray, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Pass a request on as soon as a task serves, or refuse it."""
        if id not in self._serving and not await self._wait_serving(id, sent, reader):
            if not reader.at_eof():
                await _refuse(reader, writer)
            return
        assert self._place is not None, "it is set while connections are accepted"
        connected = await connect(self._place[0] / RELEASED)
        try:
            connected[1].write(sent)
            async with asyncio.TaskGroup() as group:
                upwards = group.create_task(_copy(reader, connected[1]))
                await _copy(connected[0], writer)
                upwards.cancel()
        finally:
            connected[1].close()

    async def _wait_serving(self, id: ServiceId, sent: bytearray, reader: asyncio.StreamReader) -> bool:
        """Return whether a task serves.  If not, the time is over, there is no place, or the client has left."""
        if self._held[id] >= self._limits.of_service or self._held.total() >= self._limits.of_node:
            log.debug("request not held, because too many others are", service=id)
            return False
        serves = self._serves.setdefault(id, asyncio.Event())
        self._held[id] += 1
        if self._held[id] == 1:
            self.changed.set()
        try:
            async with asyncio.timeout(self._limits.seconds):
                await run_unless(_read_ahead(reader, sent), serves.wait())
        except LostRace:
            return True
        except TimeoutError:
            log.debug("held request given up: no task serves", service=id)
        finally:
            if not _release(self._held, id):
                del self._serves[id]
        return False


def _release(count: Counter[ServiceId], id: ServiceId) -> int:
    count[id] -= 1
    if not count[id]:
        del count[id]
    return count[id]


def _bound(directory: Path) -> socket.socket:
    """Return a socket that listens in ``directory``, and replaces what is there.  Raises: OSError."""
    top = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        temporary = f".{HOLD}.new"
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=top)
        # By the descriptor, because the address of a socket has at most 107 characters.
        listener.bind(f"/proc/self/fd/{top}/{temporary}")
        listener.listen(_BACKLOG)
        # HAProxy connects as its own user.  Only its container can reach the directory.
        os.chmod(temporary, 0o666, dir_fd=top)
        os.rename(temporary, HOLD, src_dir_fd=top, dst_dir_fd=top)
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(top)
    return listener


async def connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a socket in the volume.

    The container can put a link in its place, so the file itself is opened first, and then used by its descriptor.
    That also allows paths longer than a socket's address.
    """
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return await asyncio.open_unix_connection(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


async def _head(reader: asyncio.StreamReader) -> bytes:
    """Return the PROXY protocol's head and the request's."""
    found = await reader.readexactly(_PROXY_BYTES)
    found += await reader.readexactly(int.from_bytes(found[-2:]))
    return found + await reader.readuntil(b"\r\n\r\n")


def _service(head: bytes) -> str:
    """Return the service in a request's head.  HAProxy has replaced all other values of that header."""
    for line in reversed(head.split(b"\r\n")):
        name, _, value = line.partition(b":")
        if name.lower() == HELD_FOR.encode():
            return value.strip().decode("ascii", "replace")
    raise EOFError("the header with the service is missing")


async def _read_ahead(reader: asyncio.StreamReader, sent: bytearray) -> None:
    """Read into ``sent`` until the client has left.  Clients with long bodies are not watched."""
    while len(sent) < _READER_BYTES:
        part = await reader.read(_READER_BYTES - len(sent))
        if not part:
            return
        sent += part
    await asyncio.Event().wait()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass bytes on until the end of ``reader``, or an error of either side."""
    with suppress(OSError):
        while part := await reader.read(_PIECE_BYTES):
            writer.write(part)
            await writer.drain()
        writer.write_eof()


async def _refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Respond with a page instead of a task."""
    body = page("This site is starting. Please try again soon.").encode()
    writer.write(
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/html; charset=utf-8\r\n"
        b"Retry-After: 5\r\nConnection: close\r\nCache-Control: no-store\r\nContent-Length: %d\r\n\r\n"
        % len(body)
        + body
    )
    writer.write_eof()
    async with asyncio.timeout(LINGER_S):
        while await reader.read(_PIECE_BYTES):
            pass
