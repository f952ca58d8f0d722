"""Holds requests for services that are scaled to zero, until a task serves.

HAProxy connects to a socket of this node in its volume, with the PROXY protocol, and sends the request with the service
in a header.  Once HAProxy has a task of the service, the node connects to another socket, where the newest HAProxy
process routes the request, and passes bytes in both directions.  So a held request outlives a reload.

A task's container runs before its application listens.  If HAProxy reaches no task, it marks its response.  The node
then sends the request again, since it keeps all bytes until it knows that a task is reached.

HAProxy's container can replace these sockets, but gains nothing by it: it sees all requests anyway.
"""

import asyncio
import os
import select
import socket
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.event import Event
from skep.aio.failures import isolate
from skep.aio.race import LostRace, run_unless
from skep.dataplane.door.configuration import HELD_FOR, HOLD, RELEASED, UNREACHED, DoorState, page
from skep.model.values.ids import ServiceId

log = structlog.get_logger(__name__)

HEAD_S_MAX = 5.0
"""Seconds for a request's head, which HAProxy has completely when it connects."""
LINGER_S = 2.0
"""Seconds in which HAProxy reads a refusal, before the rest of the request is discarded with the connection."""
WANTED_S = 5.0
"""Seconds in which a service is woken for a refused request, longer than the pause between two wakes."""
LOOK_S = 1.0
"""Pause in seconds between two looks at whether the client of a long request has left."""
AGAIN_S, AGAIN_S_MAX = 0.05, 1.0
"""Shortest and longest pause in seconds before a request is sent again.  HAProxy itself waits for seconds, unless it
has no task at all.
"""
ACCEPT_S = 1.0
"""Pause in seconds after a connection could not be accepted, for example because the process has no descriptor left."""
_READER_BYTES: Final = 32 << 10
"""Bytes of a request that are read while it is held.  HAProxy's heads have at most 16 KiB."""
_PIECE_BYTES: Final = 64 << 10
"""Bytes that are passed on at once."""
_KEPT_PIECE_BYTES: Final = 8 << 10
"""Bytes that are passed on at once while they are also kept."""
_KEPT_BYTES: Final = 96 << 10
"""Bytes of a request that are kept to be sent again.  HAProxy and the socket together take at most 64 KiB, unless
HAProxy has passed some on to a task.
"""
_SOCKET_BYTES: Final = 8 << 10
"""Bytes in the socket to HAProxy until a task is reached.  The kernel doubles the number."""
_PASSED_SOCKET_BYTES: Final = 208 << 10
"""The kernel's default for the socket afterwards."""
_BACKLOG: Final = 1024
"""Connections that wait to be accepted, while as many others as may be held get their page."""
_PROXY_BYTES: Final = 16
"""Bytes of the PROXY protocol's head.  The last two are the length of its addresses."""
_HEAD_BYTES: Final = 29 << 9
"""Bytes of a head that HAProxy accepts once more.  Its own bound is 15 KiB minus some bytes for each header."""
_RESPONSE_BYTES: Final = 16 << 10
"""Bytes of a response's head in HAProxy's buffer."""
_STARTS: Final = "This site is starting. Please try again soon."
_TOO_LONG: Final = (
    "This site is starting, and a request with more than 14 KiB of headers cannot wait for it. "
    "Please try again soon, or delete the cookies of this site."
)
_UNREACHED_LINE: Final = b"HTTP/1.1 503"
"""Beginning of HAProxy's response if it has reached no task."""


class HoldLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of what a node holds.

    Args:
        seconds: Time for a task to start.  Browsers and load balancers wait for a minute.
        of_service: Most requests of a service.  A page with many parts sends a few dozen at once.
        of_node: Most requests.  Each may keep 200 KiB of memory.  As many others may be refused at the same time.
        passed: Most connections through the node, including WebSockets after their release.
    """

    seconds: float = 30.0
    of_service: int = 100
    of_node: int = 500
    passed: int = 2000


class _Place:
    """The place of a held request."""

    __slots__ = ("changed", "is_lost", "is_waiting", "service")

    def __init__(self, service: ServiceId) -> None:
        self.service = service
        self.changed = asyncio.Event()
        """Set when a task serves, or when the place is lost."""
        self.is_waiting = False
        self.is_lost = False


class HeldRequests:
    """The requests that wait on this node."""

    def __init__(self, limits: HoldLimits | None = None) -> None:
        self._limits = limits or HoldLimits()
        self.changed = Event()
        """Set when a service gets its first held or refused request."""
        self.opened: Counter[ServiceId] = Counter()
        """Connections of each service since the start of this process."""
        self._open: Counter[ServiceId] = Counter()
        self._places: dict[ServiceId, list[_Place]] = {}
        self._refused: dict[ServiceId, float] = {}
        """Services that are woken although their request found no place, with the time when that ends."""
        self._serving: Set[ServiceId] = frozenset()
        self._served: Set[ServiceId] = frozenset()
        """Services that have got a serving task since the last call of ``take_served``."""
        self._known: Set[ServiceId] = frozenset()
        self._group: asyncio.TaskGroup | None = None
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._room = asyncio.Semaphore(0)
        """Room for connections without a response."""
        self._directory: Path | None = None
        """The directory of the sockets."""
        self._inode = 0
        """The inode of the served socket."""

    def listen(self, directory: Path) -> None:
        """Serve the socket in ``directory``, if it is not served yet.  Raises: OSError."""
        with suppress(FileNotFoundError):
            is_same = self._directory == directory and self._listener is not None
            if is_same and self._inode == (directory / HOLD).lstat().st_ino:
                return
        self.close()
        self._directory = directory
        self._listener = _bound(directory)
        self._inode = (directory / HOLD).lstat().st_ino
        self._start_accepting()

    async def run(self) -> None:
        """Hold requests until cancelled."""
        self._room = asyncio.Semaphore(2 * self._limits.of_node)
        try:
            async with asyncio.TaskGroup() as self._group:
                if self._listener is None and self._directory is not None:
                    try:
                        self.listen(self._directory)
                    except OSError as error:  # the next table tries again
                        log.warning("the socket for held requests is not served", error=str(error))
                else:
                    self._start_accepting()
                await asyncio.Event().wait()
        finally:
            self._group = None
            self.close()

    def close(self) -> None:
        """Stop accepting connections.  Their clients get a page of HAProxy."""
        if self._accepting is not None:
            self._accepting.cancel()  # it closes the socket
        elif self._listener is not None:
            self._listener.close()
        self._listener = self._accepting = None

    def apply(self, state: DoorState, *, is_reached: bool) -> None:
        """Release the requests of services that HAProxy can reach now.

        Args:
            is_reached: Whether HAProxy has got ``state``.  If not, only tasks of both the former state and this one
                count.
        """
        serving = {
            ServiceId(one.service)
            for one in state.backends.values()
            if any(server.is_ready for server in one.servers)
        }
        self._known = {ServiceId(one.service) for one in state.backends.values()}
        before = self._serving
        self._serving = serving if is_reached else serving & before
        self._served = (self._served & self._known) | (self._serving - before)
        for id, places in self._places.items():
            for place in places if id in self._serving else ():
                place.changed.set()

    def held(self) -> Sequence[ServiceId]:
        """Return the services with held requests, and those whose requests have just been refused."""
        now = asyncio.get_running_loop().time()
        self._refused = {id: until for id, until in self._refused.items() if until > now}
        return list(self._places | self._refused)

    def take_served(self) -> Set[ServiceId]:
        """Return the services that have got a serving task since the last call."""
        found, self._served = self._served, frozenset()
        return found

    def open(self) -> Mapping[ServiceId, int]:
        """Return the number of held and released connections of each service."""
        return self._open

    def _start_accepting(self) -> None:
        listener = self._listener
        if self._group is not None and listener is not None:
            self._accepting = self._group.create_task(self._accept(self._group, listener))
            self._accepting.add_done_callback(lambda _: listener.close())

    async def _accept(self, group: asyncio.TaskGroup, listener: socket.socket) -> None:
        """Accept connections while there is room, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._room.acquire()
            try:
                connection, _ = await loop.sock_accept(listener)
                streams = await asyncio.open_unix_connection(sock=connection, limit=_READER_BYTES)
            except OSError as error:
                self._room.release()
                log.warning("a request to hold is not accepted, will retry", error=str(error))
                await asyncio.sleep(ACCEPT_S)
            except BaseException:
                self._room.release()
                raise
            else:
                group.create_task(isolate(self._serve(*streams), "held request lost"), name="held request")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with ExitStack() as unanswered:
            unanswered.callback(self._room.release)
            try:
                with suppress(OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
                    async with asyncio.timeout(HEAD_S_MAX):
                        head = await _head(reader)
                    id = ServiceId(_service(head))
                    if id not in self._known:
                        await _refuse(reader, writer, _STARTS)
                        return
                    self.opened[id] += 1
                    self._open[id] += 1
                    request = _Request(head, reader, writer)
                    try:
                        if not await self._pass_on(id, request, unanswered):
                            await _refuse(reader, writer, _STARTS if request.is_short() else _TOO_LONG)
                    finally:
                        self._open[id] -= 1
                        self._open += Counter()  # without zeros
            finally:
                writer.close()

    async def _pass_on(self, id: ServiceId, request: "_Request", unanswered: ExitStack) -> bool:
        """Pass a request on as soon as a task serves.  Return whether it has a response, or nobody wants one.

        ``unanswered`` is left when the request can no longer be held.
        """
        place = self._take_place(id) if request.is_short() else None
        if place is None:
            log.debug("request not held, because it is too long or too many others are", service=id)
            self._want(id)
            return False
        unanswered.callback(self._free_place, place)
        deadline = asyncio.get_running_loop().time() + self._limits.seconds
        backoff = Backoff(AGAIN_S, AGAIN_S_MAX)
        assert self._directory is not None, "it is set before connections are accepted"
        while await self._wait_serving(place, request, deadline):
            if request.has_left():
                return True
            with suppress(ConnectionError, FileNotFoundError):
                if await request.send(self._directory / RELEASED, unanswered):
                    return True
            # A task that was reached last time may have ended since.
            place.changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(backoff.next_delay_s()):
                    await request.read_ahead()
        self._free_place(place)
        return request.has_left()

    def _take_place(self, id: ServiceId) -> _Place | None:
        """Return a place for a request.  A service with fewer of them takes one from the service with most."""
        mine = self._places.get(id, [])
        count = sum(map(len, self._places.values()))
        if (
            len(mine) >= self._limits.of_service
            or self._open.total() > self._limits.passed
            or (count >= self._limits.of_node and not self._displace(len(mine) + 1))
        ):
            return None
        place = _Place(id)
        if id not in self._places:
            self.changed.set()
        self._places.setdefault(id, []).append(place)
        return place

    def _want(self, id: ServiceId) -> None:
        """Have a service woken although its request is refused."""
        if id not in self._places and id not in self._refused:
            self.changed.set()
        self._refused[id] = asyncio.get_running_loop().time() + WANTED_S

    def _displace(self, count: int) -> bool:
        """Free a place of the service with most of them, if it has more than ``count``.  Return whether one is free."""
        most = max(self._places.values(), key=len, default=[])
        newest = next((one for one in reversed(most) if one.is_waiting), None)
        if newest is None or len(most) <= count:
            return False
        newest.is_lost = True
        newest.changed.set()
        self._free_place(newest)
        return True

    def _free_place(self, place: _Place) -> None:
        places = self._places.get(place.service, [])
        if place in places:
            places.remove(place)
        if not places:
            self._places.pop(place.service, None)

    async def _wait_serving(self, place: _Place, request: "_Request", deadline: float) -> bool:
        """Return whether a task serves.  If not, the time is over, the place is lost, or the client has left."""
        if asyncio.get_running_loop().time() >= deadline or place.is_lost:
            return False
        if place.service in self._serving:
            return True
        place.is_waiting = True
        place.changed.clear()
        try:
            async with asyncio.timeout_at(deadline):
                await run_unless(request.read_ahead(), place.changed.wait())
        except LostRace:
            return not place.is_lost
        except TimeoutError:
            log.debug("held request given up: no task serves", service=place.service)
        finally:
            place.is_waiting = False
        return False


class _Request:
    """A request, whose bytes are kept until a task is reached."""

    def __init__(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._kept = bytearray(head)
        self._reader = reader
        self._writer = writer

    def is_short(self) -> bool:
        """Return whether HAProxy accepts the head once more, to which it has added headers.  No body is read yet."""
        return len(self._kept) <= _HEAD_BYTES

    def has_left(self) -> bool:
        """Return whether the client has left, also if bytes of the request are not yet read."""
        if self._reader.at_eof() or self._writer.is_closing():
            return True
        poll = select.poll()
        poll.register(self._writer.get_extra_info("socket").fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    async def read_ahead(self) -> None:
        """Read until the client has left."""
        while len(self._kept) < _READER_BYTES:
            part = await self._reader.read(_READER_BYTES - len(self._kept))
            if not part:
                return
            self._kept += part
        while not self.has_left():  # noqa: ASYNC110  # the loop reports no disconnection before all is read
            await asyncio.sleep(LOOK_S)

    async def send(self, path: Path, unanswered: ExitStack) -> bool:
        """Send the request to HAProxy and pass the response back.  Return False if HAProxy has reached no task.

        Raises: OSError.
        """
        response, tasks = await connect(path)
        try:
            # So that few bytes wait between HAProxy and this node.
            tasks.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
            tasks.transport.set_write_buffer_limits(0)
            tasks.write(self._kept)
            async with asyncio.TaskGroup() as group:
                upwards = group.create_task(self._send_body(tasks, unanswered))
                try:
                    first = await _beginning(response)
                    if _is_unreached(first) and len(self._kept) <= _KEPT_BYTES:
                        return False
                    unanswered.close()
                    self._writer.write(first)
                    await _copy(response, self._writer)
                finally:
                    upwards.cancel()
        finally:
            tasks.close()
        return True

    async def _send_body(self, tasks: asyncio.StreamWriter, unanswered: ExitStack) -> None:
        with suppress(OSError):
            await tasks.drain()
            while len(self._kept) <= _KEPT_BYTES:
                part = await self._reader.read(_KEPT_PIECE_BYTES)
                if not part:
                    tasks.write_eof()
                    return
                self._kept += part
                tasks.write(part)
                await tasks.drain()
        unanswered.close()  # a task has got a part of it
        tasks.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PASSED_SOCKET_BYTES)
        await _copy(self._reader, tasks)


def _bound(directory: Path) -> socket.socket:
    """Return a socket that listens in ``directory``, and replaces what is there.  Raises: OSError."""
    top = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        temporary = f".{HOLD}.new"
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=top)
        # The descriptor is used because the address of a socket has at most 107 characters.
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


async def _beginning(reader: asyncio.StreamReader) -> bytes:
    """Return the beginning of a response, which has the whole head if HAProxy may have reached no task."""
    found = b""
    with suppress(OSError):
        while part := await reader.read(_RESPONSE_BYTES):
            found += part
            if not _may_be_unreached(found) or b"\r\n\r\n" in found or len(found) >= _RESPONSE_BYTES:
                break
    return found


def _may_be_unreached(response: bytes) -> bool:
    return response.startswith(_UNREACHED_LINE[: len(response)])


def _is_unreached(response: bytes) -> bool:
    """Return whether HAProxy has reached no task.  It removes the header from responses of tasks."""
    head = response.partition(b"\r\n\r\n")[0].lower()
    return _may_be_unreached(response) and f"\r\n{UNREACHED}:".encode() in head


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass bytes on until the end of ``reader``, or an error of either side."""
    with suppress(OSError):
        while part := await reader.read(_PIECE_BYTES):
            writer.write(part)
            await writer.drain()
        writer.write_eof()


async def _refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: str) -> None:
    """Respond with a page instead of a task."""
    body = page(text).encode()
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
