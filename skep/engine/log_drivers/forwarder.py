"""Sends the output of one container from its files to its log driver's remote.

One task reads and the other sends, with a bounded buffer between them.  An unreachable remote is retried with growing
pauses.  Meanwhile, messages wait in the log files.  With ``mode=non-blocking``, they wait only in the buffer, which
drops new messages when it is full.  Losses are counted, and reported once at their start and once when the remote is
reachable again.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeVar

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.failures import describe_error
from skep.aio.race import wait_first
from skep.engine.log_drivers.message import LogMessage, LogSink, Undeliverable
from skep.engine.log_drivers.spool import Spool
from skep.engine.logs.log_files import LogPosition
from skep.linux.filewatch import FileWatch

T = TypeVar("T")
Report = Callable[[str, str, int], None]
"""Called with an event, the reason, and a number of lines."""

BUFFER_BYTES = 1 << 20
"""Limit in bytes for messages that were read but not sent.  Further ones stay in the files."""
SAVE_S = 1.0
"""Seconds between two writes of the position.  After a crash, the output of this time may be sent twice."""
_LOOK_S = 1.0
"""Seconds between two counts of the unread files, because rotation may remove them."""
_MESSAGE_BYTES = 100
"""Estimated bytes that a message occupies in addition to its line."""
_RETRY_S, _RETRY_S_MAX = 0.1, 30.0
"""First and longest pause in seconds before a remote is tried again."""


class _Chunk(NamedTuple):
    messages: Sequence[LogMessage]
    size: int
    position: LogPosition | None
    """The position in the log after these messages."""


class _Buffer:
    """Buffer between reading and sending.  With ``drops``, messages that do not fit are dropped instead of waiting."""

    def __init__(self, bytes_max: int, *, drops: bool) -> None:
        self._bytes_max = bytes_max
        self._drops = drops
        self.chunks: deque[_Chunk] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()
        self._is_complete = False
        self.dropped = 0

    async def put(self, messages: Sequence[LogMessage], position: LogPosition | None) -> None:
        size = sum(_size(message) for message in messages)
        if self._drops:
            messages, size = self._fitting(messages)
            if not messages and self.chunks:
                # Keep only the position, because a chunk for each read would be without a limit.
                last = self.chunks[-1]
                self.chunks[-1] = last._replace(position=position or last.position)
                return
        while self.chunks and self._bytes + size > self._bytes_max and not self._drops:
            await self._wait_changed()
        self.chunks.append(_Chunk(messages, size, position))
        self._bytes += size
        self._changed.set()

    async def first(self) -> _Chunk | None:
        """Return the oldest chunk, which stays until ``pop``, or None after the last one."""
        while not self.chunks and not self._is_complete:
            await self._wait_changed()
        return self.chunks[0] if self.chunks else None

    def complete(self) -> None:
        """Mark the end of the messages."""
        self._is_complete = True
        self._changed.set()

    def pop(self) -> None:
        self._bytes -= self.chunks.popleft().size
        self._changed.set()

    @property
    def lines(self) -> int:
        return sum(len(chunk.messages) for chunk in self.chunks)

    def _fitting(self, messages: Sequence[LogMessage]) -> tuple[Sequence[LogMessage], int]:
        kept: list[LogMessage] = []
        size = 0
        for message in messages:
            if (self.chunks or kept) and self._bytes + size + _size(message) > self._bytes_max:
                break
            kept.append(message)
            size += _size(message)
        self.dropped += len(messages) - len(kept)
        return kept, size

    async def _wait_changed(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class Forwarder:
    """Forwards one container's output.  ``run`` ends when the container has ended and everything was sent."""

    def __init__(self, spool: Spool, watch: FileWatch, sink: LogSink, clock: Clock, report: Report) -> None:
        self._spool = spool
        self._watch = watch
        self._sink = sink
        self._clock = clock
        self._report = report
        self._buffer = _Buffer(BUFFER_BYTES, drops=False)
        self._ended = asyncio.Event()
        self._is_open = False
        self._is_away = False
        self._is_held = False
        self._said = 0
        self._refused = 0
        self._saved_at = clock.monotonic()

    def bound(self, bytes_max: int) -> "Forwarder":
        """Use a buffer of ``bytes_max`` that drops messages that do not fit.  Call it before ``run``."""
        self._buffer = _Buffer(bytes_max, drops=True)
        return self

    def end(self) -> None:
        """Record that the container has ended, so that nothing more is written to its files."""
        self._ended.set()

    def hold(self) -> None:
        """Keep the files open and write none, because the container is about to be removed.  Idempotent."""
        if not self._is_held:  # A second call would close the opened files of a removed container.
            self._spool.hold()
            self._is_held = True

    def release(self) -> None:
        """Save the position again, because the container was started before its removal."""
        self._is_held = False

    @property
    def lost(self) -> int:
        """Number of lines that were lost: not sent, and never will be."""
        return self._spool.lost + self._buffer.dropped + self._refused

    async def run(self) -> None:
        """Send until the container has ended and everything was sent.  If cancelled, save the position."""
        last: LogPosition | None = None
        try:
            await self._retry(self._open)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read())
                looking = group.create_task(self._look())
                while (chunk := await self._next()) is not None:
                    await self._deliver(chunk.messages)
                    self._buffer.pop()
                    last = chunk.position or last
                    if last is not None and self._clock.monotonic() - self._saved_at >= SAVE_S:
                        self._save(last)
                looking.cancel()
        finally:
            if last is not None:
                self._save(last)
            if self._is_held:
                self._refused += self._buffer.lines
                with suppress(OSError):
                    self._refused += self._spool.count_rest()
            self._say_lost()
            self._watch.close()
            self._spool.close()
            # A second cancellation would cut off the messages that the sink still holds.
            await asyncio.shield(self._sink.close())

    async def _next(self) -> _Chunk | None:
        """Return the oldest chunk, or None after the last one."""
        chunk = await self._buffer.first()
        if chunk is None and self._is_held:
            # A later run of the removed container: no other forwarder can read its files.
            messages = await self._retry(self._spool.read) or self._spool.finish()
            if messages:
                await self._buffer.put(messages, None)
                chunk = await self._buffer.first()
        return chunk

    async def _read(self) -> None:
        while True:
            has_ended = (
                self._ended.is_set()
            )  # first, so that everything that was written before the end is read below
            messages = await self._retry(self._spool.read)
            if damage := self._spool.take_damage():
                self._report("damaged part of a log not sent", damage, 0)
            if messages:
                await self._buffer.put(messages, self._spool.position)
                await asyncio.sleep(0)
                continue
            if has_ended:
                break
            await wait_first(self._watch.wait_changed(), self._ended.wait())
        if messages := self._spool.finish():
            await self._buffer.put(messages, self._spool.position)
        self._buffer.complete()

    def _open(self) -> None:
        if not self._is_held:
            self._spool.open()

    async def _retry(self, work: Callable[[], T]) -> T:
        """Return the result of ``work``.  Retries after an OSError, since unpacking a file fails on a full disk."""
        backoff = Backoff(_RETRY_S, _RETRY_S_MAX)
        has_failed = False
        while True:
            try:
                return work()
            except OSError as error:
                if not has_failed:
                    has_failed = True
                    self._report("log cannot be read", describe_error(error), 0)
            await backoff.sleep(self._clock)

    async def _look(self) -> None:
        while True:
            await self._clock.sleep(_LOOK_S)
            with suppress(OSError):
                self._spool.look()
            self._say_first_loss()

    async def _deliver(self, messages: Sequence[LogMessage]) -> None:
        """Send ``messages`` until the remote has accepted them."""
        backoff = Backoff(_RETRY_S, _RETRY_S_MAX)
        left = 0
        while True:
            try:
                if not self._is_open:
                    await self._sink.open()
                    self._is_open = True
                start = left
                for message in messages[start:]:
                    await self._send(message)
                    left += self._sink.confirms_each
                await self._sink.flush()
            except OSError as error:
                self._is_open = False
                await self._sink.close()
                if not self._is_away:
                    self._is_away = True
                    self._report("log driver remote unreachable", describe_error(error), 0)
                await backoff.sleep(self._clock)
            else:
                break
        if self._is_away:
            self._is_away = False
            self._report("log driver remote reachable again", "", self.lost - self._said)
            self._said = self.lost

    async def _send(self, message: LogMessage) -> None:
        try:
            await self._sink.send(message)
        except Undeliverable as error:
            if not self._refused:
                self._report("log line not sent", str(error), 1)
                self._said += 1
            self._refused += 1

    def _say_first_loss(self) -> None:
        if self.lost > self._said and self._is_away and not self._said:
            self._say_lost()

    def _say_lost(self) -> None:
        if self.lost > self._said:
            self._report("log lines lost", "the remote accepts none, or too few", self.lost - self._said)
            self._said = self.lost

    def _save(self, position: LogPosition) -> None:
        self._saved_at = self._clock.monotonic()
        if self._is_held:
            return
        with suppress(OSError):
            # The container was removed, or the disk is full, and then lines may be sent twice.
            self._spool.save(position)


def _size(message: LogMessage) -> int:
    return len(message.line) + _MESSAGE_BYTES
