"""The log driver gelf: Graylog's format over UDP (compressed, in chunks) or TCP.

Source: moby, daemon/logger/gelf/gelf.go; Graylog2/go-gelf.
"""

import gzip
import os
import zlib
from collections.abc import Iterator
from urllib.parse import urlsplit

import msgspec

from skep.engine.containers.container import StandardStream
from skep.engine.log_drivers.facts import LogFacts, tag_of
from skep.engine.log_drivers.message import LogMessage, Undeliverable, text_of
from skep.engine.log_drivers.options import Options, integer, refuse_unknown
from skep.engine.log_drivers.transport import (
    ANYWHERE,
    LogConnection,
    RemoteAddress,
    connect,
    host_and_port,
)
from skep.errors import InvalidArgument
from skep.linux.network.guard import Guard

KNOWN = frozenset(
    f"gelf-{name}"
    for name in (
        *("address", "compression-level", "compression-type"),
        *("tcp-max-reconnect", "tcp-reconnect-delay"),
    )
)
_TYPES = ("gzip", "zlib", "none")
_CHUNK_BYTES = 1420
"""Size of a datagram in bytes, as in go-gelf."""
_HEAD_BYTES = 12
"""Size of a chunk's header in bytes."""
_CHUNKS_MAX = 128
"""Limit for the chunks of one message, set by GELF."""
_LEVEL_DEFAULT = 1
"""Default compression level, as in go-gelf (flate.BestSpeed)."""


def check(options: Options) -> None:
    """Check the driver's options.  Raises: InvalidArgument, in Docker's words."""
    endpoint = _endpoint(options)
    refuse_unknown("gelf", options, KNOWN)
    for key, value in options.items():
        match key:
            case "gelf-compression-level" | "gelf-compression-type":
                if endpoint.network != "udp":
                    raise InvalidArgument("compression is only supported on UDP")
                if not _is_compression(key, value):
                    raise InvalidArgument(f'unknown value "{value}" for log opt "{key}" for gelf log driver')
            case "gelf-tcp-max-reconnect" | "gelf-tcp-reconnect-delay":
                if endpoint.network != "tcp":
                    raise InvalidArgument(f'"{key}" is only valid for TCP')
                if not (value.isascii() and value.isdigit()):
                    raise InvalidArgument(f'"{key}" must be a positive integer')


class Gelf:
    """A connection to a Graylog server."""

    def __init__(self, options: Options, facts: LogFacts, guard: Guard = ANYWHERE) -> None:
        self._guard = guard
        self._endpoint = _endpoint(options)
        self._compression = options.get("gelf-compression-type", "gzip")
        self._level = integer(options, "gelf-compression-level", _LEVEL_DEFAULT)
        self._hostname = facts.hostname
        own = {
            "_container_id": facts.id,
            "_container_name": facts.name,
            "_image_id": facts.image_id,
            "_image_name": facts.image,
            "_command": facts.command,
            "_tag": tag_of(options, facts),
            "_created": facts.created,
        }
        further = {
            name if name.startswith("_") else f"_{name}": value for name, value in facts.attributes.items()
        }
        self._extra = further | own  # a label cannot replace the node's own fields
        self.confirms_each = self._endpoint.network == "udp"
        self._connection: LogConnection | None = None

    async def open(self) -> None:
        """Connect to the server."""
        self._connection = await connect(self._endpoint, self._guard)

    async def send(self, message: LogMessage) -> None:
        if not message.line:
            return
        assert self._connection is not None, "it is open"
        for part in self.parts(message):
            await self._connection.send(part)

    async def flush(self) -> None:
        """Do nothing, because a GELF server does not acknowledge messages."""

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def parts(self, message: LogMessage) -> Iterator[bytes]:
        """Encode ``message`` as datagrams for UDP, or as a part of the stream for TCP.  Raises: Undeliverable."""
        whole = msgspec.json.encode(
            {
                "version": "1.1",
                "host": self._hostname,
                "short_message": text_of(message.line),
                "timestamp": message.timestamp_ns // 1_000_000 / 1000,
                "level": 3 if message.stream is StandardStream.STDERR else 6,
                **self._extra,
            }
        )
        if self._endpoint.network == "tcp":
            yield whole + b"\0"
        else:
            yield from _chunks(self._compressed(whole))

    def _compressed(self, whole: bytes) -> bytes:
        match self._compression:
            case "gzip":
                return gzip.compress(whole, self._level if self._level >= 0 else 6, mtime=0)
            case "zlib":
                return zlib.compress(whole, self._level)
            case _:
                return whole


def _chunks(data: bytes) -> Iterator[bytes]:
    if len(data) <= _CHUNK_BYTES:
        yield data
        return
    size = _CHUNK_BYTES - _HEAD_BYTES
    count = -(-len(data) // size)
    if count > _CHUNKS_MAX:
        raise Undeliverable(f"msg too large, would need {count} chunks")
    id = os.urandom(8)
    for number in range(count):
        yield b"\x1e\x0f" + id + bytes((number, count)) + data[number * size : (number + 1) * size]


def _is_compression(key: str, value: str) -> bool:
    if key == "gelf-compression-type":
        return value in _TYPES
    return value in ("-1", *map(str, range(10)))


def _endpoint(options: Options) -> RemoteAddress:
    address = options.get("gelf-address", "")
    if not address:
        raise InvalidArgument("gelf-address is a required parameter")
    if "://" not in address or address.partition("://")[0] not in ("udp", "tcp", "unix"):
        raise InvalidArgument(f"gelf-address should be in form proto://address, got {address}")
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise InvalidArgument(f'parse "{address}": {error}') from error
    if parts.scheme not in ("udp", "tcp"):
        raise InvalidArgument("gelf: endpoint needs to be TCP or UDP")
    try:
        host, port = host_and_port(parts.netloc, None)
    except InvalidArgument as error:
        raise InvalidArgument("gelf: please provide gelf-address as proto://host:port") from error
    return RemoteAddress(network=parts.scheme, host=host, port=port)
