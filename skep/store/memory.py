"""The store's twin in memory: the same transactions, revisions, fences and watches without an etcd.

``MemoryStore(clock)`` is a cluster of one manager for unit tests.  For the simulation, a ``MemoryCluster`` holds
the keys as etcd would, and each simulated manager has a ``MemoryStore`` with a replica of its own on it.  Faults
are set per manager: delays, a lagging watch, lost requests and lost replies, a cut from the others.

Nothing here is left to chance: what happens depends on the order of calls and on the faults given.
"""

import asyncio
from bisect import bisect_left, insort
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from enum import Enum
from functools import partial
from typing import ParamSpec, TypeVar

import msgspec

from skep.aio.clock import Clock
from skep.errors import SkepError, Unavailable
from skep.model.ids import NodeId
from skep.store.interface import NotLeader, Object, Term, View, Watch
from skep.store.keys import LEADER
from skep.store.leadership import FencedTerm, LeaderRecord, TermState, leader_named
from skep.store.proposal import Exists, NothingSince, Proposal, Unchanged
from skep.store.replica import Replica
from skep.store.space import Space
from skep.store.state import State, differences
from skep.store.tables import KeyChange
from skep.store.updates import (
    NO_LEADER,
    Committed,
    Conflict,
    Outcome,
    Updater,
    Updating,
    leave,
    within_deadline,
)

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

HISTORY = 1000
"""Revisions kept without looking whether anybody still needs them."""


class Loss(Enum):
    """What became of a proposal whose answer did not come."""

    REQUEST = "request"
    """Nothing was written; the store finds that out and proposes again."""
    REPLY = "reply"
    """It was written; the store finds that out and answers."""
    BOTH = "both"
    """It was written, and nobody finds out in time: Unavailable."""


class Faults(msgspec.Struct):
    """What goes wrong for one manager.  May be changed at any time.

    ``delay_s``: seconds that each proposal takes; ``lag_s``: seconds by which its watch is behind; ``loss``:
    asked for each proposal; ``is_cut``: it reaches no quorum and hears nothing.
    """

    delay_s: Callable[[], float] = lambda: 0.0
    lag_s: float = 0.0
    loss: Callable[[Proposal], Loss | None] = lambda _: None
    is_cut: bool = False


