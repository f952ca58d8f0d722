"""Removal of nodes that were lost for longer than the cluster keeps them (``lost_nodes``).  Leader only."""

from collections.abc import Callable
from random import Random

import structlog

from skep.aio.clock import Clock, tick
from skep.errors import SkepError
from skep.manager.cluster import known_cluster
from skep.manager.control_loops.informer import run_informer
from skep.manager.nodes.revocation import revoke
from skep.manager.orchestrator.reaper.kept_nodes import KeptNodes
from skep.manager.orchestrator.reaper.lost_nodes import is_disrupted, is_lost_worker, removable
from skep.manager.services.freezes import held_by, is_held_at_commit
from skep.model.node import Node
from skep.model.options.labels import forget_nodes_s
from skep.model.values.ids import IdSource, NodeId
from skep.store.interface import Commit, Created, Deleted, LoopStore, NotLeader, Transaction, Updated, View

log = structlog.get_logger(__name__)

CHECK_S = 5.0
"""Seconds between checks.  The shortest setting is a minute."""


class LostNodes:
    """Removes nodes that are lost for good, if the cluster is configured to do so."""

    def __init__(self, term: LoopStore, clock: Clock, new_id: IdSource, random: Random) -> None:
        self._term = term
        self._clock = clock
        self._down: dict[NodeId, float] = {}
        """Time at which this leader first saw each node down without a disruption, on its monotonic clock."""
        self._kept: dict[NodeId, str] = {}
        """Reasons why due nodes were kept at the last check, so that each reason is logged once."""

    async def run(self) -> None:
        """Remove until cancelled."""
        await run_informer(
            self._term, (Node,), on_snapshot=self._on_snapshot, on_commit=self._on_commit, work=self._work
        )

    def _on_snapshot(self, view: View) -> None:
        # After a lag, the watch restarts as at the start of a term, and earlier observations may no longer hold.
        now = self._clock.monotonic()
        self._down = {node.id: now for node in view.find(Node) if is_lost_worker(node)}

    def _on_commit(self, commit: Commit) -> None:
        for event in commit.events:
            match event:
                case Created(Node() as node) | Updated(_, Node() as node) if is_lost_worker(node):
                    self._down.setdefault(node.id, self._clock.monotonic())
                case Updated(_, Node() as node) | Deleted(Node() as node):
                    self._down.pop(node.id, None)

    async def _work(self) -> None:
        while True:
            await tick(self._clock, CHECK_S)
            if self._down:
                await self._remove()

    async def _remove(self) -> None:
        view, now, now_ns = self._term.view(), self._clock.monotonic(), self._clock.now_ns()
        swarm = known_cluster(view)
        if swarm is None:
            return
        nodes, is_frozen = view.find(Node), swarm.freeze is not None
        if is_disrupted(nodes, is_frozen=is_frozen):
            # After a disruption, the second half of the nodes returns later than the first. That does not make them
            # lost.
            self._down = dict.fromkeys(self._down, now)
            return

        def down_s(node: Node) -> float:
            return now - self._down.get(node.id, now)

        if held_by(view):
            return

        holdings, kept = KeptNodes(view), dict[NodeId, str]()

        def is_kept(node: Node) -> bool:
            if reason := holdings.reason(node, down_s(node)):
                kept[node.id] = reason
            return bool(reason)

        due = removable(
            nodes,
            after_s=forget_nodes_s(swarm.spec.labels),
            observed_s=down_s,
            now_ns=now_ns,
            is_kept=is_kept,
            is_frozen=is_frozen,
        )
        self._log_kept(kept)
        if not due:
            return

        def remove(tx: Transaction, id: NodeId) -> bool:
            return remove_lost(tx, id, down_s, now_ns)

        for id, result in zip(due, await self._term.update_each(remove, due), strict=True):
            if isinstance(result, NotLeader):
                raise result
            if isinstance(result, SkepError):
                log.warning("lost node not removed, will retry", node=id, reason=str(result))
            elif result:
                log.warning("lost node removed", node=id)

    def _log_kept(self, kept: dict[NodeId, str]) -> None:
        for id, reason in kept.items():
            if self._kept.get(id) != reason:
                log.warning("lost node kept", node=id, reason=reason)
        self._kept = kept


def remove_lost(tx: Transaction, id: NodeId, down_s: Callable[[Node], float], now_ns: int) -> bool:
    """Remove the node as a user would, unless it has returned or must be kept.  Returns whether it was removed.

    The reasons to keep it are checked again here, because a volume may have been published on it since the last check.
    """
    node = tx.rely_on(Node, id)
    if (
        is_held_at_commit(tx, "")
        or node is None
        or not is_lost_worker(node)
        or KeptNodes(tx).reason(node, down_s(node))
    ):
        return False
    revoke(tx, node, now_ns, is_removed=True)
    tx.delete(Node, id)
    return True
