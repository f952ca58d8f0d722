"""Network tables as files: on disk for the next start, on tmpfs for the net process.

A file is named after its network and replaced atomically.  A file that cannot be decoded is logged and removed, and the
managers send the table again.  A file that cannot be read at present stays and is read again soon.  The tables of the
node's own bridge networks are in the same tmpfs directory (``dataplane/local/endpoints.py``).
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.aio.failures import log_error, retry
from skep.aio.trees import discard_tree_now
from skep.dataplane.local.objects import is_local
from skep.dataplane.tables.unreachable import restored
from skep.linux.files import is_no_file, replace_file
from skep.model.networks.tables import NetworkTable
from skep.model.node_reports.revisions import Revision
from skep.model.values.ids import NetworkId, NodeId

T = TypeVar("T")

log = structlog.get_logger(__name__)

WRITE_PAUSE_S = 1.0
"""Seconds between two writes to disk, so that a busy network does not keep the disk busy."""


Refresh = Callable[[Iterable[NetworkId]], Awaitable[None]]
"""Makes the net process reload these tables.  Raises: SkepError."""


class StoredTable(msgspec.Struct, frozen=True):
    """A table on disk.  Its revision belongs to this ``incarnation`` of the cluster's store."""

    incarnation: int
    table: NetworkTable


class SharedTables:
    """The tables on tmpfs, each a ``NetworkTable`` in MessagePack.  A listener of ``NetworkTables``.

    ``refresh`` makes the net process reload and apply tables.  It is None without a net process.
    """

    def __init__(self, directory: Path, refresh: Refresh | None = None) -> None:
        self._directory = directory
        self._refresh = refresh
        self._is_swept = False
        self.has_unread = False
        """Whether the last ``load`` left out a file that may be readable later."""

    def load(self) -> Mapping[NetworkId, NetworkTable]:
        """Return the tables that an earlier process of this node had applied.  Empty after a reboot."""
        tables, self.has_unread = _load_all(self._directory, _decode_table, _itself)
        return {table.head.id: restored(table) for table in tables}

    async def apply(
        self, node_id: NodeId, tables: Mapping[NetworkId, NetworkTable], changed: frozenset[NetworkId]
    ) -> None:
        """Write changed tables and remove deleted ones.  The first call also removes leftovers of an earlier process.

        Returns when the net process has applied the files as written by this call.
        Raises: OSError: some files were not written, and the net process has applied the others; SkepError.
        """
        failure: OSError | None = None
        try:
            await asyncio.to_thread(self._write, tables, changed)
        except OSError as error:
            failure = error
        if self._refresh is not None:
            await self._refresh(changed)
        if failure is not None:
            raise failure

    def _write(self, tables: Mapping[NetworkId, NetworkTable], changed: frozenset[NetworkId]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        if not self._is_swept:
            found = {path.name for path in self._directory.iterdir() if not is_local(path.name)}
            changed |= {NetworkId(name) for name in found} - tables.keys()
        failure: OSError | None = None
        for id in sorted(changed):
            table = tables.get(id)
            try:
                if table is None:
                    (self._directory / id).unlink(missing_ok=True)
                else:
                    replace_file(self._directory / id, msgspec.msgpack.encode(table), is_durable=False)
            except OSError as error:  # there may be enough space for the others
                failure = error
        if failure is not None:
            raise failure
        self._is_swept = True


class StoredTables:
    """The tables on disk."""

    def __init__(self, directory: Path | None, clock: Clock) -> None:
        """Make the store.  With ``directory`` None, nothing is saved."""
        self._directory = directory
        self._clock = clock
        self._dirty: dict[NetworkId, StoredTable | None] = {}
        self._is_dirty = asyncio.Event()
        self._flushing = asyncio.Lock()
        self._writing = threading.Lock()
        self._has_ended = False
        """Set when ``run`` ends, because a late thread must not overwrite the last write."""
        self.has_unread = False
        """Whether the last ``load`` left out a file that may be readable later."""

    def load(self) -> tuple[Mapping[NetworkId, NetworkTable], Revision]:
        """Return the saved tables and their newest revision."""
        if self._directory is None:
            return {}, Revision()
        found, self.has_unread = _load_all(self._directory, _decode_kept, lambda kept: kept.table)
        newest = max((Revision(one.incarnation, one.table.revision) for one in found), default=Revision())
        return {one.table.head.id: one.table for one in found}, newest

    def schedule(self, id: NetworkId, table: NetworkTable | None, incarnation: int) -> None:
        """Write ``table`` soon, or remove its file if None."""
        self._dirty[id] = StoredTable(incarnation, table) if table is not None else None
        self._is_dirty.set()

    async def run(self) -> None:
        """Write until cancelled, and once more on cancellation.  Failed writes are retried."""
        if self._directory is None:
            await asyncio.Event().wait()
        self._has_ended = False
        try:
            while True:
                await self._is_dirty.wait()
                await retry(self.flush, "network tables not saved", clock=self._clock, first_s=WRITE_PAUSE_S)
                await self._clock.sleep(WRITE_PAUSE_S)
        finally:
            with self._writing:
                try:
                    self._write(self._dirty)
                except OSError as error:
                    log_error(error, "network tables not saved", path=str(self._directory))
                self._has_ended = True

    async def flush(self) -> None:
        """Write all scheduled tables now.  Returns once no write is in progress.

        Raises: OSError: some tables were not written.  They stay scheduled.
        """
        async with self._flushing:
            self._is_dirty.clear()
            batch, self._dirty = self._dirty, {}
            if not batch or self._directory is None:
                return
            try:
                await asyncio.to_thread(self._write_unless_ended, batch)
            except BaseException:
                self._dirty = {**batch, **self._dirty}  # it is unknown whether the thread has written them
                raise

    def _write_unless_ended(self, batch: Mapping[NetworkId, StoredTable | None]) -> None:
        with self._writing:
            if not self._has_ended:
                self._write(batch)

    def _write(self, batch: Mapping[NetworkId, StoredTable | None]) -> None:
        assert self._directory is not None, "nothing is written without a directory"
        self._directory.mkdir(parents=True, exist_ok=True)
        for id, kept in batch.items():
            if kept is None:
                (self._directory / id).unlink(missing_ok=True)
            else:
                replace_file(self._directory / id, msgspec.msgpack.encode(kept))


def _load_all(
    directory: Path, decode: Callable[[bytes], T], table_of: Callable[[T], NetworkTable]
) -> tuple[Sequence[T], bool]:
    """Return the decoded files, and whether some cannot be read at present.  Other files are removed."""
    found, has_unread = [], False
    try:
        paths = sorted(directory.iterdir())
    except OSError as error:
        return (), not is_no_file(error)
    for path in paths:
        if is_local(path.name):
            continue
        try:
            one = decode(path.read_bytes())
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and not is_no_file(error):
                log_error(error, "network table not read", path=str(path))
                has_unread = True
            else:
                _drop(path, str(error))
            continue
        if table_of(one).head.id == path.name:
            found.append(one)
        else:
            _drop(path, f"it has the table of network {table_of(one).head.id!r}")
    return found, has_unread


def _itself(table: NetworkTable) -> NetworkTable:
    return table


def _drop(path: Path, reason: str) -> None:
    log.warning("network table file removed", path=str(path), error=reason)
    discard_tree_now(path)  # it may be a directory


_decode_kept = msgspec.msgpack.Decoder(StoredTable).decode
_decode_table = msgspec.msgpack.Decoder(NetworkTable).decode
