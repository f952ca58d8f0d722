"""Adoption: the leader takes over the sessions of a manager that has gone, so that somebody judges their nodes.

Taking a session over is a write that compares the session as it was, and gives it a new id: if its owner lives after
all (only the way between the two is cut), it sees that it lost the session, ends it, and the node registers again.
If it does so with the silent manager, that one lives and writes: a node that reaches only that one would go from hand
to hand, so the silent manager keeps its sessions for a while, longer each time.
The dispatcher of the leader then waits for the nodes with the grace of their kind, like for any that it owns and
that are not connected.
"""

from collections.abc import Callable, Iterable, Mapping
from math import inf
from random import Random

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.manager.failures import write_each
from skep.manager.informer import LoopStore
from skep.model.ids import IdSource, NodeId, SessionId
from skep.model.node import Node, NodeSession, NodeState
from skep.store.interface import Transaction

log = structlog.get_logger(__name__)

CHECK_S = 0.2
LONGEST_RETRY_S = 2.0
PATIENCE_S, PATIENCE_S_MAX = 4.0, 60.0
"""For so long a silent manager that was seen to take a session keeps what it has; doubled each time."""


class Orphan(msgspec.Struct, frozen=True, kw_only=True):
    """A node whose session belongs to a manager that has gone."""

    node_id: NodeId
    session: NodeSession
    """As it was seen; taken over only if it is still so."""


def orphans(nodes: Iterable[Node], silent: Iterable[NodeId], own: NodeId) -> list[Orphan]:
    """Whose session to adopt, in order of ``nodes``: of ``silent`` managers, and of nodes that manage no more.

    A node that is down waits for nothing: it registers again when it is back.
    """
    nodes = tuple(nodes)
    gone = set(silent)
    managers = {node.id for node in nodes if node.manager_status is not None}
    return [
        Orphan(node_id=node.id, session=session)
        for node in nodes
        if (session := node.session) is not None
        and session.manager_id != own
        and node.status.state is not NodeState.DOWN
        and (session.manager_id in gone or session.manager_id not in managers)
    ]


class ProofsOfLife:
    """Which silent managers have taken sessions since they are silent: they live, and have a quorum."""

    def __init__(self) -> None:
        self._sessions: dict[NodeId, SessionId] = {}
        """Of every node, while a manager is silent: as they were at the last look."""
        self._kept_until: dict[NodeId, float] = {}
        self._patience_s: dict[NodeId, float] = {}

    def living(self, nodes: Iterable[Node], silent: Iterable[NodeId], now: float) -> frozenset[NodeId]:
        """Those of ``silent`` managers whose sessions are not to be adopted ``now`` (monotonic seconds)."""
        silent = frozenset(silent)
        for manager in [one for one in self._patience_s if one not in silent]:
            del self._patience_s[manager]
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
                patience_s = min(2 * self._patience_s.get(manager, PATIENCE_S / 2), PATIENCE_S_MAX)
                self._patience_s[manager] = patience_s
                self._kept_until[manager] = now + patience_s
                log.info("a silent manager takes sessions", manager=manager, kept_s=patience_s)
        return frozenset(one for one in silent if self._kept_until.get(one, -inf) > now)


def adopt(tx: Transaction, orphan: Orphan, own: NodeId, new_id: IdSource) -> bool:
    """Make ``own`` the owner of the session, unless somebody took it meanwhile; gives whether it was written."""
    node = tx.rely_on(Node, orphan.node_id, "session")
    if node is None or node.session != orphan.session:
        return False
    session = msgspec.structs.replace(orphan.session, manager_id=own, session_id=SessionId(new_id()))
    tx.put(msgspec.structs.replace(node, session=session))
    return True


class Adoption:
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
        """``silent``: managers that are silent at a time, with the seconds since they were heard."""
        self._term = term
        self._own = own
        self._silent = silent
        self._clock = clock
        self._new_id = new_id
        self._random = random
        self._proofs = ProofsOfLife()

    async def run(self) -> None:
        """Look for managers that have gone until cancelled."""
        backoff = Backoff(CHECK_S, LONGEST_RETRY_S, chance=self._random.random)
        while True:
            await self._clock.sleep(CHECK_S)
            now = self._clock.monotonic()
            silent, nodes = self._silent(now), self._term.view().find(Node)
            living = self._proofs.living(nodes, silent, now)
            found = orphans(nodes, silent.keys() - living, self._own)
            if not found or await self._adopt(found):
                backoff.reset()
            else:
                await backoff.sleep(self._clock)

    async def _adopt(self, found: list[Orphan]) -> bool:
        """Whether nothing of it is left to be written."""

        def body(tx: Transaction, orphan: Orphan) -> bool:
            return adopt(tx, orphan, self._own, self._new_id)

        results = await write_each(self._term, body, found)
        adopted = [orphan for orphan, result in zip(found, results, strict=True) if result is True]
        failed = [result for result in results if isinstance(result, SkepError)]
        if failed:
            log.warning("sessions not adopted yet", sessions=len(failed), error=str(failed[0]))
        if adopted:
            managers = sorted({orphan.session.manager_id for orphan in adopted})
            log.info("sessions adopted", managers=managers, sessions=len(adopted))
        return not failed
