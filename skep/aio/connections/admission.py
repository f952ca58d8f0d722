"""Limits of open connections, per listener and per source address."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import Generic, TypeVar

import structlog

log = structlog.get_logger()

T = TypeVar("T")


class Newcomers(Generic[T]):
    """Limits the connections of one listener whose peers have not yet proved an identity.

    A full listener closes an old connection instead of refusing the new one: the oldest connection of the source
    address that has most.  A peer with an identity therefore gets in even while strangers hold every slot, because it
    needs its slot only for a moment.

    Args:
        kind: Name for these connections in the log.
        most: Maximum number of connections.
        most_of_source: Maximum number of connections per source address.
        end: Closes a connection.
        may_leave: Returns whether a connection may be closed for a new one.  By default all may.
    """

    def __init__(
        self,
        kind: str,
        most: int,
        most_of_source: int,
        end: Callable[[T], object],
        *,
        may_leave: Callable[[T], bool] = lambda _: True,
    ) -> None:
        self._kind = kind
        self._most = most
        self._most_of_source = most_of_source
        self._end = end
        self._may_leave = may_leave
        self._sources: dict[T, str] = {}
        """Oldest first."""
        self._is_flooded = False

    def __len__(self) -> int:
        return len(self._sources)

    def __iter__(self) -> Iterator[T]:
        return iter(tuple(self._sources))

    def __contains__(self, one: T) -> bool:
        return one in self._sources

    def admit(self, new: T, source: str) -> bool:
        """Count a new connection, and close another one if there are too many.

        Returns: False if there are too many and none of them may be closed.
        """
        shares = Counter(self._sources.values())
        has_its_share = shares[source] >= self._most_of_source
        if has_its_share or len(self._sources) >= self._most:
            spare = [
                one
                for one, of in self._sources.items()
                if self._may_leave(one) and (of == source or not has_its_share)
            ]
            self._note_flood(source if has_its_share else shares.most_common(1)[0][0])
            if not spare:
                return False
            leaving = max(
                spare, key=lambda one: shares[self._sources[one]]
            )  # max returns the first of equals, which is the oldest
            self.forget(leaving)
            self._end(leaving)
        self._sources[new] = source
        return True

    def renew(self, one: T) -> None:
        """Make a connection the youngest one."""
        self._sources[one] = self._sources.pop(one)

    def forget(self, one: T) -> None:
        """Stop counting a connection, because it has ended or its peer has proved an identity."""
        self._sources.pop(one, None)
        self._is_flooded = self._is_flooded and bool(self._sources)

    def _note_flood(self, source: str) -> None:
        """Log the first of a series of excess connections."""
        if not self._is_flooded:
            log.warning(f"too many {self._kind} at one time", most=self._most, most_from=source)
        self._is_flooded = True


def admit_transport(newcomers: Newcomers[asyncio.Transport], transport: asyncio.Transport) -> bool:
    """Call ``Newcomers.admit`` for a listener that does not report closed connections.  Forgets them first."""
    for known in newcomers:
        if known.is_closing():
            newcomers.forget(known)
    return newcomers.admit(transport, peer_source(transport))


class Admission:
    """Limits the open connections of one kind, whichever process serves them.  ``kind`` is their name in the log."""

    def __init__(self, kind: str, most: int, most_of_source: int) -> None:
        self._kind = kind
        self._most = most
        self._most_of_source = most_of_source
        self._transports: dict[asyncio.Transport, str] = {}

    def admit(self, transport: asyncio.Transport) -> bool:
        """Count a new connection.  Return False if its source or the listener has too many connections."""
        source = peer_source(transport)
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


def source_of(address: str) -> str:
    """Return the source by which connections are counted: an IPv4 address, or the first 64 bits of an IPv6 address."""
    if ":" not in address:
        return address
    try:
        packed = ip_address(address.partition("%")[0]).packed
    except ValueError:
        return address
    return packed[:8].hex()


def peer_source(transport: asyncio.BaseTransport) -> str:
    """Return the source address of a connection; empty if it has none."""
    peer = transport.get_extra_info("peername")
    return source_of(str(peer[0])) if peer else ""
