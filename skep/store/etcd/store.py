"""The store of one manager on its own etcd member: replica, group commit, barrier and terms in one object."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.groups import errors_as_they_are
from skep.errors import SkepError, Unavailable
from skep.model.ids import NodeId
from skep.store import keys
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.batcher import Batcher
from skep.store.etcd.cipher import Cipher
from skep.store.etcd.client import Client
from skep.store.etcd.election import Election
from skep.store.etcd.errors import Compacted, Uncertain
from skep.store.etcd.follow import Follower
from skep.store.etcd.founding import founded
from skep.store.etcd.requests import etcd_key
from skep.store.etcd.rotation import KeyRotation
from skep.store.interface import NotLeader, Object, Term, View, Watch
from skep.store.leadership import FencedTerm, TermState, leader_named
from skep.store.proposal import Proposal
from skep.store.replica import Replica
from skep.store.space import COMPACT_AT, QUOTA_BYTES, Space
from skep.store.updates import Outcome, Updater, Updating, within_deadline
from skep.store.watches import CAPACITY

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")


PROBE = "probe/space"
SPACE_S = 0.25
"""How old what is known of the space may be, while there is plenty."""


class EtcdStore(Updating):
    """Implements ``interface.Store``.  Made by ``open_store``."""

    def __init__(
        self,
        client: Client,
        replica: Replica,
        follower: Follower,
        batcher: Batcher,
        cipher: Cipher,
        clock: Clock,
        group: asyncio.TaskGroup,
        chance: Callable[[], float],
        incarnation: int,
        quota_bytes: int,
    ) -> None:
        self.incarnation = incarnation
        self._quota_bytes = quota_bytes
        self._space: tuple[float, Space] | None = None
        self._compacted = 0
        self._client = client
        self._replica = replica
        self._follower = follower
        self._batcher = batcher
        self._cipher = cipher
        self._clock = clock
        self._group = group
        self._chance = chance
        self._elections: set[asyncio.Task[None]] = set()
        self._rotation = KeyRotation(client, cipher, clock)
        self._barrier = SharedBarrier(self._reach_present)
        self._updater = self._updater_behind(None)

    def view(self) -> View:
        return self._replica.state

    def watch(self, *kinds: type[Object]) -> AbstractAsyncContextManager[Watch]:
        return self._replica.watch(*kinds)

    async def barrier(self) -> None:
        async with within_deadline():
            await self._barrier.passed()

    async def terms(self, node_id: NodeId, addr: str) -> AsyncIterator[Term]:
        election = Election(self._client, self._cipher, node_id, addr, self._clock)
        terms: asyncio.Queue[TermState] = asyncio.Queue()

        async def hold_elections() -> None:
            async with asyncio.TaskGroup() as group:
                async for state in election.elected(Backoff(longest_s=1.0, chance=self._chance)):
                    terms.put_nowait(state)
                    rotating = self._rotation.run(state, chance=self._chance)
                    group.create_task(rotating, name="store-keys")

        holding = self._group.create_task(hold_elections(), name="store-election")
        self._elections.add(holding)
        try:
            while True:
                state = await terms.get()
                await self._follower.reached(state.fence)
                if not state.is_lost:
                    yield FencedTerm(self._replica, state, self._updater_behind(state))
        finally:
            self._elections.discard(holding)
            holding.cancel()

    @property
    def leader(self) -> NodeId | None:
        return leader_named(self._replica.leader_record)

    @property
    def is_current(self) -> bool:
        """Whether the replica follows: false while the member is away or has no leader."""
        return self._follower.is_current

    async def rotate_data_key(self) -> None:
        await self._rotation.begin()

    async def space(self) -> Space:
        now = self._clock.monotonic()
        if self._space is not None and now - self._space[0] < SPACE_S and self._space[1].share < COMPACT_AT:
            return self._space[1]
        status = await self._client.status()
        space = Space(
            size=status.db_size,
            in_use=status.db_size_in_use,
            quota=self._quota_bytes,
            has_alarm=any("NOSPACE" in error for error in status.errors),
        )
        self._space = now, space
        return space

    async def compact(self, kept_revisions: int) -> bool:
        revision = self._replica.revision - kept_revisions
        is_more = revision > self._compacted
        if is_more:
            with suppress(Compacted):  # by etcd itself, or by an earlier leader
                await self._client.compact(revision)
        # What was freed counts as in use until something is written, on each member after its own compaction.
        written = await self._client.put(etcd_key(PROBE), b"")
        self._compacted = written.header.revision
        return is_more

    async def defragment(self) -> None:
        self._space = None
        await self._client.defragment()

    async def disarm(self) -> None:
        await self._client.disarm()

    @property
    def wrapping_key(self) -> bytes:
        """What the data keys in the store are wrapped with."""
        return self._cipher.wrapping_key

    @property
    def is_rotating(self) -> bool:
        """Whether values may be left that an older data key encrypted."""
        return len(self._cipher.ring.keys) > 1

    @property
    def unreadable_values(self) -> tuple[str, ...]:
        """Keys of values that no data key opens, once everything else is under the newest one."""
        return self._rotation.unreadable

    def learn_wrapping_key(self, key: bytes) -> None:
        """Be ready for data keys that are wrapped with ``key``."""
        self._cipher.learn(key)

    async def wait_rewrapped(self) -> bytes:
        """Return the wrapping key when it has become another one since the last call."""
        await self._cipher.rewrapped.wait()
        self._cipher.rewrapped.clear()
        return self._cipher.wrapping_key

    async def replace_wrapping_key(self, term: Term, key: bytes) -> None:
        """Wrap the data keys with ``key``, and encrypt everything with a fresh one; every manager has ``key`` by now.

        Raises: NotLeader: ``term`` is over; Unavailable.
        """
        assert isinstance(term, FencedTerm), "terms of this store"
        await self._rotation.replace_wrapping_key(term.fence, key)

    def end_elections(self) -> None:
        """Stand for no further term; for the end of ``open_store``."""
        for holding in self._elections:
            holding.cancel()

    def _updater_behind(self, term: TermState | None) -> Updater:
        return Updater(
            self._replica,
            Lane(self._batcher, term),
            self.barrier,
            self._clock,
            self._follower.reached,
            chance=self._chance,
            term=term,
        )

    async def _reach_present(self) -> None:
        """One linearizable read, and the replica at its revision; tried again until the caller gives up."""
        backoff = Backoff(longest_s=1.0, chance=self._chance)
        request = pb.RangeRequest(key=etcd_key(keys.LEADER), count_only=True)
        while True:
            try:
                reply = await self._client.range(request)
            except Unavailable:
                await backoff.sleep(self._clock)
            else:
                return await self._follower.reached(reply.header.revision)


class Lane:
    """Proposals of one manager, or of one term of it.  Implements ``updates.Proposer``."""

    def __init__(self, batcher: Batcher, term: TermState | None) -> None:
        self._batcher = batcher
        self._term = term

    async def propose(self, proposals: Sequence[Proposal]) -> Sequence[Outcome | SkepError]:
        if self._term is None:
            return await self._batcher.propose(proposals)
        if self._term.is_lost:
            raise NotLeader("this term of leadership is over")
        # What may yet take effect is void as soon as this manager, or another one, has claimed the next term.
        outcomes = await self._batcher.propose(proposals, self._term)
        if any(isinstance(outcome, NotLeader | Uncertain) for outcome in outcomes):
            self._term.lose()
        return outcomes


class SharedBarrier:
    """Lets all who wait share round trips: one that began before a caller came does not count for it.

    Whoever finds no round trip on its way makes the next one, for all who wait by then.
    """

    def __init__(self, round_trip: Callable[[], Awaitable[None]]) -> None:
        self._round_trip = round_trip
        self._turn = asyncio.Lock()
        self._begun = 0
        self._passed = 0

    async def passed(self) -> None:
        """Return when a round trip that began after this call has ended.  Raises: what it raises."""
        needed = self._begun + 1
        while self._passed < needed:
            async with self._turn:
                if self._passed >= needed:
                    return
                self._begun += 1
                mine = self._begun
                await self._round_trip()
                self._passed = max(self._passed, mine)


@asynccontextmanager
async def open_store(
    socket: Path,
    node_id: NodeId,
    wrapping_key: bytes,
    clock: Clock,
    *,
    chance: Callable[[], float] = random.random,
    watch_capacity: int = CAPACITY,
    quota_bytes: int = QUOTA_BYTES,
) -> AsyncIterator[EtcdStore]:
    """The store behind a ready member's ``socket``, with everything loaded.  Raises: as ``store_on``."""
    async with (
        Client(socket) as client,
        store_on(
            *(client, node_id, wrapping_key, clock),
            chance=chance,
            watch_capacity=watch_capacity,
            quota_bytes=quota_bytes,
        ) as store,
    ):
        yield store


