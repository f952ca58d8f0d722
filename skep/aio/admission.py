"""How many connections of clients may be open, in all and from one address."""

import asyncio

import structlog

from skep.aio.handshakes import source_of

log = structlog.get_logger()


class Admission:
    """The open connections of one kind, whichever process serves them.  ``kind`` names them in the log."""

    def __init__(self, kind: str, most: int, most_of_source: int) -> None:
        self._kind = kind
        self._most = most
        self._most_of_source = most_of_source
        self._transports: dict[asyncio.Transport, str] = {}

    def admit(self, transport: asyncio.Transport) -> bool:
        """Count a new connection; False: there are too many, of its address or in all."""
        peer = transport.get_extra_info("peername")
        source = source_of(str(peer[0])) if peer else ""
        if not self._has_room(source):
            for known in tuple(self._transports):
                if known.is_closing():
                    del self._transports[known]
        if not self._has_room(source):
            log.warning(
                f"{self._kind} connection refused: too many", source=source, of_source=self._count(source)
            )
            return False
        self._transports[transport] = source
        return True

    def _has_room(self, source: str) -> bool:
        return len(self._transports) < self._most and self._count(source) < self._most_of_source

    def _count(self, source: str) -> int:
        return sum(one == source for one in self._transports.values())
