"""One reader of logs: the nodes it waits for, and a bounded buffer between them and the reader.

A node that sends faster than the reader reads has to wait (its stream is not read, so HTTP/2's flow control stops
it): a slow reader costs only a buffer.
"""

import asyncio
from collections import deque
from collections.abc import Iterable

import msgspec

from skep.aio.backoff import Backoff
from skep.model.ids import NodeId, TaskId
from skep.model.logs import LogLine, LogQuery
from skep.model.times import SECOND_NS

LINES_MAX = 1000
BEHIND_NS_MAX = 600 * SECOND_NS
"""How far one task's lines may be behind another's of the same node so that both can be resumed."""


class Subscription:
    """A running query.  ``id``: its name at the nodes."""

    def __init__(
        self, id: str, query: LogQuery, only: frozenset[NodeId] | None = None, *, opened_ns: int = 0
    ) -> None:
        """``only``: the nodes to request, for a reader at another manager that requests the others elsewhere.

        ``opened_ns``: when the reader began, Unix time.
        """
        self.id = id
        self.query = query
        self.only = only
        self.sources: dict[NodeId, object | None] = {}
        """Source of each node's logs; None: there was none, or its stream broke."""
        self.backoff = Backoff(0.5, 30.0)
        """Before relays are requested again."""
        self.pending: set[NodeId] = set()
        """Nodes that still have lines to send."""
        self.reasons: list[str] = []
        """Why lines are missing."""
        self.silent: set[NodeId] = set()
        """Nodes that gave no lines, or not all, and whose kept lines the reader has not got yet."""
        self.ended: deque[tuple[NodeId, str]] = deque()
        """Nodes that have sent everything or will not, with the reason; bounded by the number of nodes."""
        self._opened_ns = opened_ns
        self._started: set[NodeId] = set()
        self._seen_ns: dict[NodeId, dict[TaskId, int]] = {}
        self._floors_ns: dict[NodeId, dict[TaskId, int]] = {}
        self.is_closed = False
        self._lines: deque[LogLine] = deque()
        self._updated = asyncio.Event()
        self._room = asyncio.Event()

    async def put(self, lines: Iterable[LogLine]) -> bool:
        """Add lines, waiting for room before the first; repeated ones are dropped.  False: the reader has gone."""
        while len(self._lines) >= LINES_MAX and not self.is_closed:
            self._room.clear()
            await self._room.wait()
        if self.is_closed:
            return False
        for line in lines:
            floors_ns = self._floors_ns.get(line.node_id)
            if not floors_ns or line.timestamp_ns > floors_ns.get(line.task_id, -1):
                self._lines.append(line)
                self._see(line)
        self._updated.set()
        return True

    def finish(self, node_id: NodeId, reason: str = "") -> None:
        """A node has sent everything, or (``reason``) will not.  Followers continue to wait."""
        self.pending.discard(node_id)
        if reason:
            self.silent.add(node_id)
        if self.query.follow:
            return  # the node is requested again when it is back
        if self.only is not None:
            self.ended.append((node_id, reason))
        if reason:
            self.reasons.append(reason)
        self._updated.set()

    def start_source(self, node_id: NodeId) -> None:
        """The node is sent the ``remaining`` query: earlier lines that it repeats are dropped."""
        self._started.add(node_id)
        self.pending.add(node_id)
        self._floors_ns[node_id] = dict(self._seen_ns.get(node_id, {}))

    def is_resumed(self, node_id: NodeId) -> bool:
        """Whether only the rest is requested of the node."""
        return node_id in self._started and (node_id in self._seen_ns or self.query.tail == 0)

    def remaining(self, nodes: Iterable[NodeId]) -> LogQuery:
        """The query without what these nodes have sent already; all of them are resumed, or none is."""
        since = [self._resume_ns(node_id) for node_id in nodes if self.is_resumed(node_id)]
        if not since:
            return self.query
        return msgspec.structs.replace(self.query, since_ns=max(min(since), self.query.since_ns), tail=None)

    def close(self) -> None:
        """The reader has closed its end."""
        self.is_closed = True
        self._lines.clear()
        self._room.set()

    @property
    def is_complete(self) -> bool:
        """Whether no more lines will come."""
        return not self.query.follow and not self.pending

    def take_silent(self) -> frozenset[NodeId]:
        """Nodes that do not answer and have sent nothing; each is given once."""
        found = frozenset(self.silent - self._seen_ns.keys())
        self.silent.clear()
        return found

    async def wait_update(self) -> None:
        """Wait for a line, or for a node to finish."""
        await self._updated.wait()
        self._updated.clear()

    def take_many(self, most: int) -> list[LogLine]:
        """The next lines, at most ``most``."""
        lines = [self._lines.popleft() for _ in range(min(most, len(self._lines)))]
        if lines:
            self._room.set()
        return lines

    def _resume_ns(self, node_id: NodeId) -> int:
        seen = self._seen_ns.get(node_id, {}).values()
        if not seen:
            return self._opened_ns
        return max(min(seen), max(seen) - BEHIND_NS_MAX)

    def _see(self, line: LogLine) -> None:
        seen = self._seen_ns.get(line.node_id)
        if seen is None:
            seen = self._seen_ns[line.node_id] = {}
        if line.task_id not in seen:  # a long-running reader sees many tasks: drop those without recent lines
            old_ns = line.timestamp_ns - BEHIND_NS_MAX
            for task_id in [id for id, stamp_ns in seen.items() if stamp_ns < old_ns]:
                del seen[task_id]
        seen[line.task_id] = line.timestamp_ns
