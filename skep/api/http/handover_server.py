"""Serves the connections that the node process passes to the manager process (``handover``).

aiohttp responds to the requests.  It gets complete HTTP/1.1 messages, one at a time.  When a request arrives that is
not for the manager process, the connection is passed back to the node process.
"""

import asyncio
import logging
import mmap
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from enum import Enum, auto
from pathlib import Path
from typing import Any

import msgspec
import structlog
from aiohttp import web
from aiohttp.abc import AbstractAccessLogger
from aiohttp.web_protocol import RequestHandler

from skep.api.access.identity import identify, unpacked
from skep.api.http.framing import (
    HEAD_BYTES_MAX,
    Incoming,
    Malformed,
    Sized,
    is_for_manager,
    path_of,
    read_head,
)
from skep.api.http.handover import (
    NO_SLOT,
    SLOTS,
    Channel,
    ExchangeState,
    HandoverMessage,
    MessageKind,
    pack_slots,
)
from skep.errors import Unavailable
from skep.linux.unix_sockets import private_socket

log = structlog.get_logger(__name__)

SMALL_BODY = 64 * 1024
"""Bytes up to which a body has to arrive within one time limit.  Each piece of a larger one restarts the limit."""
_BUFFER_BYTES_MAX = 256 * 1024
"""Largest number of bytes that are buffered of requests that a client sends before it gets a response."""
_READ_BYTES = 64 * 1024
"""Bytes that are read from one connection at a time."""
_CLOSED_S = 0.02
"""Seconds for which ended connections are collected before they are reported, so that the node process is not woken
while clients reconnect.
"""
_FOREVER_S = 1e9
"""Disables aiohttp's limit for idle connections, because ``RequestTimes`` replaces it."""

_read_buffer = memoryview(bytearray(_READ_BYTES))
"""Shared by all connections, because received data is copied at once."""


class ResponseHook(AbstractAccessLogger):
    """Learns the end of each response, in the role of aiohttp's access log."""

    connection: "_Connection | None" = None

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """End the response.  Called by aiohttp."""
        if self.connection is not None:
            self.connection.end_response(is_last=not response.keep_alive)


HOOKS: dict[str, Any] = {
    "access_log": logging.getLogger(__name__),
    "access_log_class": ResponseHook,
    "keepalive_timeout": _FOREVER_S,
}
"""Options for the runner of the application."""


async def begin_response(request: web.Request, _response: web.StreamResponse) -> None:
    """Mark the connection as responding.  Register it in the application's ``on_response_prepare``."""
    hook = request.protocol.access_logger
    if isinstance(hook, ResponseHook) and hook.connection is not None:
        hook.connection.state = ExchangeState.RESPONDING


def is_passed(request: web.Request) -> bool:
    """Return whether the node process passed the connection of ``request``."""
    hook = request.protocol.access_logger
    return isinstance(hook, ResponseHook) and hook.connection is not None


def take_over(request: web.Request, protocol: asyncio.Protocol) -> None:
    """Hand over the connection of ``request`` to ``protocol``, which also writes the response.

    ``request.content`` still reads the rest of the request's body, and ``protocol`` gets the data after it.  The
    connection is closed when the handler has returned.

    Raises:
        Unavailable: The connection was not passed, or its client has disconnected.
    """
    hook = request.protocol.access_logger
    if not isinstance(hook, ResponseHook) or hook.connection is None or request.transport is None:
        raise Unavailable("this connection cannot be upgraded: connect to the node's own socket")
    hook.connection.take_over(protocol)


class RequestTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Times of the clients of passed connections, in seconds."""

    request_s: float = 60.0
    """A head and a small body must arrive within this time, and so must the next bytes of a longer body with a length.

    A body without a length is a stream and has no limit.
    """
    idle_s: float = 300.0
    """Time between two requests of a client on another machine.  A local client has no limit, as with Docker."""
    check_s: float = 5.0
    """Time between checks of the limits of all connections.  The limits are minutes."""


TIMES = RequestTimes()


class PassedConnections:
    """Accepts connections that node processes pass, and serves them.

    Args:
        new_handler: The server of an application with ``begin_response``, run with ``HOOKS``.
    """

    def __init__(self, new_handler: Callable[[], RequestHandler], times: RequestTimes = TIMES) -> None:
        self.new_handler = new_handler
        self.times = times
        self._peers: list[_Peer] = []
        """Node processes, the newest last.  A new one may connect before the end of the previous one is noticed."""
        self._open: set[_Connection] = set()
        self._is_stopping = False

    @asynccontextmanager
    async def listening(self, path: Path) -> AsyncIterator[None]:
        """Serve while the context is open.  Afterwards pass each connection back once no response is pending on it.

        Raises:
            Unavailable: ``path`` cannot be bound.
        """
        loop = asyncio.get_running_loop()
        try:
            listener = private_socket(path, socket.SOCK_SEQPACKET, is_listening=True)
        except OSError as error:
            raise Unavailable(f"cannot listen on {path}: {error}") from error
        listener.setblocking(False)
        async with asyncio.TaskGroup() as group:
            checking = group.create_task(self._check_limits(), name="limits of passed connections")
            loop.add_reader(listener, self._accept, listener, group)
            try:
                yield
            finally:
                loop.remove_reader(listener)
                listener.close()
                path.unlink(missing_ok=True)
                checking.cancel()
                self._stop()

    def close(self) -> None:
        """Close the channels.  The node process continues with the connections that are still open."""
        for peer in tuple(self._peers):
            peer.channel.close()
        self._peers.clear()

    def _accept(self, listener: socket.socket, group: asyncio.TaskGroup) -> None:
        try:
            connected, _ = listener.accept()
        except OSError as error:  # out of descriptors, or the node process has already ended
            log.warning("node process not accepted", error=str(error))
            return
        connected.setblocking(False)
        self._peers.append(_Peer(self, connected, group))

    def _stop(self) -> None:
        self._is_stopping = True
        for peer in self._peers:
            peer.channel.send(HandoverMessage(kind=MessageKind.STOPPING))
        for connection in tuple(self._open):
            connection.pass_back_if_idle()

    async def _check_limits(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.times.check_s)
            for connection in tuple(self._open):
                connection.close_if_overdue(loop.time())

    # --- called by peers and connections ----------------------------------------------------------------------

    @property
    def is_stopping(self) -> bool:
        """Whether connections are being passed back."""
        return self._is_stopping

    def opened(self, connection: "_Connection") -> None:
        """Record that ``connection`` is being served."""
        self._open.add(connection)

    def closed(self, connection: "_Connection") -> None:
        """Record that ``connection`` is no longer served."""
        self._open.discard(connection)

    def gone(self, peer: "_Peer") -> None:
        """Remove a node process that has ended.  Its connections are still served."""
        self._peers.remove(peer)

    def return_to(self, peer: "_Peer") -> "_Peer | None":
        """Return the node process that gets back a connection passed by ``peer``, or None."""
        if not peer.channel.is_closed:
            return peer
        return self._peers[-1] if self._peers else None


class _Peer:
    """A node process that passes connections."""

    def __init__(self, owner: PassedConnections, connected: socket.socket, group: asyncio.TaskGroup) -> None:
        self._owner = owner
        self._group = group
        self._states: mmap.mmap | None = None
        self._closed: list[int] = []
        self.channel = Channel(connected, self._receive, lambda: owner.gone(self))

    @property
    def states(self) -> mmap.mmap:
        assert self._states is not None, "a connection before the state table"
        return self._states

    def closed(self, slot: int) -> None:
        """Report the end of a connection to the node process, together with others of the same moment."""
        if not self._closed:
            asyncio.get_running_loop().call_later(_CLOSED_S, self._send_closed)
        self._closed.append(slot)

    def _send_closed(self) -> None:
        slots, self._closed = self._closed, []
        self.channel.send(HandoverMessage(kind=MessageKind.CLOSED, data=pack_slots(slots)))

    def _receive(self, message: HandoverMessage) -> None:
        descriptor = message.descriptor
        if descriptor is None:
            log.warning("passed connection not taken: no descriptor is free")
            self.closed(message.slot)
        elif message.kind is MessageKind.STATES:
            self._states = mmap.mmap(descriptor, SLOTS)
            os.close(descriptor)
        elif self._owner.is_stopping:
            self.channel.send(message)
        else:
            connection = _Connection(self._owner, self, message)
            self._group.create_task(
                connection.begin(socket.socket(fileno=descriptor)), name="passed connection"
            )


class _Exchange:
    """A request that is being received or answered."""

    __slots__ = ("body", "is_answered", "is_last", "is_small")

    def __init__(self, request: Incoming) -> None:
        self.body = request.body
        self.is_small = isinstance(request.body, Sized) and request.body.bytes_left <= SMALL_BODY
        self.is_answered = False
        self.is_last = request.upgrades
        """Whether the connection is closed after it."""

    @property
    def is_over(self) -> bool:
        """Whether the request was completely received and answered."""
        return self.is_answered and self.body.is_complete


class _Phase(Enum):
    SERVING = auto()
    LEAVING = auto()
    """Reading has stopped.  The connection is passed back once all written data was sent."""
    PASSED_BACK = auto()


class _Connection(asyncio.BufferedProtocol):
    """One client's connection.  aiohttp's handler gets each request after the previous one was answered.

    The progress of its exchange is also in the state table, for the node process (``state``).
    """

    def __init__(self, owner: PassedConnections, peer: _Peer, passed: HandoverMessage) -> None:
        self._owner = owner
        self._peer = peer
        self._slot = passed.slot
        self._is_remote = passed.is_remote
        self._identity = passed.identity
        self._handler = owner.new_handler()
        self._unread = passed.data
        self._exchange: _Exchange | None = None
        self._phase = _Phase.SERVING
        self._is_paused = False
        self._taken: asyncio.Protocol | None = None
        """The protocol that gets everything after the request (``take_over``)."""
        self._has_ended = False
        """Whether the client has closed its direction.  This matters only once the connection is taken over."""
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        """Time at which the current request started, its long body continued, or the last response ended."""

    async def begin(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        try:
            await self._loop.connect_accepted_socket(lambda: self, connected)
        except OSError as error:
            log.warning("passed connection not served", error=str(error))
            connected.close()
            self._peer.closed(self._slot)

    @property
    def state(self) -> int:
        return self._peer.states[self._slot]

    @state.setter
    def state(self, state: ExchangeState) -> None:
        self._peer.states[self._slot] = state

    # --- called by the event loop -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._identity:
            identify(transport, unpacked(self._identity))
        self._owner.opened(self)
        self._handler.connection_made(transport)
        hook = self._handler.access_logger
        assert isinstance(hook, ResponseHook), "the runner was made without HOOKS"
        hook.connection = self
        self._advance()

    def get_buffer(self, _sizehint: int) -> memoryview:
        if self.state == ExchangeState.IDLE:
            # This comes before the read, because data is lost if the manager process has read it and ends.
            self.state = ExchangeState.REQUESTED
        return _read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._exchange is None and not self._unread:
            self._since = self._loop.time()
        self._unread += _read_buffer[:nbytes]
        self._advance()

    def eof_received(self) -> bool:
        """Return True to keep the other direction open."""
        self._has_ended = True
        if self._taken is not None:
            return bool(self._taken.eof_received())
        if self._exchange is None and not self._unread:
            self.state = ExchangeState.IDLE  # only the end was received, so no response is pending
        return self._exchange is not None and self._exchange.is_last

    def pause_writing(self) -> None:
        self._handler.pause_writing()
        if self._taken is not None:
            self._taken.pause_writing()

    def resume_writing(self) -> None:
        self._handler.resume_writing()
        if self._taken is not None:
            self._taken.resume_writing()
        if self._phase is _Phase.LEAVING:
            self._pass_back()

    def connection_lost(self, error: Exception | None) -> None:
        self._owner.closed(self)
        self._handler.connection_lost(error)
        if self._taken is not None:
            self._taken.connection_lost(error)
        if self._phase is _Phase.PASSED_BACK or self._owner.is_stopping:
            return  # The node process has the connection again, or continues with it when this process has ended.
        with suppress(OSError):
            # The node process has a duplicate, so closing ours would not end the connection.
            self._transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        self._peer.closed(self._slot)

    # --- requests ---------------------------------------------------------------------------------------------

    def take_over(self, protocol: asyncio.Protocol) -> None:
        """Hand over the connection.  See the module's ``take_over``."""
        self._taken = protocol
        self.state = ExchangeState.RESPONDING  # no other process can respond now
        protocol.connection_made(self._transport)
        self._advance()
        if self._has_ended:
            protocol.eof_received()

    def _advance(self) -> None:
        """Pass received data to the handler, as far as it may have it."""
        if self._taken is not None and (self._exchange is None or self._exchange.body.is_complete):
            data, self._unread = self._unread, b""
            if data:
                self._taken.data_received(data)
            return
        while self._unread and self._phase is _Phase.SERVING:
            if self._exchange is None:
                if not self._begin_request():
                    break
            elif self._exchange.body.is_complete:
                break  # the next request is handled after the end of the response
            else:
                self._feed(self._exchange, b"", self._unread)
        is_full = len(self._unread) >= _BUFFER_BYTES_MAX
        if is_full != self._is_paused and self._phase is _Phase.SERVING:
            self._is_paused = is_full
            if is_full:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _begin_request(self) -> bool:
        """Start the next request.  Returns False if its head is incomplete, or the connection is passed back."""
        end = self._unread.find(b"\r\n\r\n") + 4
        if end < 4 and len(self._unread) <= HEAD_BYTES_MAX:
            return False
        raw = self._unread[:end]
        try:
            request = read_head(raw)
        except Malformed:
            request = None
        if request is None or not is_for_manager(path_of(request.target)):
            self._pass_back()  # the node process refuses malformed and too long requests
            return False
        exchange = self._exchange = _Exchange(request)
        self._feed(exchange, raw, self._unread[end:])
        return True

    def _feed(self, exchange: _Exchange, head: bytes, data: bytes) -> None:
        """Pass ``head`` to the handler, and the part of ``data`` that belongs to the body of ``exchange``."""
        is_malformed = False
        try:
            mine, self._unread = exchange.body.take(data)
        except Malformed:
            mine, self._unread, exchange.is_last, is_malformed = data, b"", True, True  # aiohttp refuses it
        if not exchange.is_small:
            self._since = self._loop.time()
        self._handler.data_received(head + mine)
        if exchange.is_last and (is_malformed or exchange.body.is_complete):
            self._handler.close()  # the handler accepts no data after this, so the body must be complete
        self._end_exchange()

    def end_response(self, *, is_last: bool) -> None:
        """Record that a response was completely written.  ``is_last`` closes the connection after it."""
        if self._exchange is not None:
            self._exchange.is_answered = not is_last
        self._end_exchange()
        if self._unread:
            self._loop.call_soon(self._advance)

    def _end_exchange(self) -> None:
        if self._exchange is None or not self._exchange.is_over:
            return
        self._exchange = None
        self._since = self._loop.time()
        if self._unread:
            self.state = ExchangeState.REQUESTED
        elif not self._transport.get_write_buffer_size():
            # The state stays RESPONDING until all data is written, because the end of the response would be lost with
            # this process.
            self.state = ExchangeState.IDLE
        if self._owner.is_stopping:
            self._pass_back()

    def close_if_overdue(self, now: float) -> None:
        """Close the connection if its client started a request too long ago, or has been idle for too long."""
        times, limit_s = self._owner.times, None
        if self._exchange is None:
            limit_s = times.request_s if self._unread else times.idle_s if self._is_remote else None
        elif isinstance(self._exchange.body, Sized) and not self._exchange.body.is_complete:
            limit_s = times.request_s
        if limit_s is not None and now - self._since >= limit_s:
            self._transport.close()

    def pass_back_if_idle(self) -> None:
        """Pass the connection back, unless a request is being received or answered."""
        if self._exchange is None and not self._unread:
            self._pass_back()

    def _pass_back(self) -> None:
        """Pass the connection back, with received data of the next request, once all written data was sent."""
        if self._phase is _Phase.SERVING:
            self._phase = _Phase.LEAVING
            self._transport.pause_reading()
            self._transport.set_write_buffer_limits(0)  # resume_writing is called when the buffer is empty
        if self._phase is _Phase.PASSED_BACK or self._transport.is_closing():
            return
        if self._transport.get_write_buffer_size():
            return
        to = self._owner.return_to(self._peer)
        if to is not None:
            with suppress(OSError):  # if no descriptor is free, the connection is closed
                descriptor = os.dup(self._transport.get_extra_info("socket").fileno())
                slot = self._slot if to is self._peer else NO_SLOT
                to.channel.send(
                    HandoverMessage(
                        kind=MessageKind.CONNECTION,
                        slot=slot,
                        data=self._unread,
                        descriptor=descriptor,
                        is_remote=self._is_remote,
                        identity=self._identity,
                    )
                )
                self._phase = _Phase.PASSED_BACK
        self._transport.abort()
