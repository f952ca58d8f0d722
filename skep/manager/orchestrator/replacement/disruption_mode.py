"""Disruption mode: freezes the replacement of tasks while too many nodes are down, and ends the freeze.

Replacement is frozen as soon as a disruption is detected, even before the freeze is written to the cluster object,
because the commit that completes the disruption would also cause the replacements.
"""

import asyncio
from collections.abc import Callable, Collection, Iterator

import structlog
from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.aio.race import is_set_within
from skep.errors import SkepError
from skep.manager.nodes.heartbeats import configured_grace_s, configured_heartbeats
from skep.manager.orchestrator.replacement.disconnection import policy_on, replaced_at
from skep.manager.orchestrator.replacement.disruption import FROZEN_S_MAX, Disruption, NodeHistory, is_over
from skep.model.node import Availability, Node, NodeState
from skep.model.service import Service
from skep.model.swarm import Freeze, Swarm
from skep.model.task import Task
from skep.model.values.ids import NodeId
from skep.model.values.times import Timestamp, timestamp
from skep.store.interface import Commit, LoopStore, NotLeader, Transaction, View

log = structlog.get_logger()

CHECK_S = 0.5
"""Seconds between checks during a disruption: whether the freeze must be ended, or written again after a failure."""
HALF_BACK = "half of the nodes are back"
SETTLING_GRACES = 2
"""Heartbeat grace periods for which the other half of the nodes is awaited at the end of a freeze.  Nodes register
within seconds once the network works again.
"""


class DisruptionMode:
    """Freezes replacement during a disruption.  Runs on the leader only."""

    def __init__(self, term: LoopStore, clock: Clock, changed: Callable[[], None]) -> None:
        """Create a mode that calls ``changed`` when a freeze ends."""
        self._term = term
        self._clock = clock
        self._changed = changed
        self._history = NodeHistory(())
        self._detected: Disruption | None = None
        """A disruption that is not yet written to the cluster object."""
        self._has_begun = asyncio.Event()
        """Set when a disruption begins, so that nothing is checked before."""
        self._frozen_at: float | None = None
        """Time at which this leader first saw the current freeze."""
        self.replaces_from = float("-inf")
        """Tasks of down nodes are not replaced before this time.

        Set when several nodes failed and more may follow, and when half of the nodes are back and the others are
        expected.
        """
        self._delayed_since = float("-inf")
        self._counted_from = float("-inf")

    @property
    def is_frozen(self) -> bool:
        """Whether tasks of down nodes keep their slots."""
        return self._detected is not None or self._frozen_at is not None

    def start(self, view: View) -> None:
        """Start from a snapshot."""
        now, nodes, grace_s = self._clock.monotonic(), view.find(Node), configured_grace_s(view)
        # The previous leader may have failed together with nodes. Nodes that had their session with it are marked down
        # a grace period later than others, so all nodes that go down until then count as one event.
        self._counted_from = now + grace_s
        lost = [node for node in nodes if _has_tasks_to_replace(node, view)]
        self._history = NodeHistory(nodes, lost, counted_from=self._counted_from)
        self._detected = None
        self._frozen_at = now if _freeze(view) is not None else None
        if self.is_frozen:
            self._has_begun.set()
        if lost:
            self._detect(now)
            self._delay_replacement(now)

    def note(self, commit: Commit) -> None:
        """Record a commit.  Freeze or resume replacement if the commit requires it."""
        now = self._clock.monotonic()
        if self._history.note(commit, now):
            self._detect(now)
            self._delay_replacement(now)
        is_written = _freeze(self._term.view()) is not None
        if is_written and self._frozen_at is None:
            self._frozen_at, self._detected = now, None
            self._has_begun.set()
        elif not is_written and self._frozen_at is not None:
            self._end()

    async def run(self) -> None:
        """Write freezes, and end them when due, until cancelled."""
        while True:
            if self.is_frozen:
                await is_set_within(self._has_begun, CHECK_S)
            else:
                await self._has_begun.wait()
            self._has_begun.clear()
            try:
                await self.check()
            except NotLeader:
                raise
            except SkepError as error:
                log.warning("freeze not written, will retry", reason=str(error))

    async def check(self) -> None:
        """Write a freeze that began, or end the freeze if that is due.  Raises: SkepError."""
        now = self._clock.monotonic()
        if self._detected is not None:
            recent = self._history.recently_ready(now)
            await self._term.update(_write, self._detected, recent, timestamp(self._clock.now_ns()))
        elif self._frozen_at is not None and (reason := self._reason_to_end(now)):
            if reason == HALF_BACK:
                self.replaces_from = now + SETTLING_GRACES * configured_grace_s(self._term.view())
            await self._term.update(end_freeze)
            log.info("replacement of tasks resumed", reason=reason)

    def _detect(self, now: float) -> None:
        """Freeze if the nodes that failed are a disruption.  Further nodes during a freeze change nothing."""
        if self.is_frozen:
            return
        self._detected = self._history.detect(now, configured_grace_s(self._term.view()))
        if self._detected is not None:
            # Written at once, because other managers and users know a freeze only from the store.
            self._has_begun.set()
            log.error(
                "replacement of tasks frozen: too many nodes went down at once",
                nodes=self._detected.nodes_down,
                ready_before=self._detected.ready_before,
            )

    def _delay_replacement(self, now: float) -> None:
        """Wait for more nodes to go down, for at most a grace period, if more than one did.

        In the first grace period of a term, wait until the end of the second.
        """
        period_s, _ = configured_heartbeats(self._term.view())
        grace_s = configured_grace_s(self._term.view())
        until = self._history.held_until(now, period_s)
        if now >= self.replaces_from:
            self._delayed_since = now
        until = min(until, self._delayed_since + grace_s)
        if until > now and now < self._counted_from:
            until = self._counted_from + grace_s
        self.replaces_from = max(self.replaces_from, until)

    def _reason_to_end(self, now: float) -> str:
        freeze = _freeze(self._term.view())
        if freeze is None or self._frozen_at is None:
            return ""
        if now - self._frozen_at >= FROZEN_S_MAX:
            return "it was frozen for ten minutes"
        known = frozenset(node.id for node in self._term.view().find(Node))
        if freeze.nodes and is_over(freeze.nodes, frozenset(self._history.ready), known):
            return HALF_BACK
        return ""

    def _end(self) -> None:
        self._frozen_at = None
        self._history.clear()
        self._changed()


