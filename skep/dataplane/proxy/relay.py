"""Relays the published ports that the kernel cannot forward to tasks (``relays.py``), in the net process.

The wanted relays are in a file.  A change of the file applies to new connections, and open connections continue.  A
relay serves on the socket that holds its port (``ports.Reservations``).  A port that is not held is not relayed.
"""

import asyncio
import socket
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from pathlib import Path

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.failures import describe_error
from skep.dataplane.net_process.protocol import Reservation
from skep.dataplane.proxy.relays import RelayPort
from skep.dataplane.proxy.tcp import TcpRelay
from skep.dataplane.proxy.udp import UdpRelay
from skep.errors import Unavailable
from skep.linux.descriptors import set_aside
from skep.linux.filewatch import FileWatch

log = structlog.get_logger()

_FIRST_RETRY_S, _RETRY_S_MAX = 0.05, 30.0
"""First and longest delay in seconds between attempts to listen at a port, for instance until another program releases
it.
"""

_ANY_IPV4 = "0.0.0.0"
_Key = tuple[str, str, int]


class ConnectionRelays:
    """All relays of one node.

    Args:
        plan: The file with the wanted relays.  A missing file means no relays.  Its folder must not contain other
            files.
        held: Returns the sockets of the mesh's ports, which the caller still owns.
        in_namespace: Calls a function in the node's own network namespace, where sockets that it opens stay.
    """

    def __init__(
        self,
        plan: Path,
        clock: Clock,
        rng: Callable[[], float],
        held: Callable[[], Iterable[tuple[Reservation, socket.socket]]],
        in_namespace: Callable[[Callable[[], socket.socket]], socket.socket] = lambda call: call(),
    ) -> None:
        self._plan = plan
        self._planned: tuple[RelayPort, ...] = ()
        self._clock = clock
        self._rng = rng
        self._held = held
        self._in_namespace = in_namespace
        self.open_relays: dict[_Key, TcpRelay | UdpRelay] = {}
        self._refused: set[_Key] = set()
        self._is_unread = False
        """Whether the plan could not be read the last time."""

    async def run(self) -> None:
        """Serve until cancelled.  Open connections then end."""
        self._plan.parent.mkdir(parents=True, exist_ok=True)
        backoff = Backoff(_FIRST_RETRY_S, _RETRY_S_MAX, rng=self._rng)
        try:
            while True:
                try:
                    with closing(FileWatch(self._plan.parent)) as watch:
                        await self._apply_changes(watch, backoff)
                except OSError as error:
                    log.warning("relays not watched", reason=str(error))
                    await self.apply()
                    await backoff.sleep(self._clock)
        finally:
            for relay in self.open_relays.values():
                relay.close(ends_connections=True)

    def end(self, protocol: str, port: int, address: str) -> None:
        """Stop relaying a port whose socket is released.  Its open connections continue."""
        relay = self.open_relays.pop((protocol, address or _ANY_IPV4, port), None)
        if relay is not None:
            relay.close()

    async def _apply_changes(self, watch: FileWatch, backoff: Backoff) -> None:
        while True:
            await self.apply()
            if not self._refused and not self._is_unread:
                backoff.reset()
                await watch.wait_changed()
                continue
            with suppress(TimeoutError):  # retry, because by then the port may be free and the plan readable
                async with asyncio.timeout(backoff.next_delay_s()):
                    await watch.wait_changed()

    async def apply(self) -> None:
        wanted = {(one.protocol, one.address, one.port): one for one in self._read()}
        for key in self.open_relays.keys() - wanted.keys():
            self.open_relays.pop(key).close()
        refused = set()
        for key, port in wanted.items():
            try:
                if (relay := self.open_relays.get(key)) is not None:
                    relay.update(port)
                else:
                    self.open_relays[key] = await self._open_relay(port)
            except Exception as error:  # one port's error does not affect others
                refused.add(key)
                if key not in self._refused:
                    log.warning("port is not relayed", port=key, reason=describe_error(error))
        self._refused = refused

    async def _open_relay(self, port: RelayPort) -> TcpRelay | UdpRelay:
        """Return a relay on a duplicate of the socket that holds ``port``.  Raises: Unavailable: no socket holds it."""
        own = self._holder_of(port)
        listener = set_aside(own.dup())
        listener.setblocking(False)
        if port.protocol == "udp":
            return UdpRelay(port, listener, self._clock, self._rng, self._in_namespace)
        relay = TcpRelay(port, self._rng, self._in_namespace)
        await relay.open(listener)
        if not any(one is own for _, one in self._held()):  # released meanwhile, and ``end`` found no relay
            relay.close()
            raise Unavailable("the socket that held it was released")
        return relay

    def _holder_of(self, port: RelayPort) -> socket.socket:
        wanted = (port.protocol, port.port, "" if port.address == _ANY_IPV4 else port.address)
        for one, own in self._held():
            if (one.protocol, one.port, one.address) == wanted:
                return own
        raise Unavailable("no socket holds it")

    def _read(self) -> tuple[RelayPort, ...]:
        """Return the wanted relays.  While the file cannot be read, return the previous ones."""
        self._is_unread = False
        try:
            self._planned = msgspec.json.decode(self._plan.read_bytes(), type=tuple[RelayPort, ...])
        except FileNotFoundError:
            self._planned = ()
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            self._is_unread = True
            log.warning("relays cannot be read", file=str(self._plan), reason=describe_error(error))
        return self._planned
