"""Receives a client's directory over fsutil's protocol.

The client lists its files.  The engine requests the files that it does not have from an earlier build, several at once,
in pieces.  All disk work runs in a thread, one batch of pieces at a time.

Source: moby/buildkit, session/filesync; tonistiigi/fsutil, receive.go, send.go.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from skep.aio.race import thread_to_end
from skep.engine.buildkit import buildkit_pb2 as pb
from skep.engine.buildkit.protocol.sessions import BuildSession, Messages, header_values
from skep.engine.buildkit.tree import Contents, KeptTree, Listing, TreeEntry, TreeLimits, write_tree
from skep.errors import InvalidArgument, NotFound, ResourceExhausted, SkepError, Unavailable
from skep.rpc.status import CallFailed, Lost

DIFF_COPY = "/moby.filesync.v1.FileSync/DiffCopy"

_REQUESTED_MAX = 64
"""Number of files requested at once.  Clients read four at once."""
_BATCH_BYTES = 1 << 20
"""Bytes written in one call of a thread, so that its cost does not count."""
_LISTED_AT_ONCE = 256
"""Number of entries received before other tasks run."""
_REFUSE_S = 5.0
"""Seconds to tell the client why its files are refused, before the build fails with the same reason."""


class SyncSelection(msgspec.Struct, frozen=True, kw_only=True):
    """Selection of files in a client's directory."""

    name: str
    """Client's name for the directory: ``context``, ``dockerfile``, or a named context."""
    follow: tuple[str, ...] = ()
    """Only these paths, and the targets of their links."""
    excludes: tuple[str, ...] = ()
    """Patterns of ``.dockerignore``."""

    def headers(self) -> Sequence[tuple[str, str]]:
        """Return the headers of the request to the client."""
        return (
            *header_values("dir-name", [self.name]),
            *header_values("followpaths", self.follow),
            *header_values("exclude-patterns", self.excludes),
        )


async def receive(
    session: BuildSession,
    selection: SyncSelection,
    root: Path,
    limits: TreeLimits,
    *,
    room_bytes: int,
    kept: KeptTree | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Sequence[TreeEntry]:
    """Copy a client's directory into ``root``, which is new and empty.

    Returns the entries, without files that changed while they were sent.

    Args:
        room_bytes: Number of bytes that may be written to the disk.
        progress: Called with the number of bytes received so far.

    Raises: SkepError: the client has no such directory, sent unacceptable data, or disconnected.
    """
    async with session.stream(DIFF_COPY, selection.headers(), silent_s=session.silent_s) as messages:
        transfer = _Transfer(messages, root, limits, room_bytes, progress)
        try:
            return await transfer.run(kept)
        except (InvalidArgument, ResourceExhausted) as error:
            with suppress(CallFailed, Lost, TimeoutError):  # the client may have ended the call already
                async with asyncio.timeout(_REFUSE_S):
                    await messages.send(pb.Packet(type=pb.Packet.ERR, data=str(error).encode()))
            raise
        except OSError as error:
            raise _on_disk(error) from error


def _on_disk(error: OSError) -> SkepError:
    """Translate a disk error.  Connection errors are also OSErrors and are raised unchanged."""
    if isinstance(error, ConnectionError | TimeoutError):
        raise error
    return Unavailable(f"the build context cannot be written: {error.strerror or error}")


class _Transfer:
    """Transfer of one directory."""

    def __init__(
        self,
        messages: Messages,
        root: Path,
        limits: TreeLimits,
        room_bytes: int,
        progress: Callable[[int], None],
    ) -> None:
        self._messages = messages
        self._root = root
        self._limits = limits
        self._room = room_bytes
        self._progress = progress
        self._bytes = 0

    async def run(self, kept: KeptTree | None) -> Sequence[TreeEntry]:
        listing = Listing(self._limits)
        await self._list(listing)
        if listing.bytes > self._room:
            raise ResourceExhausted(f"no space left on device for a build context of {listing.bytes} bytes")
        needed = await thread_to_end(partial(write_tree, self._root, listing.entries, kept))
        contents = Contents(self._root, listing.entries, needed, min(self._limits.bytes, self._room))
        try:
            await self._fetch(contents, deque(needed))
        finally:
            contents.close()
        await self._messages.send(pb.Packet(type=pb.Packet.FIN))
        await self._messages.finish()  # after the client's FIN
        return [entry for entry in listing.entries if entry.path not in contents.changed]

    async def _list(self, listing: Listing) -> None:
        """Receive entries up to the empty one.  Raises: InvalidArgument, ResourceExhausted."""
        while (packet := await self._next()) is not None:
            if packet.type != pb.Packet.STAT:
                raise InvalidArgument("the client sent data before it had listed its files")
            if not packet.HasField("stat"):
                return
            listing.add(packet.stat)
            if len(listing.entries) % _LISTED_AT_ONCE == 0:
                await asyncio.sleep(0)  # buffered data is received without suspending
        raise Unavailable("the client ended the transfer of its files early")

    async def _fetch(self, contents: Contents, waiting: deque[int]) -> None:
        while not contents.is_whole:
            while waiting and len(contents.requested) < _REQUESTED_MAX:
                number = waiting.popleft()
                contents.request(number)
                await self._messages.send(pb.Packet(type=pb.Packet.REQ, id=number))
            batch = await self._batch()
            # Let the thread finish, because the descriptors that it writes to are closed afterwards.
            await thread_to_end(partial(_write_batch, contents, batch))
            self._bytes += sum(len(packet.data) for packet in batch)
            self._progress(self._bytes)

    async def _batch(self) -> Sequence[pb.Packet]:
        """Receive the buffered packets, up to a bound.  Raises: InvalidArgument."""
        batch: list[pb.Packet] = []
        size = 0
        while not batch or (self._messages.has_more and size < _BATCH_BYTES):
            packet = await self._next()
            if packet is None:
                raise Unavailable("the client ended the transfer of its files early")
            if packet.type != pb.Packet.DATA:
                raise InvalidArgument("the client sent a packet that is not file data")
            batch.append(packet)
            size += len(packet.data)
        return batch

    async def _next(self) -> pb.Packet | None:
        data = await self._messages.receive()
        if data is None:
            return None
        packet = pb.Packet.FromString(data)
        if packet.type == pb.Packet.ERR:
            raise NotFound(f"error from sender: {packet.data.decode(errors='replace')}")
        return packet


def _write_batch(contents: Contents, batch: Sequence[pb.Packet]) -> None:
    for packet in batch:
        contents.write(packet.id, packet.data)
