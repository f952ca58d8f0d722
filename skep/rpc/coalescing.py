"""A transport that joins the writes of one event loop iteration.

A response consists of three writes: headers, message and trailers.  Each write would cost a TLS record and a system
call here, and a wake-up at the peer.
"""

import asyncio
from typing import Any

COALESCED_BYTES_MAX = 64 * 1024
"""Largest number of bytes that are buffered in one iteration.  Beyond it they are written at once, so that flow control
still notices a slow peer.
"""


class CoalescingTransport(asyncio.Transport):
    """Joins all writes of one event loop iteration into one write to ``transport``."""

    __slots__ = ("_pending", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self._pending = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send ``data`` with the other writes of this event loop iteration."""
        if not data:
            return
        if not self._pending:
            asyncio.get_running_loop().call_soon(self.flush)
        self._pending += data
        if len(self._pending) >= COALESCED_BYTES_MAX:
            self.flush()

    def flush(self) -> None:
        """Write all buffered data now."""
        if self._pending:
            pending, self._pending = self._pending, b""
            self._transport.write(pending)

    def close(self) -> None:
        """Write buffered data and close."""
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        """Close at once and drop buffered data."""
        self._pending = b""
        self._transport.abort()

    def is_closing(self) -> bool:
        """Delegate to the underlying transport."""
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Delegate to the underlying transport."""
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        """Delegate to the underlying transport."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Delegate to the underlying transport."""
        self._transport.resume_reading()
