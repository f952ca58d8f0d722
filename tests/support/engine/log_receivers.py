"""Receivers for log drivers, in the test's own event loop."""

import asyncio
import gzip
import io
import json
import socket
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

Answer = Callable[[bytes], bytes]
"""Returns the response to received data.  Empty for no response."""


class Datagrams(asyncio.DatagramProtocol):
    """Records datagrams in the order in which they came."""

    def __init__(self) -> None:
        self.received: list[bytes] = []

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.received.append(data)


@asynccontextmanager
async def datagrams(address: "Path | int") -> AsyncIterator[Datagrams]:
    """Receive datagrams at a path, or at a port of the loopback."""
    family = socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_DGRAM)
    bound.setblocking(False)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    bound.bind(str(address) if isinstance(address, Path) else ("127.0.0.1", address))
    transport, protocol = await asyncio.get_running_loop().create_datagram_endpoint(Datagrams, sock=bound)
    try:
        yield protocol
    finally:
        transport.close()
        await asyncio.sleep(0)  # the socket is closed in the loop's next turn


class Streams:
    """Records the joined data of all connections.  Clear ``reading`` to stop reading."""

    def __init__(self, response: Answer) -> None:
        self.received = b""
        self.connections = 0
        self.reading = asyncio.Event()
        self.reading.set()
        self._answer = response
        self._writers: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            with suppress(ConnectionError):
                while True:
                    await self.reading.wait()
                    data = await reader.read(65536)
                    if not data:
                        break
                    self.received += data
                    if response := self._answer(data):
                        writer.write(response)
        finally:
            self._writers.discard(writer)
            writer.close()

    def disconnect(self) -> None:
        """Close every connection."""
        for writer in self._writers:
            writer.close()


@asynccontextmanager
async def streams(
    address: "Path | int", response: Answer = lambda _: b"", tls: Any = None
) -> AsyncIterator[Streams]:
    """Serve connections at a path, or at a port of the loopback."""
    found = Streams(response)
    if isinstance(address, Path):
        server = await asyncio.start_unix_server(found.serve, address)
    else:
        server = await asyncio.start_server(found.serve, "127.0.0.1", address, ssl=tls)
    try:
        yield found
    finally:
        server.close()
        found.disconnect()


def free_port() -> int:
    """Return a port of the loopback that is currently free for TCP and UDP."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


# --- received data --------------------------------------------------------------------------------------------------


def gelf_messages(received: list[bytes]) -> list[dict[str, Any]]:
    """Decode GELF datagrams, which may be chunks, compressed or not."""
    chunks: dict[bytes, dict[int, bytes]] = {}
    found = []
    for data in received:
        if data[:2] == b"\x1e\x0f":
            parts = chunks.setdefault(data[2:10], {})
            parts[data[10]] = data[12:]
            if len(parts) < data[11]:
                continue
            data = b"".join(part for _, part in sorted(parts.items()))
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        elif data[:1] == b"\x78":
            data = zlib.decompress(data)
        found.append(json.loads(data))
    return found


class Moment(NamedTuple):
    """A time in the forward protocol, with nanoseconds."""

    seconds: int
    nanoseconds: int


def fluentd_messages(received: bytes) -> list[list[Any]]:
    """Decode ``[tag, time, record, option]`` messages.  Strings are bytes, because they may not be UTF-8."""
    stream, found = io.BytesIO(received), []
    with suppress(EOFError):
        while True:
            found.append(_unpacked(stream))
    return found


def _unpacked(stream: io.BytesIO) -> Any:
    """Decode one value of the forward protocol's types.  Raises: EOFError."""

    def number(size: int) -> int:
        return int.from_bytes(taken(size), "big")

    def taken(size: int) -> bytes:
        data = stream.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def mapped(size: int) -> dict[Any, Any]:
        return {_unpacked(stream): _unpacked(stream) for _ in range(size)}

    kind = number(1)
    if kind < 0x80:
        return kind
    if kind < 0x90:
        return mapped(kind & 15)
    if kind < 0xA0:
        return [_unpacked(stream) for _ in range(kind & 15)]
    if kind < 0xC0:
        return taken(kind & 31)
    match kind:
        case 0xD7:
            assert number(1) == 0, "a time"
            return Moment(number(4), number(4))
        case 0xD9 | 0xDA | 0xDB:
            return taken(number(1 << (kind - 0xD9)))
        case 0xCC | 0xCD | 0xCE | 0xCF:
            return number(1 << (kind - 0xCC))
        case 0xD0 | 0xD1 | 0xD2 | 0xD3:
            return number(1 << (kind - 0xD0))
        case 0xDE:
            return mapped(number(2))
        case 0xC0:
            return None
    raise AssertionError(f"unexpected kind {kind:x}")


def journal_fields(datagram: bytes) -> dict[str, bytes]:
    """Return the fields of one entry in the journal's native protocol."""
    found: dict[str, bytes] = {}
    while datagram:
        line, _, rest = datagram.partition(b"\n")
        if b"=" in line:
            name, _, value = line.partition(b"=")
            datagram = rest
        else:
            size = int.from_bytes(rest[:8], "little")
            name, value, datagram = line, rest[8 : 8 + size], rest[9 + size :]
        found[name.decode()] = value
    return found
