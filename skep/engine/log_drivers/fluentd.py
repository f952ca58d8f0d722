"""The log driver fluentd: the forward protocol in MessagePack over TCP, TLS or a Unix socket.

Strings are written as raw bytes, like the container's output, which may not be UTF-8.

Source: moby, daemon/logger/fluentd/fluentd.go; fluent/fluent-logger-golang, fluent/proto_gen.go; Fluentd's Forward
Protocol Specification v1.
"""

import base64
import os
import struct
from collections.abc import Mapping
from urllib.parse import urlsplit

import msgspec

from skep.api.formats.gosyntax import parse_size
from skep.engine.log_drivers.facts import LogFacts, tag_of
from skep.engine.log_drivers.message import LogMessage
from skep.engine.log_drivers.options import Options, boolean, refuse_unknown
from skep.engine.log_drivers.transport import (
    ANYWHERE,
    LogConnection,
    RemoteAddress,
    RemoteTlsFiles,
    connect,
)
from skep.errors import InvalidArgument
from skep.linux.network.guard import Guard
from skep.model.values.times import SECOND_NS, duration_ns

KNOWN = frozenset(
    f"fluentd-{name}"
    for name in (
        *("address", "async", "async-connect", "async-reconnect-interval", "buffer-limit", "max-retries"),
        *("request-ack", "retry-wait", "sub-second-precision", "write-timeout", "read-timeout"),
    )
)
_PORT = 24224
"""Default port of Fluentd's forward protocol."""
_RETRIES_MAX = (1 << 32) - 1
"""Largest value of ``fluentd-max-retries``, the largest unsigned 32-bit number."""
_RECONNECT_NS_MIN, _RECONNECT_NS_MAX = 100_000_000, 10 * SECOND_NS
"""Smallest and largest reconnect interval (100 ms and 10 s).  Source: moby, daemon/logger/fluentd."""


def check(options: Options) -> None:
    """Check the driver's options.  Raises: InvalidArgument, in Docker's words."""
    refuse_unknown("fluentd", options, KNOWN)
    _endpoint(options)
    if options.get("fluentd-buffer-limit"):
        parse_size(options["fluentd-buffer-limit"])
    for name in ("retry-wait", "write-timeout", "read-timeout"):
        _duration(options, f"fluentd-{name}")
    retries = options.get("fluentd-max-retries", "0") or "0"
    if not (retries.isascii() and retries.isdigit() and int(retries[:20]) <= _RETRIES_MAX):
        raise InvalidArgument(f'strconv.ParseUint: parsing "{retries}": invalid syntax')
    for name in ("async", "async-connect", "sub-second-precision", "request-ack"):
        boolean(options, f"fluentd-{name}")
    key = "fluentd-async-reconnect-interval"
    interval = _duration(options, key)
    if interval and not _RECONNECT_NS_MIN <= interval <= _RECONNECT_NS_MAX:
        raise InvalidArgument(
            f'invalid value for {key}: value ("{options[key]}") must be between 100ms and 10s'
        )


