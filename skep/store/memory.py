"""The store in memory, with the same transactions, revisions, fences and watches but without etcd.

``MemoryStore(clock)`` is a cluster of one manager for unit tests.  For several managers, a ``MemoryCluster`` holds the
keys as etcd would, and each manager has a ``MemoryStore`` with its own replica of it.  Faults are set per manager:
delays, a lagging watch, lost requests and lost responses, a network partition.

It is deterministic: its behavior depends only on the order of calls and on the faults.
"""

import asyncio
from bisect import bisect_left, insort
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from enum import Enum
from functools import partial

import msgspec

from skep.aio.clock import Clock
from skep.errors import SkepError, Unavailable
from skep.model.values.ids import NodeId
from skep.store.interface import HistoryGone, NotLeader, Term, View
from skep.store.keys import LEADER
from skep.store.leadership import LeaderRecord, TermState, leader_named
from skep.store.replica import Replica
from skep.store.space import MemberSpace
from skep.store.state import State, differences
from skep.store.tables import KeyChange
from skep.store.transactions.proposal import (
    Committed,
    Exists,
    NothingSince,
    Outcome,
    Proposal,
    Unchanged,
    WriteConflict,
)
from skep.store.transactions.updates import NO_LEADER, Updater, within_deadline

HISTORY = 1000
"""Number of kept revisions above which revisions that every store has applied are dropped."""


class Loss(Enum):
    """The outcome of a proposal without a response."""

    REQUEST = "request"
    """The request was lost and nothing was written.  The store detects that and proposes again."""
    REPLY = "reply"
    """The response was lost after the write.  The store detects that and returns the outcome."""
    BOTH = "both"
    """The response was lost after the write, and the store does not detect it in time, so the outcome is
    Unavailable.
    """


class Faults(msgspec.Struct):
    """The faults of one manager.  May be changed at any time.

    Attributes:
        delay_s: Returns the seconds that each proposal takes.
        lag_s: Seconds by which its watch is behind.
        loss: Called for each proposal.
        is_partitioned: Whether it has no quorum and receives no changes.
    """

    delay_s: Callable[[], float] = lambda: 0.0
    lag_s: float = 0.0
    loss: Callable[[Proposal], Loss | None] = lambda _: None
    is_partitioned: bool = False


