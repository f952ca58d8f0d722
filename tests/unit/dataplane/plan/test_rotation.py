"""How a node's WireGuard keys follow each other: from handshakes and times to the key pairs that are used."""

from hashlib import sha256
from itertools import pairwise
from random import Random
from unittest.mock import patch

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from skep.dataplane.plan.rotation import (
    ALIVE_S,
    Handshake,
    KeyLifetimes,
    KeyUsage,
    Overlap,
    handshakes_of,
    next_pairs,
    noted,
    observed,
    usage_of_older,
)
from skep.dataplane.plan.wireguard import (
    FoundDevice,
    FoundPeer,
    Session,
    WireGuardKey,
    WireGuardPeer,
    chosen,
    plan_of,
)
from skep.model.values.ids import NodeId
from tests.support.encryption.wireguard import a_pair, a_secure_table, numbered_keys

N1, N2, N3 = NodeId("n1"), NodeId("n2"), NodeId("n3")
LIMITS = KeyLifetimes()
OWN, OWN_NEXT = a_pair(1), a_pair(11, slot=1)
THEIRS, THEIRS_NEXT, THIRD = a_pair(2), a_pair(12, slot=1), a_pair(3)
BOTH = (OWN, OWN_NEXT)


def peers_of(**pairs: tuple[WireGuardKey, ...]) -> dict[NodeId, tuple[WireGuardPeer, ...]]:
    table = a_secure_table({"n1": (OWN,), **pairs})
    return dict(plan_of(N1, (OWN,), [table]).peers)


def at(now: float, *sessions: tuple[WireGuardKey, WireGuardKey]) -> dict[Session, Handshake]:
    return {(own.public, peer.public): Handshake(stamp=now, changed_at=now) for own, peer in sessions}


class Machine:
    """The keys of one node, looked at as often as ``look`` is called."""

    def __init__(self, limits: KeyLifetimes = LIMITS, start: int = 1) -> None:
        self.limits = limits
        self.make = numbered_keys(start)
        self.pairs: tuple[WireGuardKey, ...] = ()
        self.overlap = Overlap()
        self.now = self.boot_s = 0.0
        self.look()

    def look(
        self,
        peers: dict[NodeId, tuple[WireGuardPeer, ...]] | None = None,
        handshakes: dict[Session, Handshake] | None = None,
        after: float = 0.0,
        suspended: float = 0.0,
    ) -> tuple[int, ...]:
        """The slots of the pairs, the oldest first, after another look."""
        self.now += after
        self.boot_s += after + suspended
        self.overlap = observed(self.overlap, self.pairs, peers or {}, handshakes or {}, self.now)
        self.pairs = next_pairs(
            self.pairs, self.overlap, self.make, boot_s=self.boot_s, now=self.now, limits=self.limits
        )
        return tuple(pair.slot for pair in self.pairs)

    def restarted(self) -> None:
        """The next node process: it has the file with the keys, and nothing else."""
        self.overlap = Overlap()


def rotating() -> tuple[Machine, WireGuardKey, WireGuardKey]:
    """A node whose second key was just made."""
    machine = Machine()
    assert machine.look(after=LIMITS.period_s) == (0, 1)
    return machine, *machine.pairs


def test_the_first_key_is_made_at_once_and_kept_until_it_is_due() -> None:
    machine = Machine()
    first = machine.pairs
    assert [(pair.slot, pair.made_at) for pair in first] == [(0, 0.0)]
    machine.look(after=LIMITS.period_s - 1)
    assert machine.pairs == first
    assert machine.look(after=1) == (0, 1)
    assert machine.pairs[0] == first[0]


def test_without_peers_keys_follow_each_other_in_turns_of_the_slots() -> None:
    machine = Machine()
    seen = [machine.look(after=100.0) for _ in range(int(3.5 * LIMITS.period_s / 100))]
    changes = [after for before, after in pairwise(seen) if before != after]
    assert changes == [(0, 1), (1,), (1, 0), (0,), (0, 1), (1,)]


