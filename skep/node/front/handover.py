"""Passes clients' connections to the manager process, and takes them back (`skep.api.http.handover`)."""

import asyncio
import mmap
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.api.access.identity import packed, unpacked
from skep.api.http.handover import SLOTS, Channel, ExchangeState, HandoverMessage, MessageKind, unpack_slots
from skep.errors import Unavailable
from skep.model.permissions.access import Identity

_CONNECT_WAIT_S = 5.0
"""Seconds for which a connection waits for a starting manager."""
_WAITING_MAX = 256
"""Limit for the connections that wait for a manager."""
_QUEUED_MAX = 256
"""Limit for the packets that queue while a manager process does not read."""
_FIRST_RETRY_S = 0.02
"""Seconds before the manager is tried again for the first time."""
_RETRY_S_MAX = 0.5
"""Longest pause in seconds between two attempts."""
_NO_MANAGER = (
    "This node is not a swarm manager. Manager is being prepared or has trouble connecting to the cluster."
)
ENDED = "the manager of this node ended before it answered: ask again"


class Passed(msgspec.Struct, frozen=True):
    """A client's connection.

    Args:
        is_remote: Whether the client is on another machine, so that its idle times are limited.
        identity: The client, or None for the permissions of a Unix socket.
    """

    socket: socket.socket
    is_remote: bool
    identity: Identity | None = None


class Returned(msgspec.Struct, frozen=True):
    """A connection that the manager process no longer serves.

    Args:
        data: The part of its next request that the manager process has already read.
        refusal: Why the request in progress gets no response, or empty if no request is in progress.
    """

    connection: Passed
    data: bytes = b""
    refusal: str = ""


class Handover:
    """The connections that the manager process currently serves.

    While the manager process restarts, up to 256 connections wait for it, each for up to 5 s.

    Args:
        path: Socket of the manager process.
        why_waiting: Returns what a starting manager process waits for, or an empty text if unknown.
        queued_max: Limit for the messages that wait for a manager process.
    """

    def __init__(
        self,
        path: Path,
        clock: Clock,
        rng: Callable[[], float],
        why_waiting: Callable[[], str] = str,
        queued_max: int = _QUEUED_MAX,
    ) -> None:
        self._path = path
        self._clock = clock
        self._rng = rng
        self._why_waiting = why_waiting
        self._queued_max = queued_max
        self.returned: asyncio.Queue[Returned] = asyncio.Queue()
        """Connections that the owner must take and serve."""
        self._managers: list[_Manager] = []
        """The manager processes, the newest last.

        A process that stops may still serve connections while the next one already accepts new ones.
        """
        self._waiting = 0

    @property
    def local_count(self) -> int:
        """Number of connections of clients on this machine that the manager processes have."""
        return sum(manager.local_count for manager in self._managers)

    @property
    def is_ready(self) -> bool:
        """Whether a connection can be passed now."""
        manager = self._manager()
        return manager is not None and manager.has_room

    async def wait_manager(self) -> None:
        """Wait until connections can be passed to a manager process.  Raises: Unavailable: there was none for 5 s."""
        if self._manager() is not None:
            return
        if self._waiting >= _WAITING_MAX:
            raise Unavailable("too many requests wait for the manager of this node: try again later")
        self._waiting += 1
        try:
            async with asyncio.timeout(_CONNECT_WAIT_S):
                backoff = Backoff(_FIRST_RETRY_S, _RETRY_S_MAX, rng=self._rng)
                while not self._connect():
                    await backoff.sleep(self._clock)
        except TimeoutError as error:
            raise Unavailable(self._why_waiting() or _NO_MANAGER) from error
        finally:
            self._waiting -= 1

    def pass_on(self, connection: Passed, data: bytes) -> None:
        """Pass ``connection`` with the start of a request to the manager process.  This object owns it from now on.

        Raises: Unavailable: the manager process accepts none, and ``connection`` is closed.
        """
        manager = self._manager()
        try:
            if manager is None:
                raise Unavailable(_NO_MANAGER)
            manager.pass_on(connection, data)
        except Unavailable:
            connection.socket.close()
            raise

    def close(self) -> None:
        """Close all connections that were passed."""
        for manager in tuple(self._managers):
            manager.channel.close()
            for held in manager.passed.values():
                _end(held.socket)
        self._managers.clear()

    def _manager(self) -> "_Manager | None":
        """Return the manager process that currently accepts connections, or None."""
        newest = self._managers[-1] if self._managers else None
        return newest if newest is not None and not newest.is_stopping else None

    def _connect(self) -> bool:
        if self._manager() is not None:
            return True
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connected.setblocking(False)
            connected.connect(str(self._path))
        except OSError:
            connected.close()
            return False
        self._managers.append(_Manager(connected, self.returned, self._managers.remove, self._queued_max))
        return True