class MemoryCluster:
    """The keys all managers share, and who leads.

    The first candidate becomes leader; ``elect`` moves leadership, ``choose`` picks the next one when the leader
    goes.
    """

    def __init__(self, choose: Callable[[Sequence[NodeId]], NodeId] = min) -> None:
        self.revision = 1
        self.compacted = 0
        """Replicas behind this revision have to load everything again."""
        self.stores: list[MemoryStore] = []
        self.incarnation = 1
        self._entries: dict[str, KeyChange] = {}
        self._ranged: list[str] = []
        """Keys below prefixes that are compared as a whole, sorted."""
        self._history: list[tuple[int, tuple[KeyChange, ...]]] = []
        self._choose = choose
        self._candidates: dict[NodeId, MemoryStore] = {}
        self._terms: dict[NodeId, TermState] = {}
        self._elections = 0

    # -- keys --------------------------------------------------------------------------------------------------

    def commit(self, proposal: Proposal, fence: int | None) -> Outcome:
        """Execute ``proposal`` as etcd would.  Raises: NotLeader: ``fence`` is not the leader key's revision."""
        if fence is not None and self._revision_of(LEADER) != fence:
            raise NotLeader("another manager leads")
        if not all(map(self._holds, proposal.compares)):
            return Conflict(self.revision)
        self.revision += 1
        self._publish([*((key, None) for key in proposal.deletes), *proposal.puts])
        return Committed(self.revision)

    def load(self) -> tuple[State, bytes | None]:
        """A fresh state of everything, as a replica loads it."""
        state = State()
        state.apply(
            self.revision,
            [self._entries[key] for key in sorted(self._entries)],
        )
        leader = self._entries.get(LEADER)
        return state, leader.value if leader else None

    def compact(self) -> None:
        """Forget history: whoever is behind now has to load everything again."""
        self.compacted = self.revision
        self._history.clear()

    def since(self, revision: int) -> list[tuple[int, tuple[KeyChange, ...]]]:
        """Revisions after ``revision`` with what they changed."""
        first = bisect_left(self._history, revision + 1, key=lambda item: item[0])
        return self._history[first:]

    def _revision_of(self, key: str) -> int:
        entry = self._entries.get(key)
        return entry.revision if entry is not None else 0

    def _holds(self, compare: Unchanged | Exists | NothingSince) -> bool:
        match compare:
            case Unchanged(key, revision):
                return self._revision_of(key) == revision
            case Exists(key, create_revision):
                entry = self._entries.get(key)
                return entry is not None and entry.create_revision == create_revision
            case NothingSince(prefix, revision):
                return all(self._entries[key].revision <= revision for key in self._below(prefix))

    def _below(self, prefix: str) -> Iterable[str]:
        place = bisect_left(self._ranged, prefix)
        while place < len(self._ranged) and self._ranged[place].startswith(prefix):
            yield self._ranged[place]
            place += 1

    def _publish(self, writes: Iterable[tuple[str, bytes | None]]) -> None:
        changes: list[KeyChange] = []
        for key, value in writes:
            old = self._entries.get(key)
            if value is None:
                if old is None:
                    continue
                del self._entries[key]
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
                self._entries[key] = entry = KeyChange(key, value, self.revision, created)
                changes.append(entry)
        self._history.append((self.revision, tuple(changes)))
        for store in self.stores:
            store.hear()
        if len(self._history) > HISTORY:
            self._forget_heard()

    def _forget_heard(self) -> None:
        heard = min((store.heard for store in self.stores), default=self.revision)
        if self.revision - heard > 10 * HISTORY:
            self.compact()  # somebody has been away for long: they will load again
        else:
            self._history = self.since(heard)

    # -- leadership --------------------------------------------------------------------------------------------

    @property
    def leader(self) -> NodeId | None:
        """Who leads."""
        return next(iter(self._terms), None)

    def stand(self, store: "MemoryStore", node_id: NodeId) -> None:
        """``node_id`` is ready to lead."""
        self._candidates[node_id] = store
        if self.leader is None:
            self.elect(self._choose(sorted(self._candidates)))

    def withdraw(self, node_id: NodeId) -> None:
        """``node_id`` crashed, stopped or was cut: it does not lead any more, the next one does."""
        self._candidates.pop(node_id, None)
        if self.leader == node_id:
            self._depose()
            if self._candidates:
                self.elect(self._choose(sorted(self._candidates)))

    def elect(self, node_id: NodeId, *, quietly: bool = False) -> None:
        """Make ``node_id`` the leader.  ``quietly``: the old one finds out only when a write fails."""
        self._depose(quietly=quietly)
        store = self._candidates[node_id]
        self._elections += 1
        self.revision += 1
        record = LeaderRecord(node=node_id, addr=store.addr, term=self._elections)
        self._publish([(LEADER, msgspec.json.encode(record))])
        term = TermState(number=self._elections, fence=self.revision)
        self._terms = {node_id: term}
        store.elected(term)

    def renew_lost(self) -> None:
        """The leader's term ended while it was cut off: it leads anew."""
        for term in tuple(self._terms.values()):
            if term.is_lost:
                self.renew(term)

    def renew(self, term: TermState) -> None:
        """A write of ``term`` may yet take effect: it is over, and its manager leads anew, if it reaches the others."""
        term.lose()
        for node_id, current in tuple(self._terms.items()):
            if current is term and not self._candidates[node_id].faults.is_cut:
                self.elect(node_id)

    def _depose(self, *, quietly: bool = False) -> None:
        for term in self._terms.values():
            if not quietly:
                term.lose()
        self._terms = {}


