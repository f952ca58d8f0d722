"""Consensus without messages: the leader, the committed entries, and the progress of each member.

No messages are exchanged and no log is kept.  There is one history of keys (``KeyValues``), and for each member the
revision up to which its disk holds it.  Raft's guarantees are computed from the links at each step.  An entry is
committed when more than half of the voters are connected to the leader.  A member becomes the leader when more than
half of the voters would vote for it.  A voter does so if it reaches no leader and its disk holds no later entry.  So a
partitioned leader commits nothing and resigns after an election timeout (check-quorum).  The entries it had accepted
are lost, or survive if the next leader had received them.  Their proposers cannot see which.

Source: etcd 3.5, raft with PreVote and CheckQuorum.  See docs/design/store.md.
"""

import asyncio
from collections.abc import Callable, Iterable
from itertools import takewhile
from random import Random

from sim.etcd.kv import KeyValues
from sim.etcd.member import Entry, Leadership, Member, resolve
from sim.etcd.space import Space
from sim.world.links import Links, Port
from skep.model.values.ids import NodeId
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.errors import Uncertain, error_of

REFUSED_S = 0.0002
"""Duration of a refused connection, so that time passes for a caller that retries in a loop."""
PROMOTED_AT = 0.9
"""Part of the history that a learner must have to be promoted.  Source: etcd 3.5, server/etcdserver/server.go."""
ELECTION_S = (0.5, 1.0)
"""Time without a leader until a member campaigns, and time without a quorum until a leader resigns."""

Committed = Callable[[NodeId, int, "list[pb.Event]"], None]
"""Called with each entry that changed keys: its proposer, its revision and its events."""


