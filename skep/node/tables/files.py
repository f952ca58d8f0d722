"""Tables as files: on the disk for the next start, on tmpfs for the net process.

A file is replaced in one step, and named after its network.  What cannot be read is told and dropped: the managers
say it again.  On tmpfs the tables of the node's own bridge networks lie beside them (``network/local/places.py``),
which are none of the managers'.
"""

import asyncio
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.aio.trees import discard_tree_now
from skep.linux.files import replace_file
from skep.model.ids import NetworkId
from skep.model.tables import Table
from skep.node.network.local.objects import is_local
from skep.node.revisions import Revision
from skep.node.tables.silence import whole

T = TypeVar("T")

log = structlog.get_logger(__name__)

WRITE_PAUSE_S = 1.0
"""Between two writes to the disk: a busy network changes more often than a disk should be written."""


class Kept(msgspec.Struct, frozen=True):
    """A table on the disk, with the life of the cluster that its revision is of."""

    incarnation: int
    table: Table


class SharedTables:
    """The tables on tmpfs, each a ``Table`` in MessagePack.  A listener of the keeper."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._is_swept = False

    def load(self) -> Mapping[NetworkId, Table]:
        """What an earlier process of this node had in force when it ended; nothing after a reboot."""
        if not self._directory.is_dir():
            return {}
        paths = (path for path in sorted(self._directory.iterdir()) if not is_local(path.name))
        found = ((path, _read(path, _decode_table)) for path in paths)
        return {table.head.id: whole(table) for path, table in found if table and _is_named(path, table)}

    async def apply(self, tables: Mapping[NetworkId, Table], changed: frozenset[NetworkId]) -> None:
        """Write what changed, remove what is gone; the first time also what an earlier process left."""
        await asyncio.to_thread(self._write, tables, changed)

    def _write(self, tables: Mapping[NetworkId, Table], changed: frozenset[NetworkId]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        if not self._is_swept:
            found = {path.name for path in self._directory.iterdir() if not is_local(path.name)}
            changed |= {NetworkId(name) for name in found} - tables.keys()
            self._is_swept = True
        for id in sorted(changed):
            table = tables.get(id)
            if table is None:
                (self._directory / id).unlink(missing_ok=True)
            else:
                replace_file(self._directory / id, msgspec.msgpack.encode(table), is_durable=False)


class StoredTables:
    """The tables on the disk."""

    def __init__(self, directory: Path | None, clock: Clock) -> None:
        """``directory``: None keeps nothing."""
        self._directory = directory
        self._clock = clock
        self._dirty: dict[NetworkId, Kept | None] = {}
        self._is_dirty = asyncio.Event()
        self._flushing = asyncio.Lock()
        self._writing = threading.Lock()
        self._has_ended = False
        """No thread that is late writes over what was written last."""

    def load(self) -> tuple[Mapping[NetworkId, Table], Revision]:
        """What was kept, and the newest revision among it."""
        tables: dict[NetworkId, Table] = {}
        newest = Revision()
        for path in sorted(self._directory.iterdir()) if self._directory and self._directory.is_dir() else ():
            kept = _read(path, _decode_kept)
            if kept is not None and _is_named(path, kept.table):
                tables[kept.table.head.id] = kept.table
                newest = max(newest, Revision(kept.incarnation, kept.table.revision))
        return tables, newest

    def note(self, id: NetworkId, table: Table | None, incarnation: int) -> None:
        """Have ``table`` written soon; None: have it removed."""
        self._dirty[id] = Kept(incarnation, table) if table is not None else None
        self._is_dirty.set()

    async def run(self) -> None:
        """Write until cancelled, and once more then."""
        if self._directory is None:
            await asyncio.Event().wait()
        try:
            while True:
                await self._is_dirty.wait()
                await self.flush()
                await self._clock.sleep(WRITE_PAUSE_S)
        finally:
            with self._writing:
                self._write(self._dirty)
                self._has_ended = True

    async def flush(self) -> None:
        """Write now what is to be written; returns when it is, and when nothing else is being written."""
        async with self._flushing:
            self._is_dirty.clear()
            batch, self._dirty = self._dirty, {}
            if not batch or self._directory is None:
                return
            try:
                await asyncio.to_thread(self._write_unless_ended, batch)
            except asyncio.CancelledError:
                self._dirty = {**batch, **self._dirty}  # the thread may have written it or not
                raise

    def _write_unless_ended(self, batch: Mapping[NetworkId, Kept | None]) -> None:
        with self._writing:
            if not self._has_ended:
                self._write(batch)

    def _write(self, batch: Mapping[NetworkId, Kept | None]) -> None:
        assert self._directory is not None, "nothing is written without a directory"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            for id, kept in batch.items():
                if kept is None:
                    (self._directory / id).unlink(missing_ok=True)
                else:
                    replace_file(self._directory / id, msgspec.msgpack.encode(kept))
        except OSError as error:
            # They are in force, and in the next process's tables once a manager has been heard.
            log.warning("network tables not kept", path=str(self._directory), error=str(error))


def _read(path: Path, decode: Callable[[bytes], T]) -> T | None:
    """What a file says; None: nothing that can be read, and it is gone."""
    try:
        return decode(path.read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        _drop(path, str(error))
        return None


def _is_named(path: Path, table: Table) -> bool:
    """Whether the file is that of the table's network; if not, it is gone."""
    if table.head.id == path.name:
        return True
    _drop(path, f"it is the table of network {table.head.id!r}")
    return False


def _drop(path: Path, reason: str) -> None:
    log.warning("network table cannot be read: dropped", path=str(path), error=reason)
    discard_tree_now(path)  # it may be anything


_decode_kept = msgspec.msgpack.Decoder(Kept).decode
_decode_table = msgspec.msgpack.Decoder(Table).decode
