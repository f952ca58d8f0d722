"""One write for what is written in one turn of the event loop.

Headers and message of a response are two writes, its trailers a third: as many TLS records and system calls here, and
awakenings there.
"""

import asyncio
from typing import Any

COALESCED_BYTES_MAX = 64 * 1024
"""As much is held back within one turn of the loop; a peer that reads slowly is noticed as before."""


class CoalescingTransport(asyncio.Transport):
    """A transport that writes once what is written to it within one turn of the loop."""

    __slots__ = ("_pending", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self._pending = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send ``data`` with the other writes of this turn of the event loop."""
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
        """Send what is left, and close."""
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._pending = b""
        self._transport.abort()

    def is_closing(self) -> bool:
        """As of the transport below."""
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As of the transport below."""
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        """As of the transport below."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """As of the transport below."""
        self._transport.resume_reading()
