"""The store of one manager on its own etcd member, with its replica, group commit, barrier and terms."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.groups import errors_as_they_are
from skep.errors import Unavailable
from skep.model.values.ids import NodeId
from skep.store import keys
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd import past
from skep.store.etcd.batcher import Batcher
from skep.store.etcd.client import EtcdClient
from skep.store.etcd.election import Election
from skep.store.etcd.encryption.cipher import Cipher
from skep.store.etcd.encryption.rotation import KeyRotation
from skep.store.etcd.errors import Compacted
from skep.store.etcd.initialize import cluster_in
from skep.store.etcd.reflector import Reflector
from skep.store.etcd.requests import etcd_key
from skep.store.interface import HistoryGone, Term, View
from skep.store.leadership import TermState, leader_named
from skep.store.replica import Replica
from skep.store.space import COMPACT_AT, QUOTA_BYTES, MemberSpace
from skep.store.transactions.updates import FencedTerm, Updater, within_deadline

PROBE = "probe/space"
SPACE_S = 0.25
"""Maximum age in seconds of a cached ``MemberSpace``, while usage is below ``COMPACT_AT``."""


class Replication(NamedTuple):
    """The connection between a store and its etcd.  The reflector fills the replica, and the batcher writes."""

    client: EtcdClient
    cipher: Cipher
    replica: Replica
    reflector: Reflector
    batcher: Batcher


class EtcdStore(Updater):
    """Implements ``interface.Store``.  Made by ``open_store``.

    Args:
        group: Task group in which the elections run.
    """

    def __init__(
        self,
        replication: Replication,
        clock: Clock,
        group: asyncio.TaskGroup,
        rng: Callable[[], float],
        *,
        incarnation: int,
        quota_bytes: int,
        is_only_member: Callable[[], bool],
    ) -> None:
        self.client, self.cipher, replica, self._reflector, self._batcher = replication
        super().__init__(
            replica, self._batcher.propose, self.barrier, self._reflector.wait_reached, clock, rng=rng
        )
        self.incarnation = incarnation
        self._quota_bytes = quota_bytes
        self._is_only_member = is_only_member
        self._space: tuple[float, MemberSpace] | None = None
        self._space_changes = 0
        """Number of calls that have changed the used space.  Measurements from before the last change are discarded."""
        self._compacted = 0
        self._group = group
        self._elections: set[asyncio.Task[None]] = set()
        self._rotation = KeyRotation(self.client, self.cipher, clock)
        self._round_trips = SharedBarrier(self._reach_present)

    async def barrier(self) -> None:
        """Make one linearizable read for all concurrent callers, then wait for the replica at its revision.

        Not needed while ``_shows_everything``.
        """
        if self._shows_everything:
            return
        async with within_deadline():
            await self._round_trips.wait_passed()

    async def terms(self, node_id: NodeId, addr: str) -> AsyncIterator[Term]:
        """Yield terms.  The election runs as a task of the store's group, and ends with the iterator."""
        election = Election(self.client, self.cipher, node_id, addr, self._clock, self._is_only_member)
        terms: asyncio.Queue[TermState] = asyncio.Queue()

        async def hold_elections() -> None:
            async with asyncio.TaskGroup() as group:
                async for state in election.win_terms(Backoff(longest_s=1.0, rng=self._rng)):
                    terms.put_nowait(state)
                    rotating = self._rotation.run(state, rng=self._rng)
                    group.create_task(rotating, name="store-keys")

        holding = self._group.create_task(hold_elections(), name="store-election")
        self._elections.add(holding)
        try:
            while True:
                state = await terms.get()
                await self._reflector.wait_reached(state.fence)
                if not state.is_lost:
                    yield self.fenced(state)
        finally:
            self._elections.discard(holding)
            holding.cancel()

    @property
    def leader(self) -> NodeId | None:
        """The leader named by this replica's leader key, or None."""
        return leader_named(self.replica.leader_record)

    @property
    def _shows_everything(self) -> bool:
        """Whether the replica is known to show every acknowledged write, so that no round trip is needed.

        With a single member, all writes were acknowledged by this store, or by an earlier process before this store was
        loaded.
        """
        return (
            self._is_only_member()
            and self._reflector.is_current
            and self.replica.revision >= self._batcher.acknowledged
        )

    @property
    def is_current(self) -> bool:
        """Whether the watch is open.  It is not while the member is down or has no leader."""
        return self._reflector.is_current

    async def rotate_data_key(self) -> None:
        await self._rotation.begin()

    async def space(self) -> MemberSpace:
        """Return the used space by etcd's status, cached for ``SPACE_S``."""
        now = self._clock.monotonic()
        if self._space is not None and now - self._space[0] < SPACE_S and self._space[1].share < COMPACT_AT:
            return self._space[1]
        changes = self._space_changes
        status = await self.client.status()
        space = MemberSpace(
            size=status.db_size,
            in_use=status.db_size_in_use,
            quota=self._quota_bytes,
            has_alarm=any("NOSPACE" in error for error in status.errors),
        )
        if changes == self._space_changes:
            self._space = now, space
        return space

    async def compact(self, kept_revisions: int) -> bool:
        """Compact etcd, and write once, because freed pages count as in use until the next write."""
        revision = self.replica.revision - kept_revisions
        is_more = revision > self._compacted
        if is_more:
            with suppress(Compacted):  # by etcd itself, or by an earlier leader
                await self.client.compact(revision)
            self._compacted = revision
        # On each member, freed pages count as in use until the next write after its compaction.
        written = await self.client.put(etcd_key(PROBE), b"")
        if written.header.revision == self._compacted + 1:
            self._compacted += (
                1  # nothing else was written in between, so no further history can be discarded
            )
        return is_more

    async def state_at(self, revision: int) -> View:
        """Read the state at ``revision`` from etcd's history."""
        try:
            return await past.state_at(self.client, self.cipher.wrapping_key, revision)
        except Compacted as error:
            raise HistoryGone(f"the store no longer has revision {revision}") from error

    async def oldest_revision(self) -> int:
        return await past.oldest_revision(self.client, self.replica.revision)

    async def defragment(self) -> None:
        """Defragment this manager's own member, and measure the next ``space`` again."""
        await self.client.defragment()
        self._measure_anew()

    async def disarm(self) -> None:
        """Clear etcd's alarm, and measure the next ``space`` again, so that the leader notices that the alarm is
        over.
        """
        await self.client.disarm()
        self._measure_anew()

    def _measure_anew(self) -> None:
        """Forget the last measurement of the space, and ignore a measurement in progress."""
        self._space = None
        self._space_changes += 1

    @property
    def wrapping_key(self) -> bytes:
        """The key that the data keys in the store are wrapped with."""
        return self.cipher.wrapping_key

    @property
    def is_rotating(self) -> bool:
        """Whether there may be values encrypted with an older data key."""
        return len(self.cipher.ring.keys) > 1

    @property
    def unreadable_values(self) -> tuple[str, ...]:
        """Keys of values that no data key decrypts.  Known once all other values are encrypted with the newest key."""
        return self._rotation.unreadable

    def learn_wrapping_key(self, key: bytes) -> None:
        """Also accept data keys that are wrapped with ``key``."""
        self.cipher.learn(key)

    async def wait_rewrapped(self) -> bytes:
        """Return the wrapping key once it differs from the one of the last call."""
        await self.cipher.rewrapped.wait()
        self.cipher.rewrapped.clear()
        return self.cipher.wrapping_key

    async def replace_wrapping_key(self, term: Term, key: bytes) -> None:
        """Wrap the data keys with ``key``, which every manager must have, and encrypt everything with a new one.

        Raises:
            NotLeader: ``term`` is over.
            Unavailable: The store did not respond.
        """
        assert isinstance(term, FencedTerm), "terms of this store"
        await self._rotation.replace_wrapping_key(term.fence, key)

    def end_elections(self) -> None:
        """End all elections, at the end of ``open_store``."""
        for holding in self._elections:
            holding.cancel()

    async def _reach_present(self) -> None:
        """Make a linearizable read, and wait for the replica at its revision.  Retried until the caller's deadline."""
        backoff = Backoff(longest_s=1.0, rng=self._rng)
        request = pb.RangeRequest(key=etcd_key(keys.LEADER), count_only=True)
        while True:
            try:
                reply = await self.client.range(request)
            except Unavailable:
                await backoff.sleep(self._clock)
            else:
                return await self._reflector.wait_reached(reply.header.revision)


