"""TLS connections that use a fraction of the memory of asyncio's.  ``accept`` and ``connect`` create them.

* asyncio has a read buffer of 256 KiB for each TLS connection.  Here all connections of a thread share one buffer,
  which is possible because OpenSSL gets the data before anything else is read.
* asyncio keeps a copy of the peer's certificate as dictionaries, and a queue of pending writes.  Here the dictionaries
  are created on demand, and a list replaces the queue.

Unlike with asyncio's connections, the other end can close its direction alone.  Go's clients do so with TLS's
close_notify when they have nothing more to send, and continue to read (``docker exec`` without ``-i``).
"""

import asyncio
import asyncio.sslproto
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any, TypeVar

P = TypeVar("P", bound=asyncio.BaseProtocol)

READ_BYTES = 16 * 1024
"""Bytes that are read from a connection at once, the size of a TLS record."""

_of_thread = threading.local()

SILENT_S = 60
"""Seconds after which a connection to a machine that has vanished is closed, even if it is idle."""
_PROBES = {socket.TCP_KEEPIDLE: 15, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 3}


async def accept(
    new_protocol: Callable[[], asyncio.BaseProtocol],
    connection: socket.socket,
    tls: ssl.SSLContext,
    *,
    handshake_s: float,
) -> None:
    """Perform the server's side of the handshake.  Return when the protocol has its transport.

    This function owns ``connection`` from its first step on.  Raises: OSError, which includes TLS errors.
    """
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    inner = _Protocol(loop, new_protocol(), tls, ready, server_side=True, ssl_handshake_timeout=handshake_s)
    transport, _ = await loop.connect_accepted_socket(lambda: inner, connection)
    _tune(transport)
    await _finish_handshake(transport, ready)


async def connect(
    new_protocol: Callable[[], P], host: str, port: int, tls: ssl.SSLContext, *, server_name: str
) -> P:
    """Return the protocol of a new connection after its handshake.  The caller sets the deadline.  Raises: OSError."""
    loop = asyncio.get_running_loop()
    protocol = new_protocol()
    ready: asyncio.Future[None] = loop.create_future()
    inner = _Protocol(loop, protocol, tls, ready, server_side=False, server_hostname=server_name)
    transport, _ = await loop.create_connection(lambda: inner, host, port)
    _tune(transport)
    await _finish_handshake(transport, ready)
    return protocol


def _tune(transport: asyncio.BaseTransport) -> None:
    """Make the kernel send small pieces immediately, and end the connection after ``SILENT_S`` of silence.

    asyncio sets TCP_NODELAY only on sockets that were created with their protocol number, which accepted sockets are
    not.  Without it, the body of a request would wait 40 ms for the other end's delayed acknowledgement.
    """
    connected = transport.get_extra_info("socket")
    if connected is None or connected.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _PROBES.items():
        connected.setsockopt(socket.IPPROTO_TCP, option, value)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_S * 1000)


async def _finish_handshake(transport: asyncio.BaseTransport, ready: "asyncio.Future[None]") -> None:
    try:
        await ready
    except BaseException:
        transport.close()
        raise


_HALF_CLOSE = "half-close"


def may_half_close(transport: asyncio.BaseTransport) -> bool:
    """Return whether the other end may close only its direction, so that ``eof_received`` may return True.

    That holds for plain connections and TLS connections of this module, but not for asyncio's own TLS.
    """
    return transport.get_extra_info("sslcontext") is None or bool(transport.get_extra_info(_HALF_CLOSE))


class _Protocol(asyncio.sslproto.SSLProtocol):
    """asyncio's protocol with a shared buffer, and a half-close by the other end."""

    max_size = READ_BYTES

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not hasattr(_of_thread, "buffer"):
            _of_thread.buffer = bytearray(READ_BYTES)
            _of_thread.view = memoryview(_of_thread.buffer)
        self._ssl_buffer = _of_thread.buffer
        self._ssl_buffer_view = _of_thread.view
        self._write_backlog = []  # type: ignore[assignment]
        self._is_half_closed = False
        self._extra[_HALF_CLOSE] = True

    def _on_handshake_complete(self, handshake_exc: BaseException | None) -> None:
        super()._on_handshake_complete(handshake_exc)
        self._extra.pop("peercert", None)

    def buffer_updated(self, nbytes: int) -> None:
        """Handle received bytes.  Bytes after a close_notify end the connection, because nothing would read them."""
        is_established = self._state is asyncio.sslproto.SSLProtocolState.WRAPPED  # type: ignore[attr-defined]
        if self._is_half_closed and is_established:
            self._fatal_error(ConnectionResetError("data after close_notify"))
            return
        super().buffer_updated(nbytes)

    def _call_eof_received(self) -> None:
        """Handle the other end's close_notify, after which it sends no data."""
        if self._app_state is not asyncio.sslproto.AppProtocolState.STATE_CON_MADE:  # type: ignore[has-type]
            return
        self._app_state = asyncio.sslproto.AppProtocolState.STATE_EOF
        try:
            self._is_half_closed = bool(self._app_protocol.eof_received())  # type: ignore[attr-defined]
        except Exception as error:
            self._fatal_error(error, "Error calling eof_received()")

    def _start_shutdown(self) -> None:
        """Shut the connection down.  If the other end has closed its direction only, do so once our direction is closed
        as well.
        """
        if self._is_half_closed and self._app_transport is not None and not self._app_transport._closed:
            return
        super()._start_shutdown()

    def _get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "peercert" and name not in self._extra and "ssl_object" in self._extra:
            connection: ssl.SSLObject = self._extra["ssl_object"]
            return connection.getpeercert()
        return super()._get_extra_info(name, default)
