"""What grpclib's connections and streams are made of, at a third of the price.  Clients are grpclib's.

What a silent connection costs in grpclib 0.4.9:

* Each ``asyncio.Event`` and ``asyncio.Queue`` has deques of 600 bytes for waiters that are never there: 25 KiB of a
  connection with three streams.  Those here have none until somebody waits.
* Headers and message are two writes (an answer's trailers a third): as many TLS records and system calls here, and
  awakenings there.  A ``CoalescingTransport``, which our own server uses too, makes one of what is written in one turn
  of the loop.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import grpclib.protocol

COALESCED_BYTES_MAX = 64 * 1024
"""As much is held back within one turn of the loop; a peer that reads slowly is noticed as before."""


def make_lean() -> None:
    """Have connections that are made from now on consist of what is here.  Again is harmless."""
    grpclib.protocol.Event = Event  # type: ignore[attr-defined,assignment]
    grpclib.protocol.Buffer = Buffer  # type: ignore[misc,assignment]


class Event:
    """``asyncio.Event`` without what it keeps for waiters while there are none."""

    __slots__ = ("_is_set", "_waiters")

    def __init__(self) -> None:
        self._is_set = False
        self._waiters: list[asyncio.Future[None]] | None = None

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        for waiter in self._waiters or ():
            _wake(waiter)

    def clear(self) -> None:
        self._is_set = False

    async def wait(self) -> bool:
        """Return when the event is set, or has been since the call."""
        if self._is_set:
            return True
        waiter = asyncio.get_running_loop().create_future()
        self._waiters = [*(self._waiters or ()), waiter]
        try:
            await waiter
        finally:
            self._waiters = [other for other in self._waiters if other is not waiter] or None
        return True


class Buffer:
    """What a stream has received and nobody has read yet; for one reader.

    ``acknowledge`` is called with the size of each piece when it is read: only then may the peer send as much again.
    """

    __slots__ = ("_acknowledge", "_has_ended", "_pieces", "_rest", "_waiter")

    def __init__(self, acknowledge: Callable[[int], None]) -> None:
        self._acknowledge = acknowledge
        self._pieces: deque[tuple[bytes, int]] | None = None
        self._rest = b""
        self._has_ended = False
        self._waiter: asyncio.Future[None] | None = None

    def add(self, data: bytes, ack_size: int) -> None:
        """``ack_size``: what the piece counts for, padding included."""
        if self._pieces is None:
            self._pieces = deque()
        self._pieces.append((data, ack_size))
        _wake(self._waiter)

    def eof(self) -> None:
        self._has_ended = True
        _wake(self._waiter)

    async def read(self, size: int) -> bytes:
        """Exactly ``size`` bytes; nothing, when there are no more.  Raises: AssertionError: it ends between."""
        if not size:
            return b""
        taken, missing = [self._rest], size - len(self._rest)
        self._rest = b""
        while missing > 0:
            if self._pieces:
                data, ack_size = self._pieces.popleft()
                taken.append(data)
                missing -= len(data)
                if ack_size:
                    self._acknowledge(ack_size)
            elif self._has_ended:
                break
            else:
                await self._wait()
        if not self._pieces:
            self._pieces = None
        whole = b"".join(taken)
        if missing > 0 and whole:
            raise AssertionError("Received less data than expected")
        self._rest = whole[size:]
        return whole[:size]

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def unacked_size(self) -> int:
        """What of the peer's window is still taken; it is forgotten."""
        pieces, self._pieces = self._pieces or (), None
        return sum(ack_size for _, ack_size in pieces)


class CoalescingTransport(asyncio.Transport):
    """A transport that writes once what is written to it within one turn of the loop."""

    __slots__ = ("_pending", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self._pending = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not data:
            return
        if not self._pending:
            asyncio.get_running_loop().call_soon(self.flush)
        self._pending += data
        if len(self._pending) >= COALESCED_BYTES_MAX:
            self.flush()

    def flush(self) -> None:
        """Write now what is held back."""
        if self._pending:
            pending, self._pending = self._pending, b""
            self._transport.write(pending)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        self._pending = b""
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()


def _wake(waiter: "asyncio.Future[None] | None") -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