class MemoryCluster:
    """The keys that all managers share, and the leader.

    The first candidate becomes the leader.  ``elect`` moves leadership.  If the leader withdraws, the candidate with
    the lowest id is the next one.
    """

    def __init__(self) -> None:
        self.revision = 1
        self.compacted = 0
        """Replicas that are behind this revision have to reload everything."""
        self.stores: list[MemoryStore] = []
        self.incarnation = 1
        self.log: dict[str, KeyChange] = {}
        self._ranged: list[str] = []
        """Sorted keys of references and shared claims, whose ranges are often compared."""
        self._history: list[tuple[int, tuple[KeyChange, ...]]] = []
        self._candidates: dict[NodeId, MemoryStore] = {}
        self._terms: dict[NodeId, _MemoryTerm] = {}
        self._elections = 0

    # -- keys --------------------------------------------------------------------------------------------------

    def commit(self, proposal: Proposal, fence: int | None) -> Outcome:
        """Execute ``proposal`` as etcd would.  Raises NotLeader if ``fence`` is not the leader key's revision."""
        if fence is not None and self._revision_of(LEADER) != fence:
            raise NotLeader("another manager leads")
        if not all(map(self._holds, proposal.compares)):
            return WriteConflict(self.revision)
        self.revision += 1
        self._publish([*((key, None) for key in proposal.deletes), *proposal.puts])
        return Committed(self.revision)

    def load(self) -> tuple[State, bytes | None]:
        """Return a new state of everything and the leader record, as a replica loads them."""
        state = State()
        state.apply(
            self.revision,
            [self.log[key] for key in sorted(self.log)],
        )
        leader = self.log.get(LEADER)
        return state, leader.value if leader else None

    def compact(self) -> None:
        """Discard history, so that replicas that are behind now have to reload everything."""
        self.compacted = self.revision
        self._history.clear()

    def since(self, revision: int) -> list[tuple[int, tuple[KeyChange, ...]]]:
        """Return the revisions after ``revision`` with their changes."""
        first = bisect_left(self._history, revision + 1, key=lambda item: item[0])
        return self._history[first:]

    def _revision_of(self, key: str) -> int:
        entry = self.log.get(key)
        return entry.revision if entry is not None else 0

    def _holds(self, compare: Unchanged | Exists | NothingSince) -> bool:
        match compare:
            case Unchanged(key, revision):
                return self._revision_of(key) == revision
            case Exists(key, create_revision):
                entry = self.log.get(key)
                return entry is not None and entry.create_revision == create_revision
            case NothingSince(prefix, revision):
                return all(self.log[key].revision <= revision for key in self._below(prefix))

    def _below(self, prefix: str) -> Iterable[str]:
        if prefix[0] not in "rs":
            yield from (key for key in self.log if key.startswith(prefix))
            return
        index = bisect_left(self._ranged, prefix)
        while index < len(self._ranged) and self._ranged[index].startswith(prefix):
            yield self._ranged[index]
            index += 1

    def _publish(self, writes: Iterable[tuple[str, bytes | None]]) -> None:
        changes: list[KeyChange] = []
        for key, value in writes:
            old = self.log.get(key)
            if value is None:
                if old is None:
                    continue
                del self.log[key]
                if key[0] in "rs":
                    del self._ranged[bisect_left(self._ranged, key)]
                changes.append(KeyChange(key, None, self.revision))
            else:
                if old is not None:
                    key, created = old.key, old.create_revision
                else:
                    created = self.revision
                    if key[0] in "rs":
                        insort(self._ranged, key)
                self.log[key] = entry = KeyChange(key, value, self.revision, created)
                changes.append(entry)
        self._history.append((self.revision, tuple(changes)))
        for store in self.stores:
            store.deliver()
        if len(self._history) > HISTORY:
            self._trim_history()

    def _trim_history(self) -> None:
        delivered = min((store.delivered for store in self.stores), default=self.revision)
        if self.revision - delivered > 10 * HISTORY:
            self.compact()  # a store that has been partitioned for long will reload everything
        else:
            self._history = self.since(delivered)

    # -- leadership --------------------------------------------------------------------------------------------

    @property
    def leader(self) -> NodeId | None:
        """The current leader."""
        return next(iter(self._terms), None)

    def stand(self, store: "MemoryStore", node_id: NodeId) -> None:
        """Add ``node_id`` to the candidates."""
        self._candidates[node_id] = store
        if self.leader is None:
            self.elect(min(self._candidates))

    def withdraw(self, node_id: NodeId) -> None:
        """Remove a candidate that crashed, stopped or was partitioned.  Another candidate becomes the leader."""
        self._candidates.pop(node_id, None)
        if self.leader == node_id:
            self._depose()
            if self._candidates:
                self.elect(min(self._candidates))

    def elect(self, node_id: NodeId, *, quietly: bool = False) -> None:
        """Make ``node_id`` the leader.  With ``quietly``, the old leader notices it only when a write fails."""
        self._depose(quietly=quietly)
        store = self._candidates[node_id]
        self._elections += 1
        self.revision += 1
        record = LeaderRecord(node=node_id, addr=store.addr, term=self._elections)
        self._publish([(LEADER, msgspec.json.encode(record))])
        term = _MemoryTerm(number=self._elections, fence=self.revision, cluster=self)
        self._terms = {node_id: term}
        store.elected(term)

    def renew_lost(self) -> None:
        """Start a new term if the leader's term ended while it was partitioned."""
        for term in tuple(self._terms.values()):
            if term.is_lost:
                self.renew(term)

    def renew(self, term: TermState) -> None:
        """End ``term``, which may have a write in flight.  Its manager is elected again, unless it is partitioned."""
        term.lose()
        for node_id, current in tuple(self._terms.items()):
            if current is term and not self._candidates[node_id].faults.is_partitioned:
                self.elect(node_id)

    def _depose(self, *, quietly: bool = False) -> None:
        for term in self._terms.values():
            if not quietly:
                term.lose()
        self._terms = {}


