"""A container's output as docker reads it, and the rotation of its files."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from skep.aio.clock import Clock
from skep.aio.failures import Rounds
from skep.aio.race import wait_first
from skep.engine.bundle import Bundles
from skep.engine.container import Container, LogEntry, LogFilter
from skep.engine.log_files import Assembler, Files, compress, rotate
from skep.engine.state import ContainerStore
from skep.errors import Unimplemented
from skep.linux.filewatch import FileWatch
from skep.model.ids import ContainerId

log = structlog.get_logger()

CHECK_S = 1.0
"""Between two checks of sizes; a log may grow past its bound for so long."""
_ROTATION_RETRY_S_MAX = 10.0
"""Of a log that could not be rotated, which grows meanwhile."""
_ENTRIES_AT_ONCE = 512


def of_container(
    container: Container, filter: LogFilter, bundles: Bundles, store: ContainerStore
) -> AsyncGenerator[Sequence[LogEntry], None]:
    """The output of ``container`` in batches, oldest first; with ``follow`` until it has ended, an empty one at its
    present end.

    Raises, at once: Unimplemented: its log driver or its options let it not be read.
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
    """The entries of ``batches``, one at a time."""
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
    """Entries of the log whose newest file is ``current``, some at a time; none: it was read to its present end.

    Args:
        has_ended: whether its writer has ended; what was not ended by a newline is given out then.
        wait_ended: returns when it has; used only to follow.
    """
    source = _Source(current, filter)
    watch = FileWatch(current.parent) if filter.follow else None
    try:
        tail = await asyncio.to_thread(source.start)
        if tail:
            yield tail
        while not source.is_over:
            ended = has_ended()  # evaluated first: what was written before the end is read below
            entries = await asyncio.to_thread(source.next)
            if entries:
                yield entries
            if entries or source.has_more:
                continue
            if watch is None or ended:
                break
            yield ()
            await wait_first(watch.wait_changed(), wait_ended())
        if has_ended() and not source.is_over:
            yield source.finish()
    finally:
        source.close()
        if watch is not None:
            watch.close()


class _Source:
    """Reads and filters; runs in a thread, one call at a time."""

    def __init__(self, current: Path, filter: LogFilter) -> None:
        self._files = Files(current)
        self._assembler = Assembler()
        self._filter = filter
        self.has_more = True
        self.is_over = False

    def start(self) -> list[LogEntry]:
        """With a tail: its entries.  Otherwise nothing: everything comes by ``next``."""
        tail = self._filter.tail
        if tail is None:
            self._files.open_oldest()
            return []
        # Lines of the unwanted stream and pieces count as well in the file, so a first guess may be too short.
        wanted = max(tail, 1)
        while True:
            self._files.open_for_tail(wanted)
            entries, seen = self._read_to_end(tail)
            if len(entries) >= tail or seen < wanted or tail == 0:
                return entries
            self._assembler = Assembler()
            wanted *= 4

    def next(self) -> list[LogEntry]:
        """A bounded number of further entries; empty and ``has_more`` False at the present end."""
        entries: list[LogEntry] = []
        while len(entries) < _ENTRIES_AT_ONCE and not self.is_over:
            lines = self._files.read_lines()
            if not lines:
                self.has_more = False
                return entries
            entries.extend(self._entries(lines))
        self.has_more = not self.is_over
        return entries

    def finish(self) -> list[LogEntry]:
        return [entry for entry in self._assembler.finish() if self._is_wanted(entry)]

    def close(self) -> None:
        self._files.close()
        if self._files.damage:
            log.warning("part of a log is damaged and not shown", reason=self._files.damage)

    def _read_to_end(self, tail: int) -> tuple[list[LogEntry], int]:
        entries: deque[LogEntry] = deque(maxlen=tail)
        seen = 0
        while lines := self._files.read_lines():
            seen += len(lines)
            entries.extend(self._entries(lines))
        return list(entries), seen

    def _entries(self, lines: Sequence[bytes]) -> Iterator[LogEntry]:
        for entry in self._assembler.feed(lines):
            if self._filter.until_ns and entry.timestamp_ns > self._filter.until_ns:
                self.is_over = True
                return
            if self._is_wanted(entry):
                yield entry

    def _is_wanted(self, entry: LogEntry) -> bool:
        return entry.stream in self._filter.streams and entry.timestamp_ns >= self._filter.since_ns


class LogRotation:
    """Rotates the logs of running containers that have a bound.  ``reopen``: has conmon open its log file anew."""

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

    async def run(self) -> None:
        """Check the sizes of all logs every second until cancelled."""
        while True:
            await self._clock.sleep(CHECK_S)
            bounded = [one for one in self._containers() if one.is_running and one.config.log.max_size_bytes]
            await asyncio.to_thread(self._check, bounded)

    def rotate(self, container: Container) -> None:
        """Begin a new file, if the present one has reached its size; compress those before it.  One call at a time."""
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
