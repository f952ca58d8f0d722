"""The storm guard: when so many nodes go down at once that the judge is more likely wrong than they.

A switch that restarts, or a leader whose own network goes, looks like the death of most nodes.  Replacing all their
tasks on the few that are left would make a small trouble a large one.  So replacement is *frozen* when

* within one grace period more than half of the nodes that were ready a minute ago, and at least three, went down,
  whichever managers said so: nodes spread over the managers, so no single one of them sees the whole of it.

It goes on when half of them are back, when a user says so, or after ten minutes.

Nodes that go at one moment fall one after the other, over a heartbeat's period, since each is waited for from its own
last heartbeat.  So a fall that is not the only one is not answered before that period has passed: when a second node
fell within it, or when the manager that says so misses heartbeats of others as well.  A single node's is, at once.
"""

from collections import deque
from collections.abc import Iterable
from math import inf

import msgspec

from skep.model.ids import NodeId
from skep.model.node import Node, NodeState
from skep.store.interface import Commit, Created, Deleted, Updated

NODES_MIN = 3
READY_BEFORE_S = 60.0
FROZEN_S_MAX = 600.0
HOLD_PERIODS = 1.5
"""All nodes that went at one moment fall within one period, its jitter, and what writing that takes."""


class NodeDown(msgspec.Struct, frozen=True):
    """A node went down."""

    node_id: NodeId
    at: float
    """When the leader saw it, on its own clock."""
    is_together: bool = False
    """Whether the manager that said so had missed heartbeats of others, too."""


class Disruption(msgspec.Struct, frozen=True):
    """Replacement is to be frozen."""

    fallen: tuple[NodeId, ...]
    """Sorted."""
    ready_before: int
    """How many nodes were ready a minute ago."""


def disruption_in(
    falls: Iterable[NodeDown],
    ready_before: frozenset[NodeId],
    *,
    now: float,
    grace_s: float,
) -> Disruption | None:
    """Whether what fell within the last ``grace_s`` is a storm.

    Args:
        falls: of nodes that are still down.
        ready_before: the nodes that were ready a minute ago.
    """
    fallen = {fall.node_id for fall in falls if fall.at > now - grace_s} & ready_before
    if len(fallen) >= NODES_MIN and 2 * len(fallen) > len(ready_before):
        return Disruption(tuple(sorted(fallen)), len(ready_before))
    return None


def held_until(falls: Iterable[NodeDown], *, now: float, period_s: float) -> float:
    """Until when nothing of a node that is down is replaced, so that the rest of a storm can show; or minus infinity.

    Args:
        falls: of nodes that are still down.
        period_s: between heartbeats.
    """
    recent = [fall for fall in falls if fall.at > now - period_s]
    if len(recent) < 2 and not any(fall.is_together for fall in recent):
        return -inf
    return max(fall.at for fall in recent) + HOLD_PERIODS * period_s


def is_over(fallen: Iterable[NodeId], ready: frozenset[NodeId], known: frozenset[NodeId]) -> bool:
    """Whether half of the ``fallen`` nodes are back.  Those that were removed count neither way."""
    present = [id for id in fallen if id in known]
    return 2 * sum(id in ready for id in present) >= len(present)


class NodeHistory:
    """Which nodes were ready when, for as long as it matters; in seconds on the leader's monotonic clock.

    What was before the leader began counts as having been so for long.
    """

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.ready: set[NodeId] = {node.id for node in nodes if _is_ready(node)}
        self._changes: deque[tuple[float, NodeId, bool]] = deque()
        """Changes of the last minute, oldest first."""
        self._before = set(self.ready)
        """Who was ready before the oldest of these."""
        self._falls: dict[NodeId, NodeDown] = {}

    def note(self, commit: Commit, now: float) -> bool:
        """Take in ``commit``; whether a node went down in it."""
        has_fall = False
        for event in commit.events:
            match event:
                case Created(Node() as node) if _is_ready(node):
                    self._change(node.id, now, is_ready=True)
                case Updated(Node() as old, Node() as new) if _is_ready(old) != _is_ready(new):
                    self._change(new.id, now, is_ready=_is_ready(new))
                    if new.status.state is NodeState.DOWN:
                        self._falls[new.id] = NodeDown(new.id, now, new.silent_together)
                        has_fall = True
                case Deleted(Node() as node):
                    self._change(node.id, now, is_ready=False)
                    self._before.discard(node.id)
        return has_fall

    def trip(self, now: float, grace_s: float) -> Disruption | None:
        """Whether the present falls are a storm."""
        self._forget(now)
        return disruption_in(self._falls.values(), frozenset(self._before), now=now, grace_s=grace_s)

    def held_until(self, now: float, period_s: float) -> float:
        """See ``held_until``."""
        return held_until(self._falls.values(), now=now, period_s=period_s)

    def clear(self) -> None:
        """What fell until now was dealt with."""
        self._falls.clear()

    def _change(self, id: NodeId, now: float, *, is_ready: bool) -> None:
        self._falls.pop(id, None)
        (self.ready.add if is_ready else self.ready.discard)(id)
        self._changes.append((now, id, is_ready))

    def _forget(self, now: float) -> None:
        while self._changes and self._changes[0][0] <= now - READY_BEFORE_S:
            _, id, is_ready = self._changes.popleft()
            (self._before.add if is_ready else self._before.discard)(id)


def _is_ready(node: Node) -> bool:
    """A node that had a session, and of which nothing is known since a restore, has not fallen yet, and may."""
    return node.status.state is NodeState.READY or (
        node.status.state is NodeState.UNKNOWN and node.session is not None
    )