class MemoryStore(Updating):
    """One manager's store on a ``MemoryCluster``.  Implements ``interface.Store``."""

    def __init__(
        self, clock: Clock, cluster: MemoryCluster | None = None, watch_capacity: int = 10_000
    ) -> None:
        self.cluster = cluster if cluster is not None else MemoryCluster()
        self.faults = Faults()
        self.addr = ""
        self.heard = self.cluster.revision
        """The last revision that was handed to this manager, shown or still on its way."""
        self._clock = clock
        self._replica = Replica(watch_capacity)
        self._replica.reset(*self.cluster.load())
        self._elected: asyncio.Queue[TermState] = asyncio.Queue()
        self._updater = self._updater_behind(None)
        self.cluster.stores.append(self)

    # -- interface.Store ---------------------------------------------------------------------------------------

    def view(self) -> View:
        return self._replica.state

    def watch(self, *kinds: type[Object]) -> AbstractAsyncContextManager[Watch]:
        return self._replica.watch(*kinds)

    async def barrier(self) -> None:
        async with within_deadline():
            if self.faults.is_cut:
                await asyncio.Event().wait()
            await self._replica.reached(self.cluster.revision)

    @property
    def leader(self) -> NodeId | None:
        return leader_named(self._replica.leader_record)

    async def rotate_data_key(self) -> None:
        """Nothing here is encrypted."""

    async def space(self) -> Space | None:
        return None

    async def compact(self, kept_revisions: int) -> bool:
        return False

    async def defragment(self) -> None:
        """There is no file."""

    async def disarm(self) -> None:
        """There is no quota."""

    @property
    def incarnation(self) -> int:
        return self.cluster.incarnation

    async def terms(self, node_id: NodeId, addr: str) -> AsyncIterator[Term]:
        self.addr = addr
        self.cluster.stand(self, node_id)
        try:
            while True:
                state = await self._elected.get()
                if state.is_lost:
                    continue
                await self._replica.reached(state.fence)
                yield FencedTerm(self._replica, state, self._updater_behind(state))
        finally:
            self.cluster.withdraw(node_id)

    # -- what the cluster tells it -----------------------------------------------------------------------------

    def elected(self, term: TermState) -> None:
        """This manager leads now."""
        self._elected.put_nowait(term)

    def hear(self) -> None:
        """There are new revisions; show them now, or when the lag is over."""
        if self.faults.is_cut:
            return
        if self.faults.lag_s > 0 or self.heard > self._replica.revision:
            self.heard = self.cluster.revision
            asyncio.get_running_loop().call_later(self.faults.lag_s, self._show, self.heard)
        else:
            self.heard = self.cluster.revision
            self._show(self.heard)

    def cut(self) -> None:
        """Cut this manager off: no quorum, no news.  Leadership goes on elsewhere when the test says so."""
        self.faults.is_cut = True

    def mend(self) -> None:
        """Undo ``cut``: everything missed arrives."""
        self.faults.is_cut = False
        self.hear()
        self.cluster.renew_lost()

    def _updater_behind(self, term: TermState | None) -> Updater:
        return Updater(
            self._replica,
            MemoryLane(self, term),
            self.barrier,
            self._clock,
            self._replica.reached,
            term=Renewing(self.cluster, term) if term is not None else None,
            chance=lambda: 0.5,
        )

    async def shown(self) -> None:
        """Return when the replica shows what is there now."""
        await self._replica.reached(self.cluster.revision)

    def _show(self, until: int) -> None:
        if self._replica.revision < self.cluster.compacted:
            state, leader = self.cluster.load()
            state.keep_unreadable(self._replica.state)
            self._replica.reset(state, leader, tuple(differences(self._replica.state, state)))
            return
        for revision, changes in self.cluster.since(self._replica.revision):
            if revision > until:
                break
            self._replica.apply(revision, changes)


class Renewing:
    """A term whose manager leads anew when its writer ends it.  Implements ``updates.Held``."""

    def __init__(self, cluster: MemoryCluster, term: TermState) -> None:
        self._cluster = cluster
        self._term = term

    @property
    def is_lost(self) -> bool:
        return self._term.is_lost

    def lose(self) -> None:
        self._cluster.renew(self._term)


class MemoryLane:
    """Proposals of one manager, or of one term of it.  Implements ``updates.Proposer``."""

    def __init__(self, store: MemoryStore, term: TermState | None) -> None:
        self._store = store
        self._term = term

    async def propose(self, proposals: Sequence[Proposal]) -> Sequence[Outcome | SkepError]:
        if self._term is None:
            return [await self._propose(proposal) for proposal in proposals]
        outcomes: list[Outcome | SkepError] = []
        try:
            for proposal in proposals:
                outcomes += [await self._propose(proposal)]
        except asyncio.CancelledError:
            await leave(
                Renewing(self._store.cluster, self._term), partial(self._rest, proposals[len(outcomes) :])
            )
            raise
        if any(isinstance(one, Unavailable) and not isinstance(one, NotLeader) for one in outcomes):
            self._store.cluster.renew(self._term)
        return outcomes

    async def _rest(self, proposals: Sequence[Proposal]) -> None:
        """What left before its writer did is done all the same."""
        for proposal in proposals:
            await self._propose(proposal)
        await self._store.shown()

    async def _propose(self, proposal: Proposal) -> Outcome | SkepError:
        while True:
            # Like a round trip: others run in between, so what the transaction saw may have changed.
            await asyncio.sleep(self._store.faults.delay_s())
            if self._store.faults.is_cut:
                await asyncio.Event().wait()  # until the caller's deadline
            loss = self._store.faults.loss(proposal)
            if loss is Loss.REQUEST:
                continue
            outcome = self._commit(proposal)
            if loss is Loss.BOTH:
                return Unavailable(NO_LEADER)
            return outcome

    def _commit(self, proposal: Proposal) -> Outcome | SkepError:
        if self._term is None:
            return self._store.cluster.commit(proposal, None)
        try:
            return self._store.cluster.commit(proposal, self._term.fence)
        except NotLeader as error:
            self._term.lose()
            return error
