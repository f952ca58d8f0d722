"""Opens connections to the remotes of log drivers."""

import asyncio
import errno
import os
import socket
import ssl
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec

from skep.api.formats.gosyntax import parse_port
from skep.engine.log_drivers.message import Undeliverable
from skep.errors import InvalidArgument
from skep.linux.network.guard import Guard

CONNECT_S = 10.0
"""Time limit in seconds for one attempt to connect."""
SEND_S = 30.0
"""Time limit in seconds for one send.  After that, the connection is closed, because the remote reads nothing."""
FILE_BYTES_MAX = 1 << 20
"""Limit in bytes for a file with certificates or a key."""


class RemoteTlsFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Files of a TLS connection.

    If they are empty, the system's authorities are trusted, and there is no client certificate.
    """

    ca: str = ""
    is_ca_alone: bool = False
    """Whether only ``ca`` is trusted, without the system's authorities."""
    certificate: str = ""
    key: str = ""
    verifies: bool = True
    name: str = ""
    """Name that the server's certificate must have.  Empty to expect the name of the host."""


class RemoteAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Address of a remote.

    ``network`` is udp, tcp or tls.  With unix or unixgram, there is a path instead of host and port.
    """

    network: str
    host: str = ""
    port: int = 0
    path: str = ""
    tls: RemoteTlsFiles | None = None


ANYWHERE = Guard(is_restricted=False)
"""Guard for containers whose log driver an administrator chose."""


class LogConnection(Protocol):
    """An open connection."""

    async def send(self, data: bytes) -> None:
        """Send one datagram, or a part of a stream.  Raises: Undeliverable: too large; OSError."""

    async def receive(self) -> bytes:
        """Return data from the remote.  Raises: OSError: it has ended, or sends nothing."""

    def close(self) -> None:
        """Disconnect."""


async def connect(
    endpoint: RemoteAddress, guard: Guard, deadline_s: float = CONNECT_S, send_s: float = SEND_S
) -> LogConnection:
    """Connect to an address that ``guard`` allows.  ``send_s``: time limit for one send.  Raises: OSError."""
    async with asyncio.timeout(deadline_s):
        match endpoint.network:
            case "udp":
                family, address = (await _resolve_allowed(endpoint, socket.SOCK_DGRAM, guard))[0]
                return await _datagrams(family, address, send_s)
            case "unixgram":
                guard.check_socket(endpoint.path)
                return await _datagrams(socket.AF_UNIX, endpoint.path, send_s)
            case "unix":
                guard.check_socket(endpoint.path)
                return _Stream(*await asyncio.open_unix_connection(endpoint.path), send_s)
            case _:
                addresses = await _resolve_allowed(endpoint, socket.SOCK_STREAM, guard)
                return await _stream(endpoint, addresses, send_s)


async def _resolve_allowed(
    endpoint: RemoteAddress, kind: socket.SocketKind, guard: Guard
) -> Sequence[tuple[int, tuple[Any, ...]]]:
    """Return the families and addresses of an endpoint's host that ``guard`` allows.  Raises: OSError: none."""
    host = endpoint.host or "localhost"
    infos = await asyncio.get_running_loop().getaddrinfo(host, endpoint.port, type=kind)
    found, refusal = [], OSError(errno.EADDRNOTAVAIL, f"{host} has no address")
    for family, _, _, _, address in infos:
        try:
            guard.check(str(address[0]))
        except PermissionError as error:
            refusal = error
        else:
            found.append((family, address))
    if not found:
        raise refusal
    return found


async def _stream(
    endpoint: RemoteAddress, addresses: Sequence[tuple[int, tuple[Any, ...]]], send_s: float
) -> "_Stream":
    """Connect to the first of ``addresses`` that responds.  The name is not resolved again."""
    tls = endpoint.tls
    context = client_context(tls) if tls is not None else None
    name = (tls.name or endpoint.host or "localhost") if tls is not None else None
    last: OSError | None = None
    for family, address in addresses:
        connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            await asyncio.get_running_loop().sock_connect(connection, address)
            streams = await asyncio.open_connection(sock=connection, ssl=context, server_hostname=name)
            return _Stream(*streams, send_s)
        except OSError as error:
            connection.close()
            last = error
        except BaseException:
            connection.close()
            raise
    assert last is not None, "there is an address"
    raise last