class _Manager:
    """One manager process, and its connections."""

    def __init__(
        self,
        connected: socket.socket,
        returned: asyncio.Queue[Returned],
        on_end: "Callable[[_Manager], None]",
        queued_max: int,
    ) -> None:
        self._queued_max = queued_max
        self._returned = returned
        self._on_end = on_end
        self._free: list[int] = []
        self._never_used = 0
        """The lowest slot that was never used."""
        self.passed: dict[int, Passed] = {}
        """The connections by slot."""
        self.local_count = 0
        self.is_stopping = False
        table = os.memfd_create("skep-connections", os.MFD_CLOEXEC)
        os.ftruncate(table, SLOTS)
        self._states = mmap.mmap(table, SLOTS)
        self.channel = Channel(connected, self._receive, self._settle)
        self.channel.send(HandoverMessage(kind=MessageKind.STATES, descriptor=table))

    def pass_on(self, connection: Passed, data: bytes) -> None:
        """Pass a connection.  Raises: Unavailable."""
        if not self.has_room:
            raise Unavailable("the manager of this node accepts no more connections: try again later")
        try:
            descriptor = os.dup(connection.socket.fileno())
        except OSError as error:
            raise Unavailable(
                f"the connection cannot be passed to the manager of this node: {error}"
            ) from error
        slot = self._take_slot()
        self._states[slot] = ExchangeState.REQUESTED
        self.passed[slot] = connection
        self.local_count += not connection.is_remote
        self.channel.send(
            HandoverMessage(
                kind=MessageKind.CONNECTION,
                slot=slot,
                data=data,
                descriptor=descriptor,
                is_remote=connection.is_remote,
                identity=packed(connection.identity) if connection.identity is not None else b"",
            )
        )

    @property
    def has_room(self) -> bool:
        return len(self.passed) < SLOTS and self.channel.queued < self._queued_max

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        self._never_used += 1
        return self._never_used - 1

    def _receive(self, message: HandoverMessage) -> None:
        match message.kind:
            case MessageKind.STOPPING:
                self.is_stopping = True
            case MessageKind.CLOSED:
                for slot in unpack_slots(message.data):
                    self._closed(slot)
            case MessageKind.CONNECTION:
                held = self._release(message.slot)
                if message.descriptor is not None:
                    if held is not None:
                        held.socket.close()
                    identity = unpacked(message.identity) if message.identity else None
                    held = Passed(socket.socket(fileno=message.descriptor), message.is_remote, identity)
                if held is not None:
                    self._returned.put_nowait(Returned(held, message.data))

    def _closed(self, slot: int) -> None:
        held = self._release(slot)
        if held is None:
            return
        if self._states[slot] == ExchangeState.REQUESTED:
            # No response was sent, and the client may still wait for one.
            self._returned.put_nowait(Returned(held, refusal=ENDED))
        else:
            held.socket.close()

    def _release(self, slot: int) -> Passed | None:
        held = self.passed.pop(slot, None)
        if held is not None:
            self._free.append(slot)
            self.local_count -= not held.is_remote
        return held

    def _settle(self) -> None:
        """Take back the connections of an ended manager process.  Those in the middle of a response are closed."""
        self._on_end(self)
        for slot, held in self.passed.items():
            match self._states[slot]:
                case ExchangeState.IDLE:
                    self._returned.put_nowait(Returned(held))
                case ExchangeState.REQUESTED:
                    self._returned.put_nowait(Returned(held, refusal=ENDED))
                case _:
                    _end(held.socket)
        self.passed.clear()


def _end(connection: socket.socket) -> None:
    """Close ``connection`` for every process that has it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