@asynccontextmanager
async def store_on(
    client: Client,
    node_id: NodeId,
    wrapping_key: bytes,
    clock: Clock,
    *,
    chance: Callable[[], float] = random.random,
    watch_capacity: int = CAPACITY,
    quota_bytes: int = QUOTA_BYTES,
) -> AsyncIterator[EtcdStore]:
    """The store behind an open ``client``, with everything loaded; a simulation brings a client of its own.

    Raises: founding.Unfinished: there is no cluster in it; FailedPrecondition: it is not for this version, or
    not for this key; Unavailable.  Whatever fails later in the background ends the block.
    """
    found = await founded(client)
    cipher = Cipher(found.ring, wrapping_key, found.ring_revision)
    replica = Replica(watch_capacity)
    batcher = Batcher(
        client,
        cipher,
        replica,
        keys.ticket_key(node_id),
        clock,
        lambda: Backoff(longest_s=1.0, chance=chance),
    )
    follower = Follower(
        client, replica, cipher, batcher.observe, clock, Backoff(longest_s=1.0, chance=chance)
    )
    async with errors_as_they_are(), asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(follower.run(), name="store-follower"),
            group.create_task(batcher.run(), name="store-batcher"),
        ]
        await follower.wait_loaded()
        store = EtcdStore(
            client, replica, follower, batcher, cipher, clock, group, chance, found.incarnation, quota_bytes
        )
        try:
            yield store
        finally:
            for task in tasks:
                task.cancel()
            store.end_elections()