class Raft:
    """All members of one cluster."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, random: Random, links: Links, latency_s: float
    ) -> None:
        """``latency_s``: average duration of a commit when all members are reachable."""
        self.kv = KeyValues()
        self.space = Space()
        self.members: dict[NodeId, Member] = {}
        self._numbered = 0
        self.committed: list[Committed] = []
        self.moved: list[Callable[[NodeId, int], None]] = []
        """Called with each new leader and its term."""
        self.current: Leadership | None = None
        """The leadership of the latest term."""
        self.requested_at = 0.0
        """When the last committed entry was proposed."""
        self.loop = loop
        self._later = loop.call_later
        self._now = loop.time
        self._random = random
        self._links = links
        self.latency_s = latency_s
        self._term = 0
        self._older: list[Leadership] = []
        self._orphans: list[Entry] = []
        """Uncommitted entries of the last leader, which the next one may have received."""
        self._changed: list[asyncio.Future[None]] = []
        links.changed.append(self.reevaluate)

    # -- members -------------------------------------------------------------------------------------------

    def add(self, id: NodeId, *, is_voter: bool = True) -> Member:
        """Add a stopped member."""
        self._numbered += 1
        member = self.members[id] = Member(id, self._numbered)
        member.is_voter = is_voter
        return member

    def start(self, id: NodeId, *, less: int = 0) -> None:
        """Start a stopped member from its disk.  At first it has applied ``less`` fewer revisions than are there."""
        member = self.members[id]
        member.is_running = True
        member.applied = max(min(member.applied, member.logged - less), self.kv.compacted, 1)
        self.reevaluate()

    def promote(self, id: NodeId) -> bool:
        """Make a learner a voter, and return True, if it has caught up far enough."""
        member = self.members[id]
        if not member.is_running or member.applied < PROMOTED_AT * self.kv.revision:
            return False
        member.is_voter = True
        self.reevaluate()
        return True

    def remove(self, id: NodeId) -> None:
        """Remove a member and end its process."""
        self.crash(id)
        del self.members[id]
        self.reevaluate()

    def restore(self, id: NodeId, revision: int) -> None:
        """Make one member the only one, from a snapshot of ``revision``.  No member may be running."""
        self.kv = self.kv.as_of(revision)
        self._older, self._orphans = [], []
        self.members = {id: Member(id, self.members[id].number)}
        self.members[id].logged = self.members[id].applied = revision

    def corrupt(self, id: NodeId, key: bytes) -> bool:
        """Flip a bit of the value of ``key`` on the disk of one member.  Return whether there is a value.

        The member's manager reads it at the next load of the store: at a start, or after a compaction that it has
        missed.
        """
        found = self.kv.range(pb.RangeRequest(key=key), self.kv.revision).kvs
        for kv in found:
            self.members[id].corrupted[key] = kv.mod_revision
        return bool(found)

    def crash(self, id: NodeId) -> None:
        """Kill a member with SIGKILL, which fails its pending requests."""
        member = self.members[id]
        member.is_running = False
        for stream in list(member.watchers):
            stream.lose("the store is gone")
        if member.held:
            member.held.clear()  # never written
        self._lose_responses(member)
        if member.leadership is not None and member.leadership.member is member:
            self._end(member.leadership)
        member.leadership = None
        self.reevaluate()

    def reset_connections(self, id: NodeId) -> None:
        """Break the connections to a running member.  The pending proposals continue."""
        member = self.members[id]
        for stream in list(member.watchers):
            stream.lose("connection reset")
        self._lose_responses(member)

    def numbered(self, number: int) -> Member:
        """Return the member with this etcd id.  Raises: NoMember."""
        found = [member for member in self.members.values() if member.number == number]
        if not found:
            raise error_of("etcdserver: member not found")
        return found[0]

    @property
    def voters(self) -> list[Member]:
        return [member for member in self.members.values() if member.is_voter]

    @property
    def majority(self) -> int:
        """Return the smallest number of voters that is more than half."""
        return len(self.voters) // 2 + 1

    @property
    def has_quorum(self) -> bool:
        """Return whether there is a leader that can commit."""
        return self.current is not None and self._can_commit(self.current)

    def transfer(self, id: NodeId) -> bool:
        """Transfer leadership to ``id``, as before an orderly stop.  Return whether that was possible."""
        old, member = self.current, self.members[id]
        if old is None or member is old.member or not self._votes(member, moving=True):
            return False
        self._elect(member)
        return True

    # -- writing -------------------------------------------------------------------------------------------

    async def write(self, member: Member, request: pb.TxnRequest) -> pb.TxnResponse:
        """Propose ``request`` through ``member``, and return when ``member`` has applied it.

        May never return, if the leader has died or is partitioned.

        Raises: Uncertain: ``member`` crashed.  Busy: it has no leader, so raft drops the proposal.  OutOfSpace: the
        quota is reached, and the request has a put outside of a nested transaction.
        """
        await self._wait_connected(member)
        if self.space.has_alarm and any(one.HasField("request_put") for one in request.success):
            raise error_of("etcdserver: mvcc: database space exceeded")
        if member.leadership is None:
            await asyncio.sleep(REFUSED_S)
            raise error_of("etcdserver: raft proposal dropped")
        entry = Entry(member, request, self.loop.create_future(), self._now())
        member.entries.append(entry)
        leadership = member.leadership
        if leadership is not None and self._links.reaches(member.id, leadership.member.id, Port.PEER):
            delay_s = self.latency_s * self._random.uniform(0.5, 1.5) + leadership.member.stall_s
            leadership.free_at = max(leadership.free_at, self._now() + delay_s)
            self._later(leadership.free_at - self._now(), lambda: self._append(leadership, entry))
        try:
            return await entry.response_future
        finally:
            if entry in member.entries:
                member.entries.remove(entry)

    async def _wait_connected(self, member: Member) -> None:
        """Fail like a refused connection if the member does not run.  Raises: Uncertain."""
        if not member.is_running:
            await asyncio.sleep(REFUSED_S)
            raise Uncertain("the store does not respond: connection refused")

    def _lose_responses(self, member: Member) -> None:
        entries, member.entries = member.entries, []
        for entry in entries:
            if not entry.response_future.done():
                entry.response_future.set_exception(Uncertain("the store does not respond: connection lost"))

    def hang(self, id: NodeId) -> None:
        """Block the disk of a member until ``resume``.  A leader stays leader."""
        member = self.members[id]
        if member.held is None:
            member.held = []

    def resume(self, id: NodeId) -> None:
        """Write all waiting entries, in order."""
        member = self.members.get(id)
        if member is None:
            return  # the member was removed meanwhile
        held, member.held = member.held or [], None
        for leadership, entry in held:
            self._append(leadership, entry)

    def _append(self, leadership: Leadership, entry: Entry) -> None:
        if leadership.is_over:
            return  # dropped: etcd sends no response
        leader = leadership.member
        if leader.held is not None:
            leader.held.append((leadership, entry))
            return
        reached = (other for other in self._running() if self._links.reaches(leader.id, other.id, Port.PEER))
        entry.holders = {leader.id, *(other.id for other in reached)}
        leadership.pending.append(entry)
        self._advance(leadership)

    def _advance(self, leadership: Leadership) -> None:
        """Commit pending entries while there is a quorum."""
        while leadership.pending and not leadership.is_over and self._can_commit(leadership):
            entry = leadership.pending.pop(0)
            before = self.kv.revision
            response = self.kv.execute(entry.request)
            revision = self.kv.revision
            self._apply(leadership.member, revision)
            self._spread(leadership, late=True)
            self.requested_at = entry.requested_at
            if revision > before:
                for committed in self.committed:
                    committed(entry.origin.id, revision, self.kv.events(revision, revision))
            self._respond(entry, response, revision)

    def _respond(self, entry: Entry, response: pb.TxnResponse, revision: int) -> None:
        """Complete ``entry``, which is committed, once its origin has applied it."""
        response_future = entry.response_future

        def give() -> None:
            if not response_future.done():
                response_future.set_result(response)

        if entry.origin.applied >= revision:
            give()
        else:
            arrived: asyncio.Future[None] = self.loop.create_future()
            arrived.add_done_callback(lambda _: give())
            entry.origin.waiting.append((revision, arrived))

    def _spread(self, leadership: Leadership, *, late: bool) -> None:
        """Replicate the committed entries to the other members."""
        leader, revision = leadership.member, self.kv.revision
        for member in self._running():
            if member.applied < revision and self._links.is_joined(leader.id, member.id, Port.PEER):
                delay_s = self.latency_s * 0.3 + member.lag_s if late else member.lag_s
                self._later(delay_s, lambda member=member: self._catch_up(member, revision))  # type: ignore[misc]

    def _catch_up(self, member: Member, revision: int) -> None:
        if member.is_running:
            self._apply(member, revision)

    def _apply(self, member: Member, revision: int) -> None:
        if revision <= member.applied:
            return
        member.applied = revision
        member.logged = max(member.logged, revision)
        due = [future for wanted, future in member.waiting if wanted <= revision]
        if due:
            member.waiting = [one for one in member.waiting if one[0] > revision]
        for future in due:
            resolve(future)
        for stream in member.watchers:
            stream.show(revision, member.watch_lag_s)

    # -- reading -------------------------------------------------------------------------------------------

    async def wait_readable(self, member: Member) -> None:
        """Return when ``member`` has applied everything that was committed before this call.  May never return."""
        await self._wait_connected(member)
        while True:
            leadership = member.leadership
            if (
                leadership is not None
                and leadership is self.current
                and self._links.is_joined(member.id, leadership.member.id, Port.PEER)
                and self._can_commit(leadership)
            ):
                return await member.wait_applied(self.kv.revision)
            await self.wait_changed()

    async def wait_changed(self, timeout_s: float | None = None) -> None:
        """Return after the next change between members, or after ``timeout_s``."""
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changed.append(waiting)
        timer = None
        if timeout_s is not None:
            timer = asyncio.get_running_loop().call_later(timeout_s, resolve, waiting)
        try:
            await waiting
        finally:
            if timer is not None:
                timer.cancel()
            if waiting in self._changed:
                self._changed.remove(waiting)

    # -- elections -----------------------------------------------------------------------------------------

    def reevaluate(self) -> None:
        """Update followers, detect lost leaders and quorums, and resume commits, after a change of members or links."""
        if self.current is not None:
            self._lead(self.current)
        for old in list(self._older):
            if self._is_outdated(old):
                self._end(old)
        for leadership in (*self._older, *([self.current] if self.current else [])):
            if not self._can_commit(leadership):
                self._schedule_quorum_check(leadership)
        for member in self._running():
            if not self._has_leader(member):
                self._campaign(member)
        changed, self._changed = self._changed, []
        for waiting in changed:
            resolve(waiting)

    def _lead(self, leadership: Leadership) -> None:
        """Let reachable members follow the leader and catch up."""
        for member in self._running():
            if (
                self._links.reaches(leadership.member.id, member.id, Port.PEER)
                and member.term <= leadership.term
            ):
                own = member.leadership
                if own is not None and own is not leadership and own.member is member:
                    self._end(own)
                member.leadership, member.term = leadership, leadership.term
        self._spread(leadership, late=False)
        self._advance(leadership)

    def _is_outdated(self, leadership: Leadership) -> bool:
        """Return whether a member of a later term reaches the leader."""
        others = (
            other
            for other in self._running()
            if self._links.reaches(other.id, leadership.member.id, Port.PEER)
        )
        return any(other.term > leadership.term for other in others)

    def _can_commit(self, leadership: Leadership) -> bool:
        leader = leadership.member
        followers = (
            member.is_voter
            and member.term <= leadership.term
            and self._links.is_joined(leader.id, member.id, Port.PEER)
            for member in self._running()
        )
        return leader.is_running and not leadership.is_over and sum(followers) >= self.majority

    def _schedule_quorum_check(self, leadership: Leadership) -> None:
        if leadership.is_checking_quorum or leadership.is_over:
            return
        leadership.is_checking_quorum = True

        def decide() -> None:
            leadership.is_checking_quorum = False
            if not leadership.is_over and not self._can_commit(leadership):
                self._end(leadership)
                self.reevaluate()

        self._later(self._random.uniform(*ELECTION_S), decide)

    def _end(self, leadership: Leadership) -> None:
        if leadership.is_over:
            return
        leadership.is_over = True
        if self.current is leadership:
            self._orphans = leadership.pending
            self.current = None
        else:
            self._older.remove(leadership)
        leadership.pending = []
        if leadership.member.leadership is leadership:
            self._forget_leader(leadership.member)

    def _has_leader(self, member: Member) -> bool:
        leadership = member.leadership
        return (
            leadership is not None
            and not leadership.is_over
            and leadership.member.is_running
            and self._links.reaches(leadership.member.id, member.id, Port.PEER)
        )

    def _campaign(self, member: Member) -> None:
        """After an election timeout without a leader, let ``member`` campaign; repeat until there is a leader."""
        if member.is_campaigning:
            return
        member.is_campaigning = True

        def decide() -> None:
            member.is_campaigning = False
            if not member.is_running or self._has_leader(member):
                return
            self._forget_leader(member)
            if self._votes(member):
                self._elect(member)
            else:
                self._campaign(member)

        self._later(self._random.uniform(*ELECTION_S), decide)

    def _forget_leader(self, member: Member) -> None:
        member.leadership = None
        for stream in list(member.watchers):
            stream.lose("no leader")

    def _votes(self, candidate: Member, *, moving: bool = False) -> bool:
        """Return whether more than half of the voters would vote for ``candidate``.

        A member writes its vote to its disk before it sends it, including the vote for itself.  So a member whose disk
        hangs neither votes nor wins.
        """
        if not candidate.is_voter or not candidate.is_running or candidate.held is not None:
            return False
        votes = sum(
            voter.is_running
            and voter.held is None
            and self._links.is_joined(candidate.id, voter.id, Port.PEER)
            and voter.logged <= candidate.logged
            and (moving or not self._has_leader(voter))
            for voter in self.voters
        )
        return votes >= self.majority

    def _elect(self, member: Member) -> None:
        self._term += 1
        received, old = self._orphans, self.current
        self._orphans = []
        if old is not None:
            received = [*received, *old.pending]
            old.pending = []
            self._older.append(old)
        leadership = self.current = Leadership(self._term, member)
        member.leadership, member.term = leadership, self._term
        leadership.pending = list(takewhile(lambda entry: member.id in entry.holders, received))
        for moved in self.moved:
            moved(member.id, self._term)
        self.reevaluate()

    def _running(self) -> Iterable[Member]:
        return [member for member in self.members.values() if member.is_running]
