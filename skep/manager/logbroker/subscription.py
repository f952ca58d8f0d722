"""One reader of logs: the nodes it waits for, and a bounded buffer between them and the reader.

A node that sends faster than the reader reads waits (its stream is not read, HTTP/2 does the rest), so a slow
reader costs a buffer and nothing else.
"""

import asyncio
from collections import deque

from skep.model.ids import NodeId
from skep.model.logs import LogLine, LogQuery

LINES_MAX = 1000


class Subscription:
    """A query under way.  ``id``: what nodes know it by."""

    def __init__(self, id: str, query: LogQuery, only: frozenset[NodeId] | None = None) -> None:
        """``only``: the nodes to ask, for a reader at another manager that asks the others elsewhere."""
        self.id = id
        self.query = query
        self.only = only
        self.asked: set[NodeId] = set()
        """Nodes that were told of it."""
        self.pending: set[NodeId] = set()
        """Nodes that still have lines to send."""
        self.reasons: list[str] = []
        """Why lines are missing."""
        self.ended: deque[tuple[NodeId, str]] = deque()
        """Nodes that have sent everything or will not, each with the reason; bounded by the nodes asked."""
        self.seen_ns: dict[NodeId, int] = {}
        """Stamp of each node's latest line: where a node goes on that had to connect again."""
        self.is_closed = False
        self._lines: deque[LogLine] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()

    async def put(self, line: LogLine) -> bool:
        """Add a line, waiting for room; False: the reader has gone."""
        while len(self._lines) >= LINES_MAX and not self.is_closed:
            self._room.clear()
            await self._room.wait()
        if self.is_closed:
            return False
        self._lines.append(line)
        self.seen_ns[line.node_id] = line.timestamp_ns
        self._news.set()
        return True

    def finish(self, node_id: NodeId, reason: str = "") -> None:
        """A node has sent everything, or (``reason``) will not."""
        self.pending.discard(node_id)
        if self.only is not None:
            self.ended.append((node_id, reason))
        if reason:
            self.reasons.append(reason)
        self._news.set()

    def close(self) -> None:
        """The reader has gone."""
        self.is_closed = True
        self._lines.clear()
        self._room.set()

    @property
    def is_complete(self) -> bool:
        """Whether no more lines will come."""
        return not self.query.follow and not self.pending

    def take(self) -> LogLine | None:
        """The next line, if there is one."""
        if not self._lines:
            return None
        line = self._lines.popleft()
        self._room.set()
        return line

    async def wait_news(self) -> None:
        """Wait for a line, or for a node to finish."""
        await self._news.wait()
        self._news.clear()

    def take_many(self, most: int) -> list[LogLine]:
        """The next lines, as many as there are, up to ``most``."""
        lines: list[LogLine] = []
        while len(lines) < most and (line := self.take()) is not None:
            lines.append(line)
        return lines