def test_a_key_from_another_boot_is_replaced() -> None:
    """It was made later than now, in seconds since boot."""
    foreign = WireGuardKey(private=OWN.private, slot=0, made_at=5000.0)
    pairs = next_pairs((foreign,), Overlap(), numbered_keys(), boot_s=10.0, now=10.0, limits=LIMITS)
    assert [pair.made_at for pair in pairs] == [5000.0, 10.0]


def test_the_older_key_goes_a_while_after_the_last_peer_has_moved() -> None:
    """The last peer moves an hour after the key was made: what counts is the time since then."""
    machine, old, new = rotating()
    peers = peers_of(n2=(THEIRS,), n3=(THIRD,))
    before = at(machine.now, (old, THEIRS), (old, THIRD))
    one, all_moved = (
        before | at(machine.now, (new, THEIRS)),
        before | at(machine.now, (new, THEIRS), (new, THIRD)),
    )
    assert machine.look(peers, before) == (0, 1)
    assert machine.look(peers, one, after=3600.0) == (0, 1)
    assert machine.look(peers, all_moved, after=1.0) == (0, 1), "moved in this moment: the other side has not"
    assert machine.look(peers, all_moved, after=LIMITS.overlap_s - 1) == (0, 1)
    assert machine.look(peers, all_moved, after=1.0) == (1,)


def test_a_peer_that_falls_back_begins_the_time_anew() -> None:
    """It was rebooted, say: its new key has a session with the older key of this node first."""
    machine, old, new = rotating()
    moved = at(machine.now, (old, THEIRS), (new, THEIRS))
    machine.look(peers_of(n2=(THEIRS,)), moved)
    rebooted = peers_of(n2=(THEIRS_NEXT,))
    late = LIMITS.overlap_s + 1
    assert machine.look(rebooted, at(machine.now + late, (old, THEIRS_NEXT)), after=late) == (0, 1)
    assert machine.overlap.usage is KeyUsage.ALIVE
    both = at(machine.now, (old, THEIRS_NEXT), (new, THEIRS_NEXT))
    assert machine.look(rebooted, both, after=1.0) == (0, 1)
    assert machine.look(rebooted, both, after=LIMITS.overlap_s) == (1,)


def test_a_peer_that_learns_of_the_key_late_is_waited_for_and_so_is_the_next_rotation() -> None:
    """It exchanges packets by the older key for two days, since all managers are away."""
    machine, old, new = rotating()
    peers = peers_of(n2=(THEIRS,))
    for _ in range(int(2 * LIMITS.period_s / 100)):
        assert machine.look(peers, at(machine.now + 100.0, (old, THEIRS)), after=100.0) == (0, 1)
    assert machine.pairs == (old, new), "no third key: the second is not in use yet"
    moved = at(machine.now, (old, THEIRS), (new, THEIRS))
    assert machine.look(peers, moved) == (0, 1)
    assert machine.look(peers, moved, after=LIMITS.overlap_s) == (1,)
    assert machine.look(peers, moved, after=1.0) == (1, 0), "which was due long ago"
    assert machine.pairs[0] == new


def test_a_peer_that_refuses_the_newer_key_does_not_prevent_rotation_for_good() -> None:
    machine, old, _ = rotating()
    peers = peers_of(n2=(THEIRS,))
    machine.look(peers, at(machine.now, (old, THEIRS)))
    latest = at(machine.now + LIMITS.bound_s - 1, (old, THEIRS))
    assert machine.look(peers, latest, after=LIMITS.bound_s - 1) == (0, 1)
    assert machine.look(peers, latest, after=1.0) == (1,)


def test_a_peer_that_is_down_for_hours_finds_the_older_key_for_one_period_and_holds_up_nothing() -> None:
    machine, old, new = rotating()
    peers = peers_of(n2=(THEIRS,), n3=(THIRD,))
    sessions = at(machine.now, (old, THEIRS), (old, THIRD), (new, THIRD))
    hours = LIMITS.period_s - 1
    machine.look(peers, sessions)
    assert machine.look(peers, sessions, after=hours) == (0, 1)
    assert machine.overlap.usage is KeyUsage.SILENT
    assert machine.look(peers, sessions, after=1.0) == (1,)
    assert machine.look(peers, sessions, after=1.0) == (1, 0)