class Fluentd:
    """A connection to a fluentd."""

    def __init__(self, options: Options, facts: LogFacts, guard: Guard = ANYWHERE) -> None:
        self._guard = guard
        self._tag = _text(tag_of(options, facts).encode())
        self._endpoint = _endpoint(options)
        self._is_precise = boolean(options, "fluentd-sub-second-precision")
        self.confirms_each = boolean(options, "fluentd-request-ack")
        self._attributes = {name.encode(): value.encode() for name, value in facts.attributes.items()}
        self._own = {b"container_id": facts.id.encode(), b"container_name": f"/{facts.name}".encode()}
        self._connection: LogConnection | None = None
        self._chunk = b""

    async def open(self) -> None:
        """Connect to the server."""
        self._connection = await connect(self._endpoint, self._guard)

    async def send(self, message: LogMessage) -> None:
        assert self._connection is not None, "it is open"
        self._chunk = base64.b64encode(os.urandom(16)) if self.confirms_each else b""
        await self._connection.send(self.packed(message, self._chunk))
        if self._chunk:
            await self._wait_acknowledged(self._connection)

    async def flush(self) -> None:
        """Do nothing, because each message was already acknowledged, if that was requested."""

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def packed(self, message: LogMessage, chunk: bytes = b"") -> bytes:
        """Encode ``[tag, time, record, option]``.  The server acknowledges ``chunk``."""
        record = {  # a label cannot replace the node's own fields
            **self._attributes,
            **self._own,
            b"source": message.source.encode(),
            b"log": message.line,
        }
        if message.partial is not None:
            record |= {
                b"partial_message": b"true",
                b"partial_id": message.partial.id.encode(),
                b"partial_ordinal": b"%d" % message.partial.ordinal,
                b"partial_last": b"true" if message.partial.last else b"false",
            }
        seconds, nanoseconds = divmod(message.timestamp_ns, SECOND_NS)
        moment = (
            b"\xd7\x00" + struct.pack(">II", seconds & 0xFFFFFFFF, nanoseconds)
            if self._is_precise
            else msgspec.msgpack.encode(seconds)
        )
        return b"\x94" + self._tag + moment + _map(record) + _map({b"chunk": chunk} if chunk else {})

    async def _wait_acknowledged(self, connection: LogConnection) -> None:
        received = b""
        while True:
            received += await connection.receive()
            try:
                response = msgspec.msgpack.decode(received, type=dict[str, str])
            except msgspec.ValidationError as error:
                raise ConnectionError("the server has sent no acknowledgement") from error
            except msgspec.DecodeError as error:
                if len(received) > 4096:
                    raise ConnectionError("the server has sent no acknowledgement") from error
                continue
            if response.get("ack", "").encode() != self._chunk:
                raise ConnectionError("the server has acknowledged another message")
            return


def _text(data: bytes) -> bytes:
    size = len(data)
    if size < 32:
        return bytes((0xA0 | size,)) + data
    if size < 1 << 8:
        return b"\xd9" + bytes((size,)) + data
    if size < 1 << 16:
        return b"\xda" + size.to_bytes(2, "big") + data
    return b"\xdb" + size.to_bytes(4, "big") + data


def _map(values: Mapping[bytes, bytes]) -> bytes:
    size = len(values)
    head = bytes((0x80 | size,)) if size < 16 else b"\xde" + size.to_bytes(2, "big")
    return head + b"".join(_text(name) + _text(value) for name, value in values.items())


def _duration(options: Options, key: str) -> int:
    text = options.get(key, "")
    if not text:
        return 0
    found = duration_ns(text)
    if found is None:
        raise InvalidArgument(f'invalid value for {key}: time: invalid duration "{text}"')
    if found < 0:
        raise InvalidArgument(f"invalid value for {key}: value must be a duration that is non-negative")
    return found


def _endpoint(options: Options) -> RemoteAddress:
    address = options.get("fluentd-address", "")
    try:
        parts = urlsplit(address if "://" in address else f"tcp://{address}")
        host, port = parts.hostname or "127.0.0.1", _PORT if parts.port is None else parts.port
    except ValueError as error:
        raise InvalidArgument(f"invalid fluentd-address ({address}): invalid port: {error}") from error
    match parts.scheme:
        case "unix":
            if not parts.path.strip("/"):
                raise InvalidArgument(f"invalid fluentd-address ({address}): path is empty")
            return RemoteAddress(network="unix", path=parts.path)
        case "tcp" | "tls":
            if parts.path:
                raise InvalidArgument(
                    f"invalid fluentd-address ({address}): should not contain a path element"
                )
            tls = RemoteTlsFiles() if parts.scheme == "tls" else None
            return RemoteAddress(network="tcp", host=host, port=port, tls=tls)
        case other:
            raise InvalidArgument(f"invalid fluentd-address ({address}): unsupported scheme: '{other}'")
