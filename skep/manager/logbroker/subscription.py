"""One reader of logs, with the nodes that it waits for and a bounded buffer of their lines.

Existing lines of all nodes are merged in the order of their times.  A follower then gets new lines as they are written.
If a node sends faster than the reader reads, its stream is not read, so HTTP/2's flow control makes it wait.  A slow
reader therefore costs only a buffer.
"""

from collections.abc import Hashable, Iterable
from operator import attrgetter

import msgspec

from skep.aio.backoff import Backoff
from skep.aio.merging import MergeQueue
from skep.model.logs import LogLine, LogQuery
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.times import SECOND_NS

LINES_MAX = 1000
"""Maximum number of lines that wait for one reader."""
BEHIND_NS_MAX = 600 * SECOND_NS
"""Largest lag between two tasks of a node, in nanoseconds, at which both can be resumed without gaps."""


class LogLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Waiting times of a reader for nodes, in seconds."""

    hold_s: float = 1.0
    """Lines wait as long for a node that sends nothing, so that lines stay in order."""
    silent_s: float = 5.0
    """A follower gets a line about a node that has not responded for as long."""
    return_s: float = 3.0
    """A node that no manager has is missing after that long.  Until then it may be on its way to another manager."""
    response_s: float = 10.0
    """A node that is silent for as long is reported as missing, unless lines that it has sent are still unread."""


LIMITS = LogLimits()


class LogSubscription:
    """A running query.  ``id`` identifies it on the nodes."""

    def __init__(
        self,
        id: str,
        query: LogQuery,
        only: frozenset[NodeId] | None = None,
        *,
        opened_ns: int = 0,
        limits: LogLimits = LIMITS,
    ) -> None:
        """Create a subscription.

        Args:
            only: Nodes to request, for a reader at another manager that requests the others elsewhere.
            opened_ns: Unix time at which the reader started.
        """
        self.id = id
        self.query = query
        self.only = only
        self.sources: dict[NodeId, object | None] = {}
        """Source of each node's logs, or None without a source or after its stream broke."""
        self.backoff = Backoff(0.5, 30.0)
        """Delay before relays are requested again."""
        self.pending: set[NodeId] = set()
        """Nodes that still have lines to send."""
        self.reasons: list[str] = []
        """Reasons why lines are missing."""
        self.silent: set[NodeId] = set()
        """Nodes that do not answer, or have not sent everything, and were not named yet."""
        self._silent_since: dict[NodeId, float] = {}
        self._returning_since: dict[NodeId, float] = {}
        self._ended: dict[NodeId, str] = {}
        """Nodes that have sent everything or will not, with the reason."""
        self._opened_ns = opened_ns
        self._limits = limits
        self._started: set[NodeId] = set()
        self._seen_ns: dict[NodeId, dict[TaskId, int]] = {}
        self._floors_ns: dict[NodeId, dict[TaskId, int]] = {}
        self._lines: MergeQueue[LogLine] = MergeQueue(attrgetter("timestamp_ns"), LINES_MAX)
        self._streams: dict[NodeId, Hashable] = {}
        """The stream with the lines of each unfinished node.  It is the stream of the node or of its manager."""
        self._holding_since: float | None = None
        self._is_present_reached = False

    async def put(self, lines: Iterable[LogLine], stream: Hashable) -> bool:
        """Add lines, after waiting for space before the first.  Repeated lines are dropped.

        Returns False if the reader has closed its end.
        """
        if not await self._lines.wait_room(stream):
            return False
        new = list[LogLine]()
        for line in lines:
            floors_ns = self._floors_ns.get(line.node_id)
            if not floors_ns or line.timestamp_ns > floors_ns.get(line.task_id, -1):
                new.append(line)
                self._see(line)
                self.silent.discard(line.node_id)
        self._lines.add(stream, new)
        return True

    def finish(self, node_id: NodeId, reason: str = "") -> None:
        """Record that a node has sent everything or, with ``reason``, will not.  Followers continue to wait."""
        self.pending.discard(node_id)
        self._returning_since.pop(node_id, None)
        self._end_stream(node_id)
        if reason:
            self.silent.add(node_id)
        if self.query.follow:
            return  # a follower requests the node again when it reconnects
        if self.only is not None:
            self._ended[node_id] = reason
        if reason:
            self.reasons.append(reason)
        self._lines.wake()

    def await_return(self, node_id: NodeId, now: float) -> None:
        """Record that no manager has the node at ``now`` (monotonic seconds).  It is pending for ``return_s``."""
        self.pending.add(node_id)
        self._returning_since.setdefault(node_id, now)

    def is_returning(self, node_id: NodeId) -> bool:
        """Return whether no manager has had the node yet."""
        return node_id in self._returning_since

    def missing(self, now: float) -> list[NodeId]:
        """Return the nodes that no manager has had for ``return_s`` at ``now`` (monotonic seconds)."""
        return sorted(
            node_id
            for node_id, since in self._returning_since.items()
            if now >= since + self._limits.return_s
        )

    def until_missing_s(self, now: float) -> float | None:
        """Return the seconds until ``missing`` may return a node, or None."""
        since = self._returning_since.values()
        return max(0.0, min(since) + self._limits.return_s - now) if since else None

    def start_source(self, node_id: NodeId, stream: Hashable) -> None:
        """Record that the node was sent the ``remaining`` query.  Earlier lines that it repeats are dropped."""
        self._returning_since.pop(node_id, None)
        self._started.add(node_id)
        self.silent.discard(node_id)
        if not self._is_present_reached:
            self._streams[node_id] = stream
            self._lines.open(stream)
        self.pending.add(node_id)
        self._floors_ns[node_id] = dict(self._seen_ns.get(node_id, {}))

    def is_resumed(self, node_id: NodeId) -> bool:
        """Return whether only the rest is requested from the node."""
        return node_id in self._started and (node_id in self._seen_ns or self.query.tail == 0)

    def remaining(self, nodes: Iterable[NodeId]) -> LogQuery:
        """Return the query without the lines that these nodes have already sent.  Either all or none of them are
        resumed.
        """
        since = [self._resume_ns(node_id) for node_id in nodes if self.is_resumed(node_id)]
        if not since:
            return self.query
        return msgspec.structs.replace(self.query, since_ns=max(min(since), self.query.since_ns), tail=None)

    def close(self) -> None:
        """Record that the reader has closed its end."""
        self._lines.close()

    def reach_present(self, stream: Hashable) -> None:
        """Record that a followed stream has delivered all existing lines and now delivers new ones as they
        are written.
        """
        if self.query.follow:
            for node_id in [node_id for node_id, own in self._streams.items() if own == stream]:
                self._end_stream(node_id)

    def take_present(self) -> bool:
        """Return whether all streams of a follower have reached the present.  True only once."""
        if not self.query.follow or self._is_present_reached or self._lines.is_waiting:
            return False
        self._is_present_reached = True
        return True

    def hold_s(self, now: float) -> float | None:
        """Return how long lines still wait for nodes that send none, or None if none waits.  ``now`` is in monotonic
        seconds.
        """
        if not self._lines.is_holding:
            self._holding_since = None
            return None
        if self._holding_since is None:
            self._holding_since = now
        return max(0.0, self._holding_since + self._limits.hold_s - now)

    def pass_over(self) -> None:
        """Release lines without waiting for the nodes that send none."""
        silent = self._lines.pass_over()
        if self.query.follow:
            for stream in silent:
                self._lines.end(stream)

    @property
    def is_closed(self) -> bool:
        """Whether the reader has closed its end."""
        return self._lines.is_closed

    @property
    def is_complete(self) -> bool:
        """Whether all lines have arrived."""
        return not self.query.follow and not self.pending

    def has_sent(self, node_id: NodeId) -> bool:
        """Return whether lines of the node have arrived."""
        return node_id in self._seen_ns

    def lose(self, node_id: NodeId) -> None:
        """Record that a follower's node is down.  Its stream may continue later."""
        self.silent.add(node_id)
        self._lines.wake()

    def take_silent(self) -> frozenset[NodeId]:
        """Return nodes that do not answer.  Each is returned once."""
        found = frozenset(self.silent)
        self.silent.clear()
        return found

    def take_long_silent(self, now: float) -> frozenset[NodeId]:
        """Return nodes that have not answered a follower for ``silent_s``, each once.  ``now`` is in
        monotonic seconds.
        """
        self._silent_since = {node_id: self._silent_since.get(node_id, now) for node_id in self.silent}
        found = {
            node_id for node_id, since in self._silent_since.items() if now >= since + self._limits.silent_s
        }
        self.silent -= found
        return frozenset(found)

    def until_named_s(self, now: float) -> float | None:
        """Return the seconds until ``take_long_silent`` may return a node, or None."""
        since = [since for node_id, since in self._silent_since.items() if node_id in self.silent]
        return max(0.0, min(since) + self._limits.silent_s - now) if since else None

    async def wait_update(self) -> None:
        """Wait for a line, or for a node to finish."""
        await self._lines.wait_update()

    def take_many(self, most: int) -> list[LogLine]:
        """Return the next lines, at most ``most``."""
        return self._lines.take(most)

    def take_ended(self) -> list[tuple[NodeId, str]]:
        """Return the ended nodes whose lines were all taken, with the reason, each once.

        Call it when ``take_many`` returns nothing.  Lines of an ended node may still wait for another node's lines.
        """
        found = [(node_id, why) for node_id, why in self._ended.items() if not self._lines.has_items(node_id)]
        for node_id, _ in found:
            del self._ended[node_id]
        return found

    def _end_stream(self, node_id: NodeId) -> None:
        """Forget a node's stream.  End the stream, unless it also delivers the lines of other nodes."""
        stream = self._streams.pop(node_id, None)
        if stream is not None and stream not in self._streams.values():
            self._lines.end(stream)

    def _resume_ns(self, node_id: NodeId) -> int:
        seen = self._seen_ns.get(node_id, {}).values()
        if not seen:
            return self._opened_ns
        return max(min(seen), max(seen) - BEHIND_NS_MAX)

    def _see(self, line: LogLine) -> None:
        seen = self._seen_ns.get(line.node_id)
        if seen is None:
            seen = self._seen_ns[line.node_id] = {}
        if line.task_id not in seen:
            # A long-running reader sees many tasks, so drop those without recent lines.
            old_ns = line.timestamp_ns - BEHIND_NS_MAX
            for task_id in [id for id, stamp_ns in seen.items() if stamp_ns < old_ns]:
                del seen[task_id]
        seen[line.task_id] = line.timestamp_ns
