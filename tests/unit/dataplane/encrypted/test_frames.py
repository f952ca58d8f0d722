"""The bytes of datagrams: what is cut can be put together, and what is malformed is noticed."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.dataplane.encrypted import frames
from skep.dataplane.encrypted.reassembly import UNITS_MAX, Reassembly
from skep.dataplane.encrypted.replay import WINDOW, ReplayWindow


def header(**fields: int) -> bytes:
    usual = {"position": 0, "pieces": 1, "network": 4097, "epoch": 1, "session": 7, "counter": 5} | fields
    return frames.HEADER.pack(frames.VERSION, frames.PIECE, *usual.values())


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_frames_that_are_packed_come_out_again(those: list[bytes]) -> None:
    assert [bytes(frame) for frame in frames.unpack(memoryview(frames.pack(those)))] == those


@given(st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=5), st.data())
def test_content_that_ends_early_gives_what_is_whole_and_no_more(
    those: list[bytes], data: st.DataObject
) -> None:
    packed = frames.pack(those)
    end = data.draw(st.integers(0, len(packed)))
    found = [bytes(frame) for frame in frames.unpack(memoryview(packed)[:end])]
    assert found == those[: len(found)]


@given(sealed=st.binary(min_size=1, max_size=20_000), piece=st.integers(512, 2000), data=st.data())
def test_pieces_in_any_order_give_the_unit(sealed: bytes, piece: int, data: st.DataObject) -> None:
    count = -(-len(sealed) // (piece - frames.HEADER.size))
    pieces = frames.cut(header(pieces=count), sealed, piece)
    assert len(pieces) == count
    assert all(len(one) == piece for one in pieces[:-1])
    reassembly = Reassembly()
    whole = None
    for one in data.draw(st.permutations(pieces)):
        assert whole is None
        parsed = frames.parse(memoryview(one))
        assert parsed is not None
        assert frames.associated(parsed) == header(pieces=count)
        whole = reassembly.add(parsed, [one[frames.HEADER.size :]])
    assert whole is not None
    assert b"".join(whole) == sealed


def test_a_full_packet_of_the_inner_mtu_fills_exactly_one_piece() -> None:
    for is_ipv6, mtu in ((False, 1404), (True, 1384)):
        assert frames.inner_mtu(1500, is_ipv6=is_ipv6) == mtu
        piece = frames.piece_bytes(1500, is_ipv6=is_ipv6)
        frame = bytes(frames.VNET_BYTES + frames.ETHERNET_BYTES + mtu)
        assert len(frames.pack([frame])) == frames.room(piece)
        assert frames.count_of(len(frames.pack([frame])), piece) == 1


def test_the_largest_frame_has_few_enough_pieces_on_the_smallest_underlay() -> None:
    content = frames.LENGTH.size + frames.FRAME_BYTES_MAX
    assert frames.count_of(content, frames.PIECE_BYTES_MIN) <= frames.PIECES_MAX


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        header(),
        b"\x02" + header()[1:] + b"x",
        header()[:1] + b"\x07" + header()[2:] + b"x",
        header(position=1, pieces=1) + b"x",
        header(position=0, pieces=0) + b"x",
    ],
    ids=["empty", "no content", "version", "kind", "position", "no pieces"],
)
def test_what_is_malformed_has_no_header(datagram: bytes) -> None:
    assert frames.parse(memoryview(datagram)) is None


def test_a_run_of_pieces_is_recognized_and_ends_where_another_unit_begins() -> None:
    one = frames.cut(header(pieces=4), bytes(4000), 1024)
    other = frames.cut(header(pieces=4, counter=6), bytes(4000), 1024)
    parsed = frames.parse(memoryview(one[0]))
    assert parsed is not None

    def run(those: list[bytes]) -> int:
        return frames.run_length(b"".join(those), 0, 1024, parsed)

    assert run(one) == 4
    assert run(one[:3]) == 3
    assert run([*one[:3], *one[3:], *other]) == 4
    assert run([one[0], one[2], one[1], one[3]]) == 1
    assert run([one[0], other[1], one[2], one[3]]) == 1


@given(st.lists(st.integers(0, 3 * WINDOW), max_size=300), st.randoms())
def test_each_counter_is_taken_once_and_old_ones_never(counters: list[int], chance: random.Random) -> None:
    window = ReplayWindow()
    taken: set[int] = set()
    for counter in [*counters, *chance.sample(counters, len(counters))]:
        expected = counter not in taken and counter > max(taken, default=-1) - WINDOW
        assert window.may_open(counter) == expected
        if expected:
            window.mark(counter)
            taken.add(counter)


def test_units_that_are_never_completed_give_way_and_are_counted() -> None:
    def at(counter: int, position: int) -> frames.Header:
        return frames.Header(frames.VERSION, frames.PIECE, position, 2, 4097, 1, 7, counter)

    reassembly = Reassembly()
    for counter in range(UNITS_MAX + 3):
        assert reassembly.add(at(counter, 0), [b"x"]) is None
    assert reassembly.lost == 3
    assert reassembly.add(at(UNITS_MAX + 2, 1), [b"y"]) == [b"x", b"y"]
    assert reassembly.add(at(0, 1), [b"y"]) is None, "its first half gave way"


@given(st.integers(0, 2**64 - 1))
def test_an_echo_repeats_its_number_and_is_no_longer(number: int) -> None:
    asked, answer = frames.echo_question(number), frames.echo_answer(number)
    assert len(asked) == len(answer)
    assert frames.echo_asked(asked) == number
    assert frames.echo_asked(answer) is None
    assert frames.parse(memoryview(asked)) is None


@given(st.binary(max_size=40))
def test_what_is_no_echo_is_none(garbage: bytes) -> None:
    is_one = len(garbage) == 16 and garbage[:2] == bytes((frames.VERSION, frames.ECHO))
    assert (frames.echo_asked(garbage) is not None) == is_one
