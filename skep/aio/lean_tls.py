"""What TLS costs asyncio per connection, at a fraction of the price.

* asyncio gives each TLS connection a buffer of 256 KiB to read into.  What was read is handed to OpenSSL before
  anything else is read, so one buffer serves all connections of a thread.
* It keeps the peer's certificate as dictionaries, besides OpenSSL's own, and a queue for what waits to be written.
  Here the former are made when somebody asks, and the latter is a list.
"""

import asyncio.sslproto
import ssl
import threading
from typing import Any

READ_BYTES = 16 * 1024
"""Read at once from one connection: a TLS record."""

_of_thread = threading.local()


def make_lean() -> None:
    """Have TLS connections that are made from now on share their read buffer.  Again is harmless."""
    asyncio.sslproto.SSLProtocol = LeanSSLProtocol  # type: ignore[misc]


class LeanSSLProtocol(asyncio.sslproto.SSLProtocol):
    """asyncio's, with a buffer that it shares."""

    max_size = READ_BYTES

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not hasattr(_of_thread, "buffer"):
            _of_thread.buffer = bytearray(READ_BYTES)
            _of_thread.view = memoryview(_of_thread.buffer)
        self._ssl_buffer = _of_thread.buffer
        self._ssl_buffer_view = _of_thread.view
        self._write_backlog = []  # type: ignore[assignment]

    def _on_handshake_complete(self, handshake_exc: BaseException | None) -> None:
        super()._on_handshake_complete(handshake_exc)
        self._extra.pop("peercert", None)

    def _get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "peercert" and name not in self._extra and "ssl_object" in self._extra:
            connection: ssl.SSLObject = self._extra["ssl_object"]
            return connection.getpeercert()
        return super()._get_extra_info(name, default)