def test_a_peer_that_was_never_reached_needs_no_key() -> None:
    machine, *_ = rotating()
    peers = peers_of(n2=(THEIRS,))
    machine.look(peers)
    assert machine.look(peers, after=LIMITS.overlap_s) == (1,)


def test_a_session_with_another_key_than_the_one_that_is_sent_to_is_not_enough() -> None:
    """Both sides rotate at once: by (new, old) and (old, new) either could remove what the other counts on."""
    peers = peers_of(n2=(THEIRS, THEIRS_NEXT))
    crossed = at(0.0, (OWN_NEXT, THEIRS), (OWN, THEIRS_NEXT))
    assert usage_of_older(BOTH, peers, crossed, 1.0) is KeyUsage.ALIVE
    assert usage_of_older(BOTH, peers, crossed | at(0.0, (OWN_NEXT, THEIRS_NEXT)), 1.0) is KeyUsage.UNUSED
    only_old = at(0.0, (OWN, THEIRS), (OWN_NEXT, THEIRS))
    assert usage_of_older(BOTH, peers, only_old, 1.0) is KeyUsage.UNUSED, (
        "nothing is sent to its newer key yet"
    )


def test_a_node_process_that_starts_in_the_middle_waits_again_and_makes_no_key() -> None:
    machine, old, new = rotating()
    peers, moved = peers_of(n2=(THEIRS,)), at(machine.now, (old, THEIRS), (new, THEIRS))
    machine.look(peers, moved)
    machine.restarted()
    assert machine.look(peers, moved, after=LIMITS.overlap_s - 1) == (0, 1)
    assert machine.look(peers, moved, after=LIMITS.overlap_s) == (1,)
    assert machine.pairs == (new,)


def test_keys_that_were_not_looked_at_are_not_removed() -> None:
    """After a start, until the devices were read."""
    assert next_pairs(BOTH, Overlap(), numbered_keys(), boot_s=1e9, now=1e9, limits=LIMITS) == BOTH
    other = Overlap(newest=OWN.public, usage=KeyUsage.UNUSED, unused_since=0.0)
    assert next_pairs(BOTH, other, numbered_keys(), boot_s=10.0, now=1e9, limits=LIMITS) == BOTH


def test_a_machine_that_was_suspended_for_hours_keeps_what_its_peers_used_before() -> None:
    """Seconds since boot have passed, the monotonic clock stood still: no peer was silent for the time."""
    machine, old, _ = rotating()
    peers, sessions = peers_of(n2=(THEIRS,)), at(machine.now, (old, THEIRS))
    assert machine.look(peers, sessions, after=1.0, suspended=3 * LIMITS.period_s) == (0, 1)
    assert machine.overlap.usage is KeyUsage.ALIVE


@pytest.mark.parametrize("jump", [-1e9, -3600.0, 3600.0, 1e9])
def test_a_jump_of_the_wall_clock_is_only_another_stamp(jump: float) -> None:
    session = (OWN.public, THEIRS.public)
    first = noted({}, {session: 1.7e9}, 100.0)
    assert noted(first, {session: 1.7e9}, 200.0) == first
    assert noted(first, {session: 1.7e9 + jump}, 200.0)[session].changed_at == 200.0


def test_a_peer_is_silent_when_its_handshake_was_not_renewed() -> None:
    peers, sessions = peers_of(n2=(THEIRS,)), at(100.0, (OWN, THEIRS))
    assert usage_of_older(BOTH, peers, sessions, 100.0 + ALIVE_S - 1) is KeyUsage.ALIVE
    assert usage_of_older(BOTH, peers, sessions, 100.0 + ALIVE_S) is KeyUsage.SILENT
    assert usage_of_older((OWN,), peers, sessions, 100.0) is KeyUsage.UNUSED


