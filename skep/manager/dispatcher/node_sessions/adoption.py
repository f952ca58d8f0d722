"""Adoption: the leader takes over the sessions of a lost manager, so that its nodes are monitored.

A takeover is a write that compares the session and sets a new id.  If the owner is alive after all (only its link to
the leader is cut), it sees that it lost the session and ends it, and the node registers again.  If the node does so
with the silent manager, that manager is alive and can write, and a node that reaches no other manager would alternate
between the two.  So a silent manager that takes sessions keeps them for a while, longer each time.  The leader's
dispatcher then waits for the adopted nodes with the grace period of their kind, as for any of its nodes that are not
connected.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from math import inf
from random import Random

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock, tick
from skep.errors import SkepError
from skep.manager.control_loops.failures import write_each
from skep.manager.nodes.heartbeats import certain_contact
from skep.model.node import Node, NodeState, SessionOwner
from skep.model.values.ids import IdSource, NodeId, SessionId
from skep.model.values.times import SECOND_NS
from skep.store.interface import LoopStore, Transaction

log = structlog.get_logger(__name__)

CHECK_S = 0.2
"""Seconds between checks for lost managers."""
CHECK_ALONE_S = 2.0
"""The same for a single manager: there are only sessions of managers that were removed."""
LONGEST_RETRY_S = 2.0
"""Maximum seconds between attempts after a failed write."""
KEEP_S, KEEP_S_MAX = 4.0, 60.0
"""Seconds for which a silent manager that took a session keeps its sessions.  Doubled each time, up to the maximum."""


class OrphanedNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node whose session belongs to a lost manager."""

    node_id: NodeId
    session: SessionOwner
    """The session to take over, unless it has changed."""
    silence_s: float = 0.0
    """Seconds of silence of its owner, or 0 for a manager that was demoted or removed just now."""


def orphans(
    nodes: Iterable[Node], silent: Iterable[NodeId], own: NodeId, unknown: Collection[NodeId] = ()
) -> list[OrphanedNode]:
    """Return the sessions of ``silent`` managers and of demoted managers, which are adopted, in order of ``nodes``.

    A node that is down is skipped: it registers again when it returns.

    Args:
        unknown: Nodes whose manager status is unreadable.
    """
    nodes = tuple(nodes)
    gone = set(silent)
    managers = {*unknown, *(node.id for node in nodes if node.manager_status is not None)}
    return [
        OrphanedNode(node_id=node.id, session=session)
        for node in nodes
        if (session := node.session) is not None
        and session.manager_id != own
        and node.status.state is not NodeState.DOWN
        and (session.manager_id in gone or session.manager_id not in managers)
    ]


class LivingManagers:
    """Silent managers that took sessions since they became silent: they are alive and have a quorum."""

    def __init__(self) -> None:
        self._sessions: dict[NodeId, SessionId] = {}
        """Session of every node at the last check, while a manager is silent."""
        self._kept_until: dict[NodeId, float] = {}
        self._keep_s: dict[NodeId, float] = {}

    def living(self, nodes: Iterable[Node], silent: Iterable[NodeId], now: float) -> frozenset[NodeId]:
        """Return the ``silent`` managers whose sessions must not be adopted ``now`` (monotonic seconds)."""
        silent = frozenset(silent)
        for manager in [one for one in self._keep_s if one not in silent]:
            del self._keep_s[manager]
        before, self._sessions = self._sessions, {}
        if not silent:
            return frozenset()
        for node in nodes:
            if node.session is None:
                continue
            self._sessions[node.id] = node.session.session_id
            manager = node.session.manager_id
            is_new = bool(before) and before.get(node.id) != node.session.session_id
            if is_new and manager in silent and self._kept_until.get(manager, -inf) <= now:
                keep_s = min(2 * self._keep_s.get(manager, KEEP_S / 2), KEEP_S_MAX)
                self._keep_s[manager] = keep_s
                self._kept_until[manager] = now + keep_s
                log.info("silent manager still takes sessions", manager=manager, kept_s=keep_s)
        return frozenset(one for one in silent if self._kept_until.get(one, -inf) > now)


def adopt(tx: Transaction, orphan: OrphanedNode, own: NodeId, new_id: IdSource, now_ns: int) -> bool:
    """Make ``own`` the owner of the session, unless it changed meanwhile.  Returns whether it was written."""
    node = tx.rely_on(Node, orphan.node_id, "session")
    if node is None or node.session != orphan.session:
        return False
    seen_ns = now_ns - round(orphan.silence_s * SECOND_NS)
    session = msgspec.structs.replace(
        orphan.session,
        manager_id=own,
        session_id=SessionId(new_id()),
        contact_at=orphan.session.contact_at or certain_contact(tx, seen_ns),
    )
    tx.put(msgspec.structs.replace(node, session=session))
    return True


class SessionAdoption:
    """Adopts the sessions of silent managers.  Runs on the leader only."""

    def __init__(
        self,
        term: LoopStore,
        own: NodeId,
        silent: Callable[[float], Mapping[NodeId, float]],
        clock: Clock,
        new_id: IdSource,
        random: Random,
    ) -> None:
        """Create an adoption loop.  ``silent`` returns the managers silent at a time, with their seconds of silence."""
        self._term = term
        self._own = own
        self._silent = silent
        self._clock = clock
        self._new_id = new_id
        self._random = random
        self._living = LivingManagers()

    async def run(self) -> None:
        """Check for lost managers until cancelled."""
        backoff = Backoff(CHECK_S, LONGEST_RETRY_S, rng=self._random.random)
        is_alone = False
        while True:
            await tick(self._clock, CHECK_ALONE_S if is_alone else CHECK_S)
            now = self._clock.monotonic()
            view = self._term.view()
            silent, nodes = self._silent(now), view.find(Node)
            is_alone = all(node.manager_status is None or node.id == self._own for node in nodes)
            living = self._living.living(nodes, silent, now)
            unknown = [NodeId(id) for id, parts in view.damaged(Node).items() if "manager" in parts]
            found = orphans(nodes, silent.keys() - living, self._own, unknown)
            found = [
                msgspec.structs.replace(one, silence_s=silent.get(one.session.manager_id, 0.0))
                for one in found
            ]
            if not found or await self._adopt(found):
                backoff.reset()
            else:
                await backoff.sleep(self._clock)

    async def _adopt(self, found: list[OrphanedNode]) -> bool:
        """Adopt the sessions.  Returns whether all were written."""

        def body(tx: Transaction, orphan: OrphanedNode) -> bool:
            return adopt(tx, orphan, self._own, self._new_id, self._clock.now_ns())

        results = await write_each(self._term, body, found)
        adopted = [orphan for orphan, result in zip(found, results, strict=True) if result is True]
        failed = [result for result in results if isinstance(result, SkepError)]
        if failed:
            log.warning("sessions not adopted, will retry", sessions=len(failed), reason=str(failed[0]))
        if adopted:
            managers = sorted({orphan.session.manager_id for orphan in adopted})
            log.info("sessions adopted", managers=managers, sessions=len(adopted))
        return not failed