class MemoryStore(Updater):
    """One manager's store on a ``MemoryCluster``.  Implements ``interface.Store``."""

    def __init__(
        self, clock: Clock, cluster: MemoryCluster | None = None, watch_capacity: int = 10_000
    ) -> None:
        self.cluster = cluster if cluster is not None else MemoryCluster()
        self.faults = Faults()
        self.addr = ""
        self.delivered = self.cluster.revision
        """The last revision delivered to this manager.  It may become visible only after the lag."""
        replica = Replica(watch_capacity)
        super().__init__(
            replica, self._propose_all, self.barrier, replica.wait_reached, clock, rng=lambda: 0.5
        )
        replica.reset(*self.cluster.load())
        self._elected: asyncio.Queue[TermState] = asyncio.Queue()
        self.cluster.stores.append(self)

    # -- interface.Store ---------------------------------------------------------------------------------------

    async def barrier(self) -> None:
        """Wait until the replica is at the cluster's revision, or until the deadline while partitioned."""
        async with within_deadline():
            if self.faults.is_partitioned:
                await asyncio.Event().wait()
            await self.replica.wait_reached(self.cluster.revision)

    @property
    def leader(self) -> NodeId | None:
        return leader_named(self.replica.leader_record)

    async def rotate_data_key(self) -> None:
        """Do nothing, because nothing is encrypted here."""

    async def space(self) -> MemberSpace | None:
        return None

    async def compact(self, kept_revisions: int) -> bool:
        return False

    async def state_at(self, revision: int) -> View:
        """Return the current state only: no history is kept."""
        if revision < self.replica.revision:
            raise HistoryGone(f"the store no longer has revision {revision}")
        return self.view()

    async def oldest_revision(self) -> int:
        return self.replica.revision

    async def defragment(self) -> None:
        """Do nothing, because this store has no file."""

    async def disarm(self) -> None:
        """Do nothing, because this store has no quota."""

    @property
    def incarnation(self) -> int:
        return self.cluster.incarnation

    async def terms(self, node_id: NodeId, addr: str) -> AsyncIterator[Term]:
        """Yield a term each time the test's ``MemoryCluster`` elects this manager."""
        self.addr = addr
        self.cluster.stand(self, node_id)
        try:
            while True:
                state = await self._elected.get()
                if state.is_lost:
                    continue
                await self.replica.wait_reached(state.fence)
                yield self.fenced(state)
        finally:
            self.cluster.withdraw(node_id)

    # -- called by the cluster -----------------------------------------------------------------------------------

    def elected(self, term: TermState) -> None:
        """Start ``term`` of this manager."""
        self._elected.put_nowait(term)

    def deliver(self) -> None:
        """Make new revisions visible, now or after the lag."""
        if self.faults.is_partitioned:
            return
        if self.faults.lag_s > 0 or self.delivered > self.replica.revision:
            self.delivered = self.cluster.revision
            asyncio.get_running_loop().call_later(self.faults.lag_s, self._show, self.delivered)
        else:
            self.delivered = self.cluster.revision
            self._show(self.delivered)

    def partition(self) -> None:
        """Separate this manager from the others, so that it has no quorum and receives no changes.  The test may move
        leadership.
        """
        self.faults.is_partitioned = True

    def heal(self) -> None:
        """Undo ``partition``, and deliver everything missed."""
        self.faults.is_partitioned = False
        self.deliver()
        self.cluster.renew_lost()

    async def wait_shown(self) -> None:
        """Wait until the replica shows the cluster's current revision."""
        await self.replica.wait_reached(self.cluster.revision)

    def _show(self, until: int) -> None:
        if self.replica.revision < self.cluster.compacted:
            state, leader = self.cluster.load()
            state.keep_unreadable(self.replica.state)
            self.replica.reset(state, leader, tuple(differences(self.replica.state, state)))
            return
        for revision, changes in self.cluster.since(self.replica.revision):
            if revision > until:
                break
            self.replica.apply(revision, changes)

    # -- proposals -------------------------------------------------------------------------------------------------

    async def _propose_all(
        self, proposals: Sequence[Proposal], term: TermState | None
    ) -> Sequence[Outcome | SkepError]:
        """Commit proposals.  Implements ``updates.Propose``."""
        if term is None:
            return [await self._round_trip(proposal, None) for proposal in proposals]
        outcomes: list[Outcome | SkepError] = []
        try:
            for proposal in proposals:
                outcomes += [await self._round_trip(proposal, term)]
        except asyncio.CancelledError:
            await term.settle(partial(self._settle_outcomes, proposals[len(outcomes) :], term))
            raise
        if any(isinstance(one, Unavailable) and not isinstance(one, NotLeader) for one in outcomes):
            term.abandon()
        return outcomes

    async def _settle_outcomes(self, proposals: Sequence[Proposal], term: TermState) -> None:
        """Commit the proposals of a cancelled writer, and return when they are visible."""
        for proposal in proposals:
            await self._round_trip(proposal, term)
        await self.wait_shown()

    async def _round_trip(self, proposal: Proposal, term: TermState | None) -> Outcome | SkepError:
        while True:
            # Other coroutines run meanwhile, as in a round trip, so the state that the transaction read may change.
            await asyncio.sleep(self.faults.delay_s())
            if self.faults.is_partitioned:
                await asyncio.Event().wait()  # until the caller's deadline
            loss = self.faults.loss(proposal)
            if loss is Loss.REQUEST:
                continue
            outcome = self._commit(proposal, term)
            if loss is Loss.BOTH:
                return Unavailable(NO_LEADER)
            return outcome

    def _commit(self, proposal: Proposal, term: TermState | None) -> Outcome | SkepError:
        if term is None:
            return self.cluster.commit(proposal, None)
        try:
            return self.cluster.commit(proposal, term.fence)
        except NotLeader as error:
            term.lose()
            return error


class _MemoryTerm(TermState):
    """A term whose manager is elected again when it is abandoned."""

    def __init__(self, number: int, fence: int, cluster: MemoryCluster) -> None:
        super().__init__(number, fence)
        self._cluster = cluster

    def abandon(self) -> None:
        self._cluster.renew(self)
