"""Reads a container's output as Docker does, and rotates its log files."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, closing, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import structlog

from skep.aio.clock import Clock, tick
from skep.aio.failures import Rounds
from skep.aio.race import wait_first
from skep.aio.time_slices import SlicedWork
from skep.engine.containers.container import Container, LogEntry, LogFilter
from skep.engine.containers.state import ContainerStore
from skep.engine.logs.log_files import SLICE_BYTES, Assembler, LogReader, compress, rotate
from skep.engine.runtime.bundle import Bundles
from skep.errors import Unimplemented
from skep.linux.filewatch import FileWatch
from skep.model.values.ids import ContainerId

log = structlog.get_logger()

CHECK_S = 1.0
"""Seconds between two checks of the logs' sizes.  For this long, a log may grow past its limit."""
_ROTATION_RETRY_S_MAX = 10.0
"""Longest pause in seconds before a failed rotation is retried.  Meanwhile, the log grows."""
_ENTRIES_AT_ONCE = 512
"""Limit for the entries in one batch."""
_SLICES_AT_ONCE = (4 << 20) // SLICE_BYTES
"""Limit for the slices that are read in one call of a thread, even if few of their entries are selected."""
_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="read-log")
"""Separate threads, because starts and probes need asyncio's threads.

Readers take turns, with one call each at a time.
"""


def of_container(
    container: Container, filter: LogFilter, bundles: Bundles, store: ContainerStore
) -> AsyncGenerator[Sequence[LogEntry], None]:
    """Return the output of ``container`` in batches, oldest first, with ``follow`` until it has ended.

    An empty batch marks the current end, with ``follow`` and ``catches_up``.
    Raises, at once: Unimplemented: its log driver or options do not support reading.
    """
    id, config = container.id, container.config.log
    if not config.is_readable or config.type == "none":
        raise Unimplemented("configured logging driver does not support reading")

    def has_ended() -> bool:
        present = store.lookup(id)
        return present is None or (present.was_started and not present.is_running)

    async def wait_ended() -> None:
        while not has_ended():
            await store.wait_changed(id)

    return read(bundles.log(id), filter, has_ended=has_ended, wait_ended=wait_ended)


async def singly(batches: AsyncGenerator[Sequence[LogEntry], None]) -> AsyncGenerator[LogEntry, None]:
    """Yield the entries of ``batches`` one at a time."""
    async with aclosing(batches):
        async for entries in batches:
            for entry in entries:
                yield entry


async def read(
    current: Path,
    filter: LogFilter,
    *,
    has_ended: Callable[[], bool],
    wait_ended: Callable[[], Coroutine[Any, Any, object]],
) -> AsyncGenerator[Sequence[LogEntry], None]:
    """Yield the entries of the log with the newest file ``current`` in batches.

    An empty batch marks the current end, with ``follow`` and ``catches_up``.

    Args:
        has_ended: Returns whether the writer has ended, so that an unfinished last line is complete.
        wait_ended: Waits until the writer has ended.  Only used with ``follow``.
    """
    source = _Source(current, filter)
    watch = FileWatch(current.parent) if filter.follow else None
    catches_up = filter.catches_up
    try:
        while not source.is_over:
            ended = (
                has_ended()
            )  # before reading, so that everything that was written before the end is read below
            entries = await source.next()
            if entries:
                yield entries
            if entries or source.has_more:
                continue
            if ended or (watch is None and not catches_up):
                break
            yield ()
            if watch is None:
                catches_up = False
                continue
            await wait_first(watch.wait_changed(), wait_ended())
        if has_ended() and not source.is_over:
            yield source.finish()
    finally:
        source.close()
        if watch is not None:
            watch.close()


