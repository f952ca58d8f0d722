"""What two forwarders agree on, and what an enemy between them achieves: nothing."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.dataplane.encrypted import frames
from skep.dataplane.encrypted.peer import RETRY_S_MAX, Peer
from skep.model.pair_keys import PairKey
from tests.unit.dataplane.encrypted.rig import Ends, a_key, mirrored

PIECE = 1472


def opened(receiver: Peer, datagram: bytes) -> bytes | None:
    """What a unit of one piece gives at its receiver; None: dropped."""
    header = frames.parse(memoryview(datagram))
    if header is None:
        return None
    opener = receiver.opener(header.epoch, header.session)
    if opener is None or not opener.may_open(header.counter):
        return None
    return opener.open(header.counter, frames.associated(header), datagram[frames.HEADER.size :])


def one_from(sender: Peer, content: bytes = b"content") -> bytes:
    assert sender.sealer is not None
    (datagram,) = sender.sealer.seal(4097, content, PIECE)
    return datagram


def test_two_ends_agree_in_three_messages_and_understand_each_other() -> None:
    ends = Ends()
    ends.deliver("b", ends.b_at_a.due(0.0))
    assert [to for to, _ in ends.said] == ["b", "a", "b"]
    assert ends.is_agreed
    assert opened(ends.a_at_b, one_from(ends.b_at_a)) == b"content"
    assert opened(ends.b_at_a, one_from(ends.a_at_b, b"back")) == b"back"


def test_both_may_begin_at_once() -> None:
    ends = Ends()
    ends.talk()
    assert ends.is_agreed
    assert opened(ends.a_at_b, one_from(ends.b_at_a)) == b"content"


def test_nothing_is_sent_before_both_have_agreed() -> None:
    ends = Ends()
    assert ends.b_at_a.sealer is None
    ends.deliver("b", None)
    assert not ends.is_agreed


def test_greetings_that_get_lost_are_said_again_within_bounds() -> None:
    ends = Ends()
    times = []
    while ends.now < 20:
        if ends.b_at_a.due(ends.now) is not None:
            times.append(ends.now)
        ends.now += 0.01
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert all(gap <= RETRY_S_MAX + 0.02 for gap in gaps)
    assert 10 < len(times) < 30


@given(st.integers(0, 10_000), st.data())
def test_a_flipped_bit_anywhere_drops_the_unit(seed: int, data: st.DataObject) -> None:
    ends = Ends(seed=seed)
    ends.talk()
    datagram = bytearray(one_from(ends.b_at_a, b"x" * 100))
    bit = data.draw(st.integers(0, len(datagram) * 8 - 1))
    datagram[bit // 8] ^= 1 << bit % 8
    assert opened(ends.a_at_b, bytes(datagram)) is None


@given(st.integers(0, 126))
def test_a_truncated_unit_is_dropped(length: int) -> None:
    ends = Ends()
    ends.talk()
    datagram = one_from(ends.b_at_a, b"x" * 87)
    assert len(datagram) == 127
    assert opened(ends.a_at_b, datagram[:length]) is None


def test_a_unit_is_opened_once() -> None:
    ends = Ends()
    ends.talk()
    datagram = one_from(ends.b_at_a)
    assert opened(ends.a_at_b, datagram) == b"content"
    assert opened(ends.a_at_b, datagram) is None


def test_units_that_overtake_one_another_are_all_opened() -> None:
    ends = Ends()
    ends.talk()
    datagrams = [one_from(ends.b_at_a, bytes((number,))) for number in range(100)]
    ends.random.shuffle(datagrams)
    assert {opened(ends.a_at_b, one) for one in datagrams} == {bytes((number,)) for number in range(100)}


def test_a_node_cannot_be_spoken_for_by_another() -> None:
    """A third node has other keys with B; what it makes of them, even of A's own X25519 key, is nothing in A's name."""
    ends, strangers = Ends(), Ends(keys=[PairKey(1, b"?" * 32, b"!" * 32)])
    assert strangers.b_at_a.public == ends.b_at_a.public
    greeting = strangers.b_at_a.due(0.0)
    assert greeting is not None
    assert ends.a_at_b.greeted(memoryview(greeting), 0.0) == (False, None)
    ends.talk()
    strangers.talk()
    assert strangers.is_agreed
    assert opened(strangers.a_at_b, one_from(strangers.b_at_a)) == b"content"
    assert opened(ends.a_at_b, one_from(strangers.b_at_a)) is None


def test_what_a_node_sent_is_nothing_when_it_comes_back_to_it() -> None:
    ends = Ends()
    ends.talk()
    assert opened(ends.b_at_a, one_from(ends.b_at_a)) is None


def test_an_old_greeting_changes_nothing() -> None:
    """Everything that was ever said is said again, to both, after A has begun anew."""
    ends = Ends()
    ends.talk()
    old = list(ends.said)
    ends.b_at_a = ends.a_peer("b", ends.keys)
    ends.talk(0.3)
    assert ends.is_agreed
    for to, datagram in old:
        receiver = ends.a_at_b if to == "b" else ends.b_at_a
        receiver.greeted(memoryview(datagram), ends.now)
    assert opened(ends.a_at_b, one_from(ends.b_at_a)) == b"content"
    assert opened(ends.b_at_a, one_from(ends.a_at_b)) == b"content"


def test_an_old_greeting_that_is_repeated_for_ever_gets_few_answers() -> None:
    ends = Ends()
    ends.talk()
    first = ends.said[0][1]
    answers = [ends.a_at_b.greeted(memoryview(first), ends.now)[1] for _ in range(1000)]
    assert sum(answer is not None for answer in answers) <= 10


@given(st.binary(max_size=300))
def test_noise_is_no_greeting(noise: bytes) -> None:
    ends = Ends()
    greeting = b"\x01\x01\x00\x00\x00\x00\x00\x01" + noise
    for datagram in (noise, greeting):
        assert ends.a_at_b.greeted(memoryview(datagram), 0.0) == (False, None)


def test_after_a_restart_both_go_on_and_nothing_from_before_is_accepted() -> None:
    ends = Ends()
    ends.talk()
    before = one_from(ends.b_at_a)
    unused = one_from(ends.b_at_a, b"recorded, never delivered")
    assert opened(ends.a_at_b, before) == b"content"
    ends.a_at_b = ends.a_peer("a", mirrored(ends.keys))
    ends.talk(0.3)
    assert ends.is_agreed
    assert opened(ends.a_at_b, before) is None
    assert opened(ends.a_at_b, unused) is None
    assert opened(ends.a_at_b, one_from(ends.b_at_a)) == b"content"


def test_no_nonce_is_used_twice_with_one_key() -> None:
    """Over restarts of either end, rotations, and peers that go and come back: (session's keys, counter) is new."""
    ends = Ends((1, 2, 3))
    used: set[tuple[bytes, bytes, int, int]] = set()
    restarts = 0
    for newest in range(3, 40):
        ends.tell((newest - 2, newest - 1, newest))
        if ends.random.random() < 0.3:
            ends.b_at_a = ends.a_peer("b", [a_key(epoch) for epoch in ends.b_at_a.epochs])
            restarts += 1
        ends.talk(0.4)
        assert ends.is_agreed
        for sender, receiver in ((ends.b_at_a, ends.a_at_b), (ends.a_at_b, ends.b_at_a)):
            for _ in range(3):
                header = frames.parse(memoryview(one_from(sender)))
                assert header is not None
                nonce = (sender.public, receiver.public, header.epoch, header.counter)
                assert nonce not in used
                used.add(nonce)
    assert restarts > 3


def test_the_new_key_is_used_only_when_the_other_has_it_and_nothing_is_lost() -> None:
    ends = Ends((1, 2))
    ends.talk()
    for newest in range(3, 20):
        epochs = (newest - 2, newest - 1, newest)
        first_is_a = bool(newest % 2)
        in_flight = [one_from(ends.b_at_a) for _ in range(5)]
        ends.tell(epochs, a=first_is_a, b=not first_is_a)
        ends.talk(0.5)
        for sender, receiver in ((ends.b_at_a, ends.a_at_b), (ends.a_at_b, ends.b_at_a)):
            datagram = one_from(sender)
            parsed = frames.parse(memoryview(datagram))
            assert parsed is not None
            assert parsed.epoch == newest - 1, "only one of them has been told"
            assert opened(receiver, datagram) == b"content"
        in_flight += [one_from(ends.b_at_a) for _ in range(5)]
        ends.tell(epochs)
        ends.talk(3.0)
        assert all(opened(ends.a_at_b, one) == b"content" for one in in_flight)
        parsed = frames.parse(memoryview(one_from(ends.b_at_a)))
        assert parsed is not None
        assert parsed.epoch == newest


def test_a_node_that_missed_two_rotations_is_still_understood_and_after_three_it_is_not() -> None:
    ends = Ends((1, 2, 3))
    ends.talk()
    ends.tell((3, 4, 5), b=False)
    ends.talk()
    assert opened(ends.a_at_b, one_from(ends.b_at_a)) == b"content"
    ends.tell((4, 5, 6), b=False)
    ends.talk()
    assert ends.b_at_a.sealer is None
    assert opened(ends.b_at_a, one_from(ends.a_at_b)) is None


def test_an_epoch_that_was_dropped_never_comes_back() -> None:
    ends = Ends((1, 2, 3))
    ends.talk()
    recorded = one_from(ends.b_at_a)
    assert opened(ends.a_at_b, recorded) == b"content"
    ends.tell((4, 5, 6))
    ends.tell((1, 2, 3))
    ends.talk()
    assert opened(ends.a_at_b, recorded) is None
    assert ends.a_at_b.epochs == ()


@pytest.mark.parametrize("side", ["a", "b", "both"])
def test_nodes_that_shared_no_network_for_a_while_agree_again_in_the_same_epoch(side: str) -> None:
    ends = Ends()
    ends.talk()
    assert ends.is_agreed
    before = {ends.b_at_a.public, ends.a_at_b.public}
    ends.tell((), a=side != "b", b=side != "a")
    assert not ends.is_agreed
    ends.talk()
    ends.tell((1,))
    ends.talk(20.0)
    assert ends.is_agreed
    assert {ends.b_at_a.public, ends.a_at_b.public} != before, "no counter of the old session is taken again"


def test_an_epoch_that_was_dropped_for_a_later_one_stays_dropped_without_any_key_between() -> None:
    ends = Ends(epochs=(1,))
    ends.tell((2,))
    ends.tell(())
    ends.tell((1,))
    ends.talk(5.0)
    assert not ends.is_agreed
