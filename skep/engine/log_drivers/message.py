"""What log drivers send: lines, and pieces of lines that were longer than 16 KiB."""

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from skep.engine.container import LogEntry, Stream


class Partial(NamedTuple):
    """Which piece of a line: ``id`` is the line's, ``ordinal`` counts from 1."""

    id: str
    ordinal: int
    last: bool


class Message(NamedTuple):
    """A line without its newline, or a piece of one."""

    timestamp_ns: int
    stream: Stream
    line: bytes
    partial: Partial | None = None

    @property
    def source(self) -> str:
        """The stream's name."""
        return "stderr" if self.stream is Stream.STDERR else "stdout"


class Pieces:
    """Finds the pieces of one line; all of them have the time of the first, as in Docker."""

    def __init__(self) -> None:
        self._begun: dict[Stream, Message] = {}

    def messages(self, entries: Iterable[LogEntry]) -> Iterator[Message]:
        """One for each entry."""
        for moment, stream, data in entries:
            is_last = data.endswith(b"\n")
            begun = self._begun.pop(stream, None) if self._begun else None
            line = data[:-1] if is_last else data
            if begun is None and is_last:
                yield Message(moment, stream, line)
                continue
            if begun is None or begun.partial is None:
                partial = Partial(os.urandom(32).hex(), 1, is_last)
            else:
                moment = begun.timestamp_ns
                partial = Partial(begun.partial.id, begun.partial.ordinal + 1, is_last)
            message = Message(moment, stream, line, partial)
            if not is_last:
                self._begun[stream] = message._replace(line=b"")
            yield message


class Undeliverable(Exception):
    """A message that the remote can never take."""


class Sink(Protocol):
    """A connection to what takes the messages of one container.

    ``open`` and ``send`` raise OSError (TimeoutError is one): the remote is away, hangs or refuses.
    """

    confirms_each: bool
    """Whether a message that ``send`` has returned for need not be sent again after an error."""

    async def open(self) -> None:
        """Connect."""

    async def send(self, message: Message) -> None:
        """Send, or add to what ``flush`` sends.  Raises: Undeliverable; OSError."""

    async def flush(self) -> None:
        """Return when the remote has taken everything, as far as its protocol says so.  Raises: OSError."""

    async def close(self) -> None:
        """Disconnect.  Raises nothing."""


def text_of(data: bytes) -> str:
    """As Go shows bytes that are no UTF-8: a replacement character for each."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode(errors="surrogateescape").translate(_REPLACED)


_REPLACED = dict.fromkeys(range(0xDC80, 0xDD00), "\ufffd")
