"""Detects a disruption.  So many nodes go down at once that a fault of the network or the leader is more likely.

A restarting switch, or a leader that loses its own network, looks like the failure of most nodes.  Replacing all their
tasks on the few remaining nodes would turn a small fault into a large one.  So replacement of tasks is *frozen* when
one of these numbers of nodes, and at least three, failed within one grace period:

* more than half of the nodes that were ready a minute ago.  It does not matter which managers marked them down: nodes
  spread over the managers, so no manager sees all of them;
* more than half of the nodes that were ready at some time in the last minute, which are all nodes of a new cluster.

A new leader also counts down nodes whose tasks the previous leader has not replaced: that leader may have failed
together with them.

The freeze ends when half of these nodes are ready again, when a user resumes replacement, or after ten minutes.

Nodes that fail at the same moment are marked down one after the other, over one heartbeat period, because each has its
own last heartbeat.  So tasks are not replaced before that period has passed if a second node failed within it, or if
any manager misses heartbeats of another node (managers report these to each other, ``peer_reports``).  The tasks of a
single node are replaced at once.

Kubernetes' node lifecycle controller has the same mechanism (full disruption mode).
"""

from collections import deque
from collections.abc import Iterable
from math import inf

import msgspec

from skep.model.node import Node, NodeState
from skep.model.values.ids import NodeId
from skep.store.interface import Commit, Created, Deleted, Updated

NODES_MIN = 3
"""Smallest number of failed nodes that is a disruption."""
READY_BEFORE_S = 60.0
"""Seconds for which a node counts as ready before the disruption."""
FROZEN_S_MAX = 600.0
"""Maximum seconds of a freeze."""
HOLD_PERIODS = 1.5
"""Number of heartbeat periods within which nodes that fail together are marked down: one period, its jitter, and the
time for writing.
"""


class NodeDown(msgspec.Struct, frozen=True):
    """A node that was marked down."""

    node_id: NodeId
    at: float
    """Time at which the leader noticed it, in seconds on its monotonic clock."""
    with_others: bool = False
    """Whether any manager missed heartbeats of other nodes at that time."""


class Disruption(msgspec.Struct, frozen=True):
    """A disruption that freezes replacement."""

    nodes_down: tuple[NodeId, ...]
    """Sorted by id."""
    ready_before: int
    """Number of nodes that were ready before."""


def disruption_in(
    downs: Iterable[NodeDown],
    ready_before: frozenset[NodeId],
    *,
    now: float,
    grace_s: float,
) -> Disruption | None:
    """Return the disruption of the nodes that were marked down within the last ``grace_s``, or None if these are too
    few.

    Args:
        downs: The nodes that are still down.
        ready_before: The nodes that were ready before.
    """
    nodes_down = {down.node_id for down in downs if down.at > now - grace_s} & ready_before
    if len(nodes_down) >= NODES_MIN and 2 * len(nodes_down) > len(ready_before):
        return Disruption(tuple(sorted(nodes_down)), len(ready_before))
    return None


def held_until(downs: Iterable[NodeDown], *, now: float, period_s: float) -> float:
    """Return the time until which no tasks of down nodes are replaced, so that a disruption can be detected.

    Minus infinity means no delay.

    Args:
        downs: The nodes that are still down.
        period_s: Seconds between heartbeats.
    """
    recent = [down for down in downs if down.at > now - period_s]
    if len(recent) < 2 and not any(down.with_others for down in recent):
        return -inf
    return max(down.at for down in recent) + HOLD_PERIODS * period_s


def is_over(nodes_down: Iterable[NodeId], ready: frozenset[NodeId], known: frozenset[NodeId]) -> bool:
    """Return whether half of ``nodes_down`` are ready again.  Removed nodes do not count."""
    present = [id for id in nodes_down if id in known]
    return 2 * sum(id in ready for id in present) >= len(present)


class NodeHistory:
    """The nodes that were ready in the last minute, in seconds on the leader's monotonic clock.

    The state at the start of the term counts as if it had lasted for a minute.
    """

    def __init__(
        self, nodes: Iterable[Node], lost: Iterable[Node] = (), *, counted_from: float = -inf
    ) -> None:
        """Start from the nodes of a snapshot.

        Args:
            nodes: All nodes.
            lost: Nodes that were marked down before the term and whose tasks are not replaced.
            counted_from: Nodes that are marked down earlier count as marked down then.
        """
        self._counted_from = counted_from
        self.ready: set[NodeId] = {node.id for node in nodes if _is_ready(node)}
        self._downs: dict[NodeId, NodeDown] = {
            node.id: NodeDown(node.id, counted_from, node.silent_together) for node in lost
        }
        self._changes = deque((down.at, down.node_id, False) for down in self._downs.values())
        """Changes of the last minute, oldest first."""
        self._before = self.ready | self._downs.keys()
        """Nodes that were ready before the oldest of these changes."""

    def note(self, commit: Commit, now: float) -> bool:
        """Record ``commit``.  Returns whether it marks a node down."""
        has_down = False
        for event in commit.events:
            match event:
                case Created(Node() as node) if _is_ready(node):
                    self._change(node.id, now, is_ready=True)
                case Updated(Node() as old, Node() as new) if _is_ready(old) != _is_ready(new):
                    self._change(new.id, now, is_ready=_is_ready(new))
                    if new.status.state is NodeState.DOWN:
                        at = max(now, self._counted_from)
                        self._downs[new.id] = NodeDown(new.id, at, new.silent_together)
                        has_down = True
                case Deleted(Node() as node):
                    self._remove(node.id)
        return has_down

    def detect(self, now: float, grace_s: float) -> Disruption | None:
        """Return the current disruption, or None."""
        self._forget(now)
        recent = self.ready.union(id for _, id, _ in self._changes)
        for before in (self._before, recent):
            found = disruption_in(self._downs.values(), frozenset(before), now=now, grace_s=grace_s)
            if found is not None:
                return found
        return None

    def recently_ready(self, now: float) -> frozenset[NodeId]:
        """Return the nodes that were ready at some time in the last minute."""
        self._forget(now)
        return frozenset(self._before.union(self.ready, (id for _, id, _ in self._changes)))

    def held_until(self, now: float, period_s: float) -> float:
        """Return the result of the function ``held_until`` for these nodes."""
        return held_until(self._downs.values(), now=now, period_s=period_s)

    def clear(self) -> None:
        """Forget the nodes that were marked down so far, because they were handled."""
        self._downs.clear()

    def _change(self, id: NodeId, now: float, *, is_ready: bool) -> None:
        self._downs.pop(id, None)
        (self.ready.add if is_ready else self.ready.discard)(id)
        self._changes.append((now, id, is_ready))

    def _remove(self, id: NodeId) -> None:
        self._downs.pop(id, None)
        self.ready.discard(id)
        self._before.discard(id)
        self._changes = deque(change for change in self._changes if change[1] != id)

    def _forget(self, now: float) -> None:
        while self._changes and self._changes[0][0] <= now - READY_BEFORE_S:
            _, id, is_ready = self._changes.popleft()
            (self._before.add if is_ready else self._before.discard)(id)


def _is_ready(node: Node) -> bool:
    """Return whether the node is up.  After a restore, UNKNOWN with a session counts too: such a node may still go
    down.
    """
    return node.status.state is NodeState.READY or (
        node.status.state is NodeState.UNKNOWN and node.session is not None
    )