def test_handshakes_count_for_the_key_that_the_device_has() -> None:
    def device(pair: WireGuardKey) -> FoundDevice:
        found = {THEIRS.public: FoundPeer(handshake_at=7.0), THIRD.public: FoundPeer()}
        return FoundDevice(private=pair.private, peers=found)

    found = handshakes_of([device(OWN), device(a_pair(99))], BOTH)
    assert found == {(OWN.public, THEIRS.public): 7.0}, "not those of a foreign key, nor without a handshake"


# --- two nodes that rotate against each other -----------------------------------------------------------------


class SimulatedNode:
    """One of two nodes: what it has published reaches the other late."""

    def __init__(self, id: NodeId, other: NodeId, start: int) -> None:
        self.id, self.other = id, other
        self.machine = Machine(LIMITS, start)
        self.known: tuple[WireGuardKey, ...] = ()
        """The other's pairs, as of the last table; of which a node has the public part alone."""
        self.handshakes: dict[Session, Handshake] = {}

    def plan(self):  # type: ignore[no-untyped-def]
        own = self.machine.pairs
        return plan_of(self.id, own, [a_secure_table({self.id: own, self.other: self.known})])

    def hears(self, own: WireGuardKey, theirs: WireGuardKey, now: float) -> None:
        """A handshake is completed."""
        self.handshakes[own.public, theirs.public] = Handshake(stamp=now, changed_at=now)

    def look(self, after: float) -> None:
        live = {(own.public, peer.public) for own in self.machine.pairs for peer in self.known}
        self.handshakes = {session: one for session, one in self.handshakes.items() if session in live}
        self.machine.look(dict(self.plan().peers), self.handshakes, after=after)

    def sends_by(self) -> Session | None:
        """The session that its packets to the other node go by; None: it has none."""
        plan = self.plan()
        choice = chosen(plan, self.handshakes)
        address = choice.addresses.get(self.other)
        if address is None:
            return None
        peer = next(one.public for one in plan.peers[self.other] if one.inner == address)
        session = (plan.devices[choice.slots[address]].public, peer)
        return session if session in self.handshakes else None

    def accepts(self, session: Session) -> bool:
        """Whether a packet by this session of the other node is taken."""
        theirs, own = session
        return own in {pair.public for pair in self.machine.pairs} and theirs in {
            one.public for one in self.known
        }


def _cheap_public(pair: WireGuardKey) -> bytes:
    """In place of the real one, which takes most of the time."""
    return sha256(pair.private).digest()


@settings(max_examples=20, phases=(Phase.explicit, Phase.generate))
@given(st.integers(0, 2**32), st.floats(0.0, 6 * LIMITS.period_s))
def test_no_packet_is_lost_however_late_tables_are(seed: int, late_s: float) -> None:
    """Both nodes rotate all the time; a table arrives up to six days late."""
    with patch.object(WireGuardKey, "public", property(_cheap_public)):
        keys = _rotated_against_each_other(Random(seed), late_s)
    assert len(keys) >= 4


def _rotated_against_each_other(random: Random, late_s: float) -> set[bytes]:
    """All keys that two nodes used in twelve periods, in which nothing was lost."""
    one, other = SimulatedNode(N1, N2, 1), SimulatedNode(N2, N1, 1000)
    sides = ((one, other), (other, one))
    table_due = {N1: 0.0, N2: 0.0}
    now, has_begun, keys = 0.0, False, set[bytes]()
    while now < 12 * LIMITS.period_s:
        after = random.choice((20.0, 100.0, 0.1 * LIMITS.period_s))
        now += after
        for node, peer in sides:
            if now >= table_due[node.id]:
                node.known = peer.machine.pairs
                table_due[node.id] = now + random.uniform(0.0, late_s)
        for own in one.machine.pairs:
            for theirs in other.machine.pairs:
                if theirs in one.known and own in other.known:
                    one.hears(own, theirs, now)
                    other.hears(theirs, own, now)
        for node, _ in random.sample(sides, 2):
            node.look(after)
            keys |= {pair.public for pair in node.machine.pairs}
            for sender, receiver in sides:
                session = sender.sends_by()
                has_begun |= session is not None
                assert not has_begun or (session is not None and receiver.accepts(session))
    return keys
