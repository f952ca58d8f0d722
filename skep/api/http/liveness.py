"""Answers the requests with which a node process checks that its manager process responds.

They arrive every second, and are answered without aiohttp, which takes half a millisecond for each.
"""

import asyncio
from collections.abc import Callable

REQUEST = b"HEAD /_skep/lag HTTP/1.1\r\nHost: manager\r\n\r\n"
"""The request.  It arrives alone, because the node process waits for the response before it sends another one."""
_RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class LivenessConnection(asyncio.Protocol):
    """A connection that answers ``REQUEST``, until another request arrives.

    ``new_handler`` returns the protocol that serves this other request and all later ones.
    """

    def __init__(self, new_handler: Callable[[], asyncio.Protocol]) -> None:
        self._new_handler = new_handler
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Record that a client has connected."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer, or hand the connection over."""
        assert self._transport is not None, "data before a connection"
        if data == REQUEST:
            self._transport.write(_RESPONSE)
            return
        handler = self._new_handler()
        self._transport.set_protocol(handler)
        handler.connection_made(self._transport)
        handler.data_received(data)
