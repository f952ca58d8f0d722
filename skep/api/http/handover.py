"""Messages with which the node process and the manager process pass clients' connections to each other.

The node process connects to the manager's socket and sends the *state table*.  That is a shared memory file with one
byte for each connection that it may pass (``ExchangeState``), which the process that serves the connection writes.
After that, either end sends connections.  A message with a connection has the descriptor, and the bytes that were
already read from it.

The node process keeps a duplicate of each passed descriptor until the manager sends ``CLOSED`` for it or passes it
back.  If the manager process ends, the node process can then continue with its connections.  The state shows whether a
response is missing.

A message is one packet of a SOCK_SEQPACKET socket, or several (``REST``) if much data was read.  Its header has kind
and flags (1 byte each), and slot (the connection's index in the table) and length of all data (4 bytes each,
big-endian).  If a flag says so, the client's identity precedes the data, after its length (2 bytes).
"""

import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import IntEnum

import msgspec

SLOTS = 8192
"""Largest number of connections that one node process may have passed at a time."""
NO_SLOT = 0xFFFFFFFF
"""Slot of a connection that an earlier node process passed."""
_HEADER = struct.Struct("!BBII")
_DATA_BYTES = 32 * 1024
"""Largest number of data bytes in one packet.  The socket's buffer has space for several packets."""
_AT_ONCE = 32
"""Largest number of packets that are read before other tasks of the event loop run."""
# Flags of a packet: the client is on another machine, the data begins with the user's identity.
_REMOTE = 1
_IDENTIFIED = 2
_IDENTITY_LENGTH = struct.Struct("!H")
IDENTITY_BYTES_MAX = 16 * 1024
"""Longest identity, which must fit into the first packet."""


class ExchangeState(IntEnum):
    """Progress of the exchange on a connection, stored in the state table."""

    IDLE = 0
    """No byte of a request has been read."""
    REQUESTED = 1
    """At least a part of a request has been read, and no byte of the response has been sent."""
    RESPONDING = 2
    """A part of the response has been sent."""


class MessageKind(IntEnum):
    """Kind of a message."""

    STATES = 1
    """To the manager, as the first message: the descriptor of the state table."""
    CONNECTION = 2
    REST = 3
    """More data of the previous message."""
    CLOSED = 4
    """To the node process: the connections whose slots are in the data have ended."""
    STOPPING = 5
    """To the node process: pass no more connections to this manager process."""


class HandoverMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message.  The receiver owns ``descriptor``, which is None if the receiver had no free one."""

    kind: MessageKind
    slot: int = 0
    data: bytes = b""
    descriptor: int | None = None
    is_remote: bool = False
    """Whether the client is on another machine.  The time that its connections stay open is then limited."""
    identity: bytes = b""
    """Identity of the client (``identity.packed``), or empty for the permissions of the Unix socket."""


class Channel:
    """Sends and receives messages over a connected SOCK_SEQPACKET socket.  Owns the socket and the descriptors to
    send.
    """

    def __init__(
        self,
        connected: socket.socket,
        on_message: Callable[[HandoverMessage], None],
        on_end: Callable[[], None],
    ) -> None:
        """``on_end`` is called once, when the other end has closed."""
        self._socket = connected
        self._on_message = on_message
        self._on_end = on_end
        self._queue: deque[tuple[bytes, int | None]] = deque()
        self._partial: HandoverMessage | None = None
        self._missing_bytes = 0
        self._is_full = False
        self._loop = asyncio.get_running_loop()
        self.is_closed = False
        self._loop.add_reader(connected, self._read)

    @property
    def queued(self) -> int:
        """Number of packets for which the other end has no space yet."""
        return len(self._queue)

    def send(self, message: HandoverMessage) -> None:
        """Send ``message`` as soon as there is space.  After the end, drop it and close its descriptor."""
        if self.is_closed:
            _close(message.descriptor)
            return
        data, flags = message.data, message.is_remote and _REMOTE
        if message.identity:
            assert len(message.identity) <= IDENTITY_BYTES_MAX, "the bindings of a user are bounded"
            data = _IDENTITY_LENGTH.pack(len(message.identity)) + message.identity + data
            flags |= _IDENTIFIED
        head = _HEADER.pack(message.kind, flags, message.slot, len(data))
        self._queue.append((head + data[:_DATA_BYTES], message.descriptor))
        rest = _HEADER.pack(MessageKind.REST, 0, message.slot, 0)
        for start in range(_DATA_BYTES, len(data), _DATA_BYTES):
            self._queue.append((rest + data[start : start + _DATA_BYTES], None))
        self._write()

    def close(self) -> None:
        """Close this end.  ``on_end`` is not called."""
        if self.is_closed:
            return
        self.is_closed = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        for _, descriptor in self._queue:
            _close(descriptor)
        self._queue.clear()
        if self._partial is not None:
            _close(self._partial.descriptor)

    def _end(self) -> None:
        if not self.is_closed:
            self.close()
            self._on_end()

    def _write(self) -> None:
        while self._queue and not self.is_closed:
            packet, descriptor = self._queue[0]
            try:
                if descriptor is None:
                    self._socket.send(packet)
                else:
                    socket.send_fds(self._socket, [packet], [descriptor])
            except BlockingIOError:
                if not self._is_full:
                    self._is_full = True
                    self._loop.add_writer(self._socket, self._write)
                return
            except OSError:
                self._end()
                return
            self._queue.popleft()
            _close(descriptor)
        if self._is_full and not self.is_closed:
            self._is_full = False
            self._loop.remove_writer(self._socket)

    def _read(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                packet, descriptors, _, _ = socket.recv_fds(
                    self._socket, _HEADER.size + _DATA_BYTES, 1, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                packet, descriptors = b"", []
            if len(packet) < _HEADER.size:
                self._end()
                return
            self._take(packet, descriptors[0] if descriptors else None)
            if self.is_closed:
                return

    def _take(self, packet: bytes, descriptor: int | None) -> None:
        kind, flags, slot, size = _HEADER.unpack_from(packet)
        data = packet[_HEADER.size :]
        if kind == MessageKind.REST and self._partial is not None:
            message, self._partial = self._partial, None
            message = msgspec.structs.replace(message, data=message.data + data)
        else:
            identity = b""
            if flags & _IDENTIFIED:
                end = _IDENTITY_LENGTH.size + _IDENTITY_LENGTH.unpack_from(data)[0]
                identity, data, size = data[_IDENTITY_LENGTH.size : end], data[end:], size - end
            message = HandoverMessage(
                kind=MessageKind(kind),
                slot=slot,
                data=data,
                descriptor=descriptor,
                is_remote=bool(flags & _REMOTE),
                identity=identity,
            )
            self._missing_bytes = size
        self._missing_bytes -= len(data)
        if self._missing_bytes > 0:
            self._partial = message
        else:
            self._on_message(message)


def pack_slots(slots: Sequence[int]) -> bytes:
    """Return slots as data, 4 bytes each, big-endian."""
    return struct.pack(f"!{len(slots)}I", *slots)


def unpack_slots(data: bytes) -> tuple[int, ...]:
    """Return the slots in data of ``pack_slots``."""
    return struct.unpack(f"!{len(data) // 4}I", data)


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        with suppress(OSError):
            os.close(descriptor)
