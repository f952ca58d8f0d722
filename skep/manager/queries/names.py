"""Looks up host names in queries, in threads that other work of the process does not need.

The C library waits up to half a minute for a name whose servers do not respond, and its call cannot be ended.
"""

import errno
import socket
from collections.abc import Callable
from enum import Enum
from typing import Any, Final

from aiohttp.abc import AbstractResolver, ResolveResult

from skep.aio.blocking import BlockingCalls
from skep.errors import Unavailable

LOOKUP_S: Final = 4.0
"""Time limit in seconds.  A name server responds within one, and the C library asks the next one after five."""
_NAMES_MAX: Final = 1000
"""Most names whose last look-up is remembered."""

LookUp = Callable[[str, int, int], list[Any]]
"""Returns the addresses of host, port and family, as ``socket.getaddrinfo`` does, after any time."""


class _Kind(Enum):
    """Kinds of names, by the end of their last look-up."""

    NEW = 8
    ANSWERED = 16
    SLOW = 4

    @property
    def at_once(self) -> int:
        """Most look-ups at a time.  Slow names have few, and take none of the others."""
        return int(self.value)


class NameLookups(AbstractResolver):
    """Looks up names for aiohttp, with a bound for each kind of name."""

    def __init__(self, look_up: LookUp | None = None, lookup_s: float = LOOKUP_S) -> None:
        self._look_up = look_up or _look_up
        self._lookup_s = lookup_s
        self._calls = {
            kind: BlockingCalls(kind.at_once, busy="names already wait for their name servers")
            for kind in _Kind
        }
        self._kinds: dict[str, _Kind] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of a host.  Raises: OSError."""
        kind = self._kinds.get(host, _Kind.NEW)
        after = _Kind.SLOW  # unless it ends, also if the caller no longer waits for it
        try:
            infos = await self._calls[kind].call(lambda: self._look_up(host, port, family), self._lookup_s)
            after = _Kind.ANSWERED
        except Unavailable as error:
            after = kind
            raise OSError(errno.EAGAIN, f"{error}: try again later") from None
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, f"{host} was not resolved within {self._lookup_s:g} s") from None
        except OSError:
            after = _Kind.NEW
            raise
        finally:
            self._note(host, after)
        return [
            ResolveResult(
                hostname=host,
                host=f"{address[0]}%{address[3]}" if len(address) > 3 and address[3] else str(address[0]),
                port=port,
                family=found,
                proto=protocol,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for found, _, protocol, _, address in infos
        ]

    def _note(self, host: str, kind: _Kind) -> None:
        self._kinds.pop(host, None)
        if kind is not _Kind.NEW:
            self._kinds[host] = kind
        if len(self._kinds) > _NAMES_MAX:
            del self._kinds[next(iter(self._kinds))]

    async def close(self) -> None:
        """Close nothing, because the next connector uses the same look-ups."""


def _look_up(host: str, port: int, family: int) -> list[Any]:
    return socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