def _has_tasks_to_replace(node: Node, view: View) -> bool:
    """Return whether a node is down and has tasks that should be replaced at once, which no leader has done yet."""
    if node.status.state is not NodeState.DOWN or node.spec.availability is Availability.DRAIN:
        return False
    for task in view.find(Task, node_id=node.id):
        service = view.lookup(Service, task.service_id) if task.is_active else None
        if service is not None and replaced_at(policy_on(node, service), task, 0.0) <= 0:
            return True
    return False


def _write(tx: Transaction, detect: Disruption, recently_ready: Collection[NodeId], now: Timestamp) -> None:
    involved = {*recently_ready, *detect.nodes_down}
    down_before = {
        node.id: node.silent_since or Timestamp("")
        for node in tx.find(Node)
        if node.status.state is NodeState.DOWN and node.id not in involved
    }
    for swarm in tx.find(Swarm):
        if swarm.freeze is None:
            freeze = Freeze(
                since=now,
                nodes=detect.nodes_down,
                ready_before=detect.ready_before,
                down_before=down_before,
            )
            tx.put(replace(swarm, freeze=freeze))


def end_freeze(tx: Transaction) -> None:
    """Resume replacement."""
    for swarm in tx.find(Swarm):
        if swarm.freeze is not None:
            tx.put(replace(swarm, freeze=None))


def _freezes(view: View) -> Iterator[Freeze]:
    for swarm in view.find(Swarm):
        if swarm.freeze is not None:
            yield swarm.freeze


def _freeze(view: View) -> Freeze | None:
    return next(_freezes(view), None)