def client_context(files: RemoteTlsFiles) -> ssl.SSLContext:
    """Return the TLS context.  Raises: OSError: a file cannot be used."""
    with _content(files.ca) as ca:
        if files.is_ca_alone:
            context = ssl.create_default_context(cafile=ca)
        else:
            context = ssl.create_default_context()
            if ca is not None:
                context.load_verify_locations(ca)
    if files.certificate or files.key:
        with _content(files.certificate) as certificate, _content(files.key) as key:
            context.load_cert_chain(certificate or "", key or "")
    if not files.verifies:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


@contextmanager
def _content(path: str) -> Iterator[str | None]:
    """Yield a path from which OpenSSL reads a copy of the file at ``path``, or None without a path.

    A copy, because OpenSSL opens files itself, and would block on a pipe without a writer or read a device endlessly.

    Raises: OSError: the file does not exist, is not regular or is too large.
    """
    if not path:
        yield None
        return
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        data = file.read(FILE_BYTES_MAX + 1)
    if len(data) > FILE_BYTES_MAX:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
    with open(os.memfd_create("skep-log-tls"), "wb") as copy:
        copy.write(data)
        copy.flush()
        yield f"/proc/self/fd/{copy.fileno()}"


def host_and_port(text: str, default_port: int | None) -> tuple[str, int]:
    """Parse ``host:port`` or ``[address]:port``.  Raises: InvalidArgument, in the words of Go's net package."""
    host, separator, port = text.rpartition(":")
    if not separator or text.endswith("]"):
        host, port = text, "" if default_port is None else str(default_port)
    if not port:
        raise InvalidArgument(f"address {text}: missing port in address")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise InvalidArgument(f"address {text}: too many colons in address")
    if (number := parse_port(port)) is None:
        raise InvalidArgument(f"address {text}: invalid port")
    return host.strip("[]"), number


async def _datagrams(family: int, address: "str | Sequence[object]", send_s: float) -> "_Datagrams":
    connection = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        connection.connect(address if isinstance(address, str) else tuple(address))  # does not block
    except BaseException:
        connection.close()
        raise
    return _Datagrams(connection, send_s)


class _Datagrams:
    def __init__(self, connection: socket.socket, send_s: float) -> None:
        self._socket = connection
        self._send_s = send_s

    async def send(self, data: bytes) -> None:
        try:
            try:
                self._socket.send(data)
            except BlockingIOError:  # the local receiver does not read
                async with asyncio.timeout(self._send_s):
                    await asyncio.get_running_loop().sock_sendall(self._socket, data)
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                raise Undeliverable(f"it has {len(data)} bytes, too many for a datagram") from error
            raise

    async def receive(self) -> bytes:
        raise OSError(errno.EOPNOTSUPP, "datagrams have no responses")

    def close(self) -> None:
        self._socket.close()


class _Stream:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, send_s: float) -> None:
        self._send_s = send_s
        self._reader = reader
        self._writer = writer
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    async def send(self, data: bytes) -> None:
        with self._aborted_by_error():
            if self._reader.at_eof():
                raise ConnectionResetError(errno.ECONNRESET, "the remote has closed the connection")
            self._writer.write(data)
            async with asyncio.timeout(self._send_s):
                await self._writer.drain()

    async def receive(self) -> bytes:
        with self._aborted_by_error():
            async with asyncio.timeout(self._send_s):
                data = await self._reader.read(4096)
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "the remote has closed the connection")
            return data

    def close(self) -> None:
        self._writer.close()
        # Abort, because closing would first send the last data, which a hanging remote delays forever.
        asyncio.get_running_loop().call_later(self._send_s, self._writer.transport.abort)

    @contextmanager
    def _aborted_by_error(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._writer.transport.abort()
            raise
