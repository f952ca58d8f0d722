"""Messages of log drivers: lines, and pieces of lines longer than 16 KiB."""

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from skep.engine.containers.container import LogEntry, StandardStream


class Partial(NamedTuple):
    """Identifies a piece of a line.

    All pieces of the line have the same ``id``, and ``ordinal`` counts them from 1.
    """

    id: str
    ordinal: int
    last: bool


class LogMessage(NamedTuple):
    """A line without its newline, or a piece of one."""

    timestamp_ns: int
    stream: StandardStream
    line: bytes
    partial: Partial | None = None

    @property
    def source(self) -> str:
        """Name of the stream."""
        return "stderr" if self.stream is StandardStream.STDERR else "stdout"


class Pieces:
    """Assigns ids to the pieces of a line.  As in Docker, all pieces have the time of the first."""

    def __init__(self) -> None:
        self._begun: dict[StandardStream, LogMessage] = {}

    def messages(self, entries: Iterable[LogEntry]) -> Iterator[LogMessage]:
        """Yield a message for each entry."""
        for moment, stream, data in entries:
            is_last = data.endswith(b"\n")
            begun = self._begun.pop(stream, None) if self._begun else None
            line = data[:-1] if is_last else data
            if begun is None and is_last:
                yield LogMessage(moment, stream, line)
                continue
            if begun is None or begun.partial is None:
                partial = Partial(os.urandom(32).hex(), 1, is_last)
            else:
                moment = begun.timestamp_ns
                partial = Partial(begun.partial.id, begun.partial.ordinal + 1, is_last)
            message = LogMessage(moment, stream, line, partial)
            if not is_last:
                self._begun[stream] = message._replace(line=b"")
            yield message


class Undeliverable(Exception):
    """A message that the remote can never take."""


class LogSink(Protocol):
    """A connection that sends one container's messages to a remote.

    ``open`` and ``send`` raise OSError (including TimeoutError) if the remote is unreachable, hangs or refuses.
    """

    confirms_each: bool
    """Whether a message is delivered once ``send`` has returned, so that it is not sent again after a later error."""

    async def open(self) -> None:
        """Connect."""

    async def send(self, message: LogMessage) -> None:
        """Send a message, or queue it for ``flush``.  Raises: Undeliverable; OSError."""

    async def flush(self) -> None:
        """Wait until the remote has accepted everything, if the protocol reports that.  Raises: OSError."""

    async def close(self) -> None:
        """Disconnect.  Does not raise."""


def text_of(data: bytes) -> str:
    """Decode bytes like Go: each byte that is not UTF-8 becomes a replacement character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode(errors="surrogateescape").translate(_REPLACED)


_REPLACED = dict.fromkeys(range(0xDC80, 0xDD00), "\ufffd")