class _Source:
    """Reads and filters in ``_threads``, one piece at a time, so that readers of large logs take turns."""

    def __init__(self, current: Path, filter: LogFilter) -> None:
        self._files = LogReader(current)
        self._assembler = Assembler()
        self._filter = filter
        self._slices = self._read()
        self._piece: Future[list[LogEntry]] | None = None
        self._is_closed = False
        self.has_more = True
        self.is_over = False

    async def next(self) -> list[LogEntry]:
        """Return the selected entries of the next piece, which may be none.

        At the current end, ``has_more`` becomes False.
        """
        self._piece = _threads.submit(self._read_piece)
        return await asyncio.wrap_future(self._piece)

    def finish(self) -> list[LogEntry]:
        return [entry for entry in self._assembler.finish() if self._is_wanted(entry)]

    def close(self) -> None:
        """Stop reading.  If a thread still reads for a cancelled reader, it closes the files afterwards."""
        self._is_closed = True
        if self._piece is None:
            self._release()
        else:
            self._piece.cancel()  # has an effect if it has not started
            self._piece.add_done_callback(lambda _: self._release())

    def _release(self) -> None:
        self._slices.close()
        self._files.close()
        if self._files.damage:
            log.warning("damaged part of a log not shown", reason=self._files.damage)

    def _read_piece(self) -> list[LogEntry]:
        self.has_more = True
        entries: list[LogEntry] = []
        for wanted in islice(self._slices, _SLICES_AT_ONCE):
            entries += wanted or ()
            if len(entries) >= _ENTRIES_AT_ONCE or not self.has_more or self._is_closed:
                break
        return entries

    def _read(self) -> Generator[Sequence[LogEntry] | None, None, None]:
        """Yield the selected entries, slice by slice.  Continues past the current end when iterated again."""
        skipped = 0
        if self._filter.tail is None:
            yield from self._files.open_oldest()
        else:
            skipped = yield from self._open_tail(self._filter.tail)
        while not self.is_over:
            lines = yield from self._files.read_lines()
            self.has_more = bool(lines)
            entries, self.is_over = self._wanted(lines)
            yield entries[skipped:]
            skipped = max(skipped - len(entries), 0)

    def _open_tail(self, tail: int) -> SlicedWork[int]:
        """Open at or before the last ``tail`` entries.  Return the number of entries to skip.

        Entries are first counted and then read again, because keeping the last ones in memory could need any amount of
        it.
        """
        # The file also has lines of the other stream and pieces of lines, so the first guess may be too short.
        lines = max(tail, 1)
        while True:
            has_so_many = yield from self._files.open_for_tail(lines)
            with closing(self._files.copy()) as ahead:
                found = yield from self._count(ahead)
            if found >= tail or not has_so_many:
                return max(found - tail, 0)
            lines *= 4

    def _count(self, files: LogReader) -> SlicedWork[int]:
        """Count the selected entries from the position of ``files`` on."""
        found, is_over = 0, False
        while not is_over and (lines := (yield from files.read_lines())):
            entries, is_over = self._wanted(lines)
            found += len(entries)
            yield
        self._assembler = Assembler()
        return found

    def _wanted(self, lines: Sequence[bytes]) -> tuple[list[LogEntry], bool]:
        """Return the selected entries that end with ``lines``, and whether all later ones are past the filter."""
        wanted: list[LogEntry] = []
        for entry in self._assembler.feed(lines):
            if self._filter.until_ns and entry.timestamp_ns > self._filter.until_ns:
                return wanted, True
            if self._is_wanted(entry):
                wanted.append(entry)
        return wanted, False

    def _is_wanted(self, entry: LogEntry) -> bool:
        return entry.stream in self._filter.streams and entry.timestamp_ns >= self._filter.since_ns


class LogRotation:
    """Rotates the logs of running containers that have a size limit.  ``reopen`` makes conmon reopen its log file."""

    def __init__(
        self,
        bundles: Bundles,
        reopen: Callable[[ContainerId], None],
        clock: Clock,
        containers: Callable[[], Iterable[Container]],
    ) -> None:
        self._bundles = bundles
        self._reopen = reopen
        self._clock = clock
        self._containers = containers
        self._rotations = Rounds("log not rotated", clock, longest_s=_ROTATION_RETRY_S_MAX)
        self._compressions = Rounds("rotated log not compressed", clock)
        self._is_active = False
        """Whether any log was checked in the last round, so that the next round must forget the retries of ended
        containers.
        """

    async def run(self) -> None:
        """Check the sizes of all logs every second until cancelled."""
        while True:
            await tick(self._clock, CHECK_S)
            bounded = [one for one in self._containers() if one.is_running and one.config.log.max_size_bytes]
            if bounded or self._is_active:
                await asyncio.to_thread(self._check, bounded)
            self._is_active = bool(bounded)

    def rotate(self, container: Container) -> None:
        """Start a new file if the current one has reached its size, and compress older ones.  One call at a time."""
        id, config, current = container.id, container.config.log, self._bundles.log(container.id)
        begin = partial(rotate, current, config, partial(self._reopen, id))
        self._rotations.attempt(id, partial(_unless_removed, begin), container=id)
        if config.compress:
            pack = partial(compress, current)
            self._compressions.attempt(id, partial(_unless_removed, pack), container=id)

    def _check(self, containers: Sequence[Container]) -> None:
        ids = {one.id for one in containers}
        self._rotations.keep(ids)
        self._compressions.keep(ids)
        for container in containers:
            self.rotate(container)


def _unless_removed(work: Callable[[], object]) -> None:
    with suppress(FileNotFoundError):
        work()