class SharedBarrier:
    """Lets concurrent callers share round trips.  A round trip serves only callers that were waiting when it began.

    If none is in flight, a caller starts the next one, which serves all callers that wait by then.
    """

    def __init__(self, round_trip: Callable[[], Awaitable[None]]) -> None:
        self._round_trip = round_trip
        self._turn = asyncio.Lock()
        self._begun = 0
        self._passed = 0

    async def wait_passed(self) -> None:
        """Wait until a round trip that began after this call has ended.  Raises its errors."""
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
    rng: Callable[[], float] = random.random,
    quota_bytes: int = QUOTA_BYTES,
    is_only_member: Callable[[], bool] = bool,
) -> AsyncIterator[EtcdStore]:
    """Open the store behind a ready member's ``socket``, and load everything.  Raises the same errors as
    ``store_on``.
    """
    async with (
        EtcdClient(socket) as client,
        store_on(
            *(client, node_id, wrapping_key, clock),
            rng=rng,
            quota_bytes=quota_bytes,
            is_only_member=is_only_member,
        ) as store,
    ):
        yield store


@asynccontextmanager
async def store_on(
    client: EtcdClient,
    node_id: NodeId,
    wrapping_key: bytes,
    clock: Clock,
    *,
    rng: Callable[[], float] = random.random,
    quota_bytes: int = QUOTA_BYTES,
    is_only_member: Callable[[], bool] = bool,
) -> AsyncIterator[EtcdStore]:
    """Open the store behind an open ``client``, and load everything.  A simulation passes its own client.

    Args:
        is_only_member: Returns whether the client's member is the only one of its cluster, and this store its only
            writer.  The result may change from True to False, but never back.  By default that is unknown.

    Raises:
        initialize.Unfinished: It holds no cluster.
        FailedPrecondition: This version cannot read it, or the wrapping key is wrong.
        Unavailable: The store did not respond.

    A later failure in the background ends the block.
    """
    cluster = await cluster_in(client)
    cipher = Cipher(cluster.ring, wrapping_key, cluster.ring_revision)
    replica = Replica()
    batcher = Batcher(
        client,
        cipher,
        replica,
        keys.writer_epoch_key(node_id),
        clock,
        lambda: Backoff(longest_s=1.0, rng=rng),
    )
    reflector = Reflector(client, replica, cipher, batcher.observe, clock, Backoff(longest_s=1.0, rng=rng))
    async with errors_as_they_are(), asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(reflector.run(), name="store-reflector"),
            group.create_task(batcher.run(), name="store-batcher"),
        ]
        await reflector.wait_loaded()
        store = EtcdStore(
            Replication(client, cipher, replica, reflector, batcher),
            clock,
            group,
            rng,
            incarnation=cluster.incarnation,
            quota_bytes=quota_bytes,
            is_only_member=is_only_member,
        )
        try:
            yield store
        finally:
            for task in tasks:
                task.cancel()
            store.end_elections()
