"""From one TAP to another, with sockets in place of TAPs: what is carried, what is dropped, and under which name."""

import socket
import struct
import threading
from collections.abc import Iterator
from ipaddress import IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.dataplane.encrypted import frames
from skep.dataplane.encrypted.answers import answer, is_neighbours_talk
from skep.dataplane.encrypted.peer import Peer
from skep.dataplane.encrypted.receiving import Receiver
from skep.dataplane.encrypted.routes import Carrier, Routes
from skep.dataplane.encrypted.sending import Sender
from tests.unit.dataplane.encrypted.rig import Ends

VNI = 4097
MAC_A, MAC_B, MAC_C = (bytes.fromhex(f"02420a4d000{number}") for number in (1, 2, 3))
PIECE = 1472
IPV4 = b"\x08\x00"


def a_frame(target: bytes, source: bytes, content: bytes = b"", kind: bytes = IPV4) -> bytes:
    return bytes(frames.VNET_BYTES) + target + source + kind + content


class Carrying:
    """Node A sends, node B receives; C's container is on a third node.  Datagrams stop in ``wire``."""

    def __init__(self) -> None:
        self.ends = Ends()
        self.ends.talk()
        self.tap_a, self.containers_a = _pair(socket.SOCK_SEQPACKET)
        self.tap_b, self.containers_b = _pair(socket.SOCK_SEQPACKET)
        self.wire = _udp()
        self.wire.settimeout(2)
        self.out = _udp()
        third = Ends().b_at_a
        self.sender = Sender(self.out, self.wire.getsockname()[1])
        self.ends.b_at_a.address = "127.0.0.1"
        self.carrier_a = Carrier(VNI, self.tap_a.fileno(), {MAC_B: self.ends.b_at_a}, {}, {bytes(4): MAC_B})
        macs: dict[bytes, Peer] = {MAC_A: self.ends.a_at_b, MAC_C: third}
        carrier_b = Carrier(VNI, self.tap_b.fileno(), {}, macs, {})
        routes = Routes(by_vni={VNI: carrier_b}, peers={"a": self.ends.a_at_b}, piece=PIECE)
        self.receiver = Receiver(self.out, lambda: routes, threading.Lock(), lambda: self.ends.now)

    def send(self, *those: bytes) -> list[bytes]:
        """The datagrams that carry these frames of A's containers."""
        for frame in those:
            self.containers_a.send(frame)
        before = self.sender.counters.units
        self.sender.turn(self.carrier_a, PIECE)
        datagrams: list[bytes] = []
        missing = self.sender.counters.units - before
        while missing:
            datagrams.append(self.wire.recv(1 << 16))
            header = frames.parse(memoryview(datagrams[-1]))
            assert header is not None
            missing -= header.position == header.pieces - 1
        return datagrams

    def receive(self, *datagrams: bytes, sender: str = "a") -> list[bytes]:
        """The frames that B's containers see of these."""
        for datagram in datagrams:
            self.receiver.receive(datagram, len(datagram), sender, (sender, 1))
        seen = []
        self.containers_b.settimeout(0)
        while True:
            try:
                seen.append(self.containers_b.recv(1 << 17))
            except BlockingIOError:
                return seen

    @property
    def dropped(self) -> dict[str, int]:
        return dict(self.receiver.counters.dropped)

    def close(self) -> None:
        for one in (
            self.tap_a,
            self.tap_b,
            self.containers_a,
            self.containers_b,
            self.wire,
            self.out,
        ):
            one.close()


def _pair(kind: int) -> tuple[socket.socket, socket.socket]:
    own, other = socket.socketpair(socket.AF_UNIX, kind)
    for one in (own, other):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
    own.setblocking(False)
    return own, other


def _udp() -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    opened.bind(("127.0.0.1", 0))
    return opened


@pytest.fixture
def carrying() -> Iterator[Carrying]:
    one = Carrying()
    yield one
    one.close()


def test_small_frames_that_wait_travel_together_and_arrive_in_order(carrying: Carrying) -> None:
    those = [a_frame(MAC_B, MAC_A, bytes((number,)) * 100) for number in range(30)]
    datagrams = carrying.send(*those)
    assert len(datagrams) == 3
    assert all(len(datagram) <= PIECE for datagram in datagrams)
    assert carrying.receive(*datagrams) == those


def test_a_small_frame_waits_for_no_other(carrying: Carrying) -> None:
    one = a_frame(MAC_B, MAC_A, b"alone")
    assert carrying.receive(*carrying.send(one)) == [one]


def test_frames_of_every_size_keep_their_order(carrying: Carrying) -> None:
    sizes = (10, 1404, 30_000, 1, 1405, 9000, 1380, 3, 5)
    those = [a_frame(MAC_B, MAC_A, bytes((number,)) * size) for number, size in enumerate(sizes)]
    assert carrying.receive(*carrying.send(*those)) == those


def test_a_lost_piece_loses_its_unit_alone(carrying: Carrying) -> None:
    large = [a_frame(MAC_B, MAC_A, bytes((number,)) * 20_000) for number in range(3)]
    datagrams = carrying.send(*large)
    middle = [one for one in datagrams if frames.HEADER.unpack_from(one)[7] % 2**32 == _second(datagrams)]
    datagrams.remove(middle[4])
    assert carrying.receive(*datagrams) == [large[0], large[2]]


def _second(datagrams: list[bytes]) -> int:
    counters = sorted({frames.HEADER.unpack_from(one)[7] for one in datagrams})
    return int(counters[1] % 2**32)


def test_the_largest_frame_of_a_tap_is_carried(carrying: Carrying) -> None:
    frame = a_frame(MAC_B, MAC_A, b"z" * 65_500)
    assert carrying.receive(*carrying.send(frame)) == [frame]


def test_pieces_in_reverse_order_give_the_frame(carrying: Carrying) -> None:
    frame = a_frame(MAC_B, MAC_A, b"z" * 30_000)
    assert carrying.receive(*reversed(carrying.send(frame))) == [frame]


def test_pieces_that_the_kernel_has_joined_are_taken_as_they_are(carrying: Carrying) -> None:
    frame = a_frame(MAC_B, MAC_A, b"z" * 30_000)
    joined = b"".join(carrying.send(frame))
    carrying.receiver.receive(joined, PIECE, "a", ("a", 1))
    assert carrying.receive() == [frame]


def test_a_piece_that_is_sent_again_gives_no_second_frame(carrying: Carrying) -> None:
    frame = a_frame(MAC_B, MAC_A, b"once" * 5000)
    datagrams = carrying.send(frame)
    assert carrying.receive(*datagrams, *datagrams) == [frame]
    assert carrying.dropped == {"replayed": len(datagrams)}


@given(st.integers(0, 20), st.integers(0, 1471))
def test_a_unit_cut_short_is_dropped(which: int, length: int) -> None:
    carrying = Carrying()
    try:
        datagrams = carrying.send(a_frame(MAC_B, MAC_A, b"z" * 30_000))
        assert len(datagrams) == 21
        cut = min(length, len(datagrams[which]) - 1)
        datagrams[which] = datagrams[which][:cut]
        assert carrying.receive(*datagrams) == []
    finally:
        carrying.close()


@given(st.integers(0, 20), st.integers(0, 1471 * 8))
def test_a_bit_flipped_in_any_piece_drops_the_unit(which: int, bit: int) -> None:
    carrying = Carrying()
    try:
        datagrams = carrying.send(a_frame(MAC_B, MAC_A, b"z" * 30_000))
        flipped = bytearray(datagrams[which])
        bit %= len(flipped) * 8
        flipped[bit // 8] ^= 1 << bit % 8
        datagrams[which] = bytes(flipped)
        assert carrying.receive(*datagrams) == []
    finally:
        carrying.close()


def test_a_stranger_is_dropped_whatever_it_sends(carrying: Carrying) -> None:
    (datagram,) = carrying.send(a_frame(MAC_B, MAC_A, b"x"))
    assert carrying.receive(datagram, sender="c") == []
    assert carrying.dropped == {"stranger": 1}


def test_a_peer_speaks_for_its_own_containers_only(carrying: Carrying) -> None:
    datagrams = carrying.send(a_frame(MAC_B, MAC_C, b"not mine"), a_frame(MAC_B, MAC_B, b"yours"))
    assert carrying.receive(*datagrams) == []
    assert carrying.dropped == {"another's address": 2}


def test_a_network_that_the_receiver_has_not_is_dropped(carrying: Carrying) -> None:
    assert carrying.ends.b_at_a.sealer is not None
    content = frames.pack([a_frame(MAC_B, MAC_A, b"x")])
    assert carrying.receive(*carrying.ends.b_at_a.sealer.seal(VNI + 1, content, PIECE)) == []
    assert carrying.dropped == {"unknown network": 1}


def test_an_unknown_epoch_is_dropped_counted_and_asked_about(carrying: Carrying) -> None:
    datagrams = carrying.send(a_frame(MAC_B, MAC_A, b"x"))
    carrying.ends.tell((5,), a=False)
    carrying.ends.talk(0.1)
    assert carrying.receive(*datagrams) == []
    assert carrying.dropped["unknown epoch"] == 1
    carrying.ends.now += 5
    assert carrying.ends.a_at_b.due(carrying.ends.now) is not None


@given(st.binary(max_size=200), st.integers(1, 100))
def test_noise_delivers_nothing_and_harms_nothing(noise: bytes, segment: int) -> None:
    carrying = Carrying()
    try:
        for datagram in (noise, b"\x01\x00" + noise, b"\x01\x01" + noise):
            carrying.receiver.receive(datagram, segment, "a", ("a", 1))
        one = a_frame(MAC_B, MAC_A, b"still well")
        assert carrying.receive(*carrying.send(one)) == [one]
    finally:
        carrying.close()


def test_frames_for_nobody_stay_here(carrying: Carrying) -> None:
    assert carrying.send(a_frame(MAC_C, MAC_A, b"x"), a_frame(b"\xff" * 6, MAC_A, b"x")) == []
    assert dict(carrying.sender.counters.dropped) == {"nobody's address": 1}


def test_nothing_goes_to_a_peer_that_has_not_agreed(carrying: Carrying) -> None:
    carrying.ends.b_at_a.sealer = None
    assert carrying.send(a_frame(MAC_B, MAC_A, b"x")) == []
    assert dict(carrying.sender.counters.dropped) == {"not agreed": 1}


# --- who has this address? --------------------------------------------------------------------------------------


def arp(operation: int, sender: str, target: str) -> bytes:
    packet = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + MAC_A + ip_address(sender).packed
    return a_frame(b"\xff" * 6, MAC_A, packet + bytes(6) + ip_address(target).packed, b"\x08\x06")


def solicitation(sender: str, target: str) -> bytes:
    body = struct.pack("!BBHI", 135, 0, 0, 0) + ip_address(target).packed
    packet = struct.pack("!IHBB", 6 << 28, len(body), 58, 255) + ip_address(sender).packed + bytes(16)
    return a_frame(b"\x33\x33\xff\x00\x00\x01", MAC_A, packet + body, b"\x86\xdd")


NEIGHBOURS = {ip_address("10.77.0.2").packed: MAC_B, IPv6Address("fd00::2").packed: MAC_B}


def test_an_arp_question_is_answered_from_the_table() -> None:
    reply = answer(arp(1, "10.77.0.1", "10.77.0.2"), NEIGHBOURS)
    assert reply is not None
    assert reply[10:22] == MAC_A + MAC_B
    assert reply[24:] == bytes.fromhex("0001080006040002") + MAC_B + bytes((10, 77, 0, 2)) + MAC_A + bytes(
        (10, 77, 0, 1)
    )


@pytest.mark.parametrize(
    "frame",
    [
        arp(1, "10.77.0.1", "10.77.0.9"),
        arp(2, "10.77.0.1", "10.77.0.2"),
        arp(1, "10.77.0.2", "10.77.0.2"),
        arp(1, "10.77.0.1", "10.77.0.2")[:-1],
        solicitation("::", "fd00::2"),
        solicitation("fd00::1", "fd00::9"),
    ],
    ids=["unknown", "a reply", "its own", "cut short", "is it free?", "unknown, IPv6"],
)
def test_other_questions_are_not(frame: bytes) -> None:
    assert answer(frame, NEIGHBOURS) is None


def test_a_neighbour_solicitation_is_answered_with_a_right_checksum() -> None:
    reply = answer(solicitation("fd00::1", "fd00::2"), NEIGHBOURS)
    assert reply is not None
    packet = reply[24:]
    assert packet[8:40] == IPv6Address("fd00::2").packed + IPv6Address("fd00::1").packed
    assert packet[40] == 136
    assert packet[-6:] == MAC_B
    pseudo = packet[8:40] + struct.pack("!II", len(packet) - 40, 58) + packet[40:]
    total = sum(struct.unpack(f"!{len(pseudo) // 2}H", pseudo))
    assert (total & 0xFFFF) + (total >> 16) == 0xFFFF


def test_what_containers_say_of_addresses_never_crosses(carrying: Carrying) -> None:
    """Neither is it sent, nor taken from a node that sends it nevertheless: no spoofing over the network."""
    for frame in (arp(2, "10.77.0.1", "10.77.0.2"), solicitation("fd00::1", "fd00::2")):
        spoof = frame[:10] + MAC_B + frame[16:]
        assert is_neighbours_talk(spoof)
        assert carrying.send(spoof) == []
        assert carrying.ends.b_at_a.sealer is not None
        sealed = carrying.ends.b_at_a.sealer.seal(VNI, frames.pack([spoof]), PIECE)
        assert carrying.receive(*sealed) == []
    assert carrying.dropped == {"neighbours' talk": 2}
    assert not is_neighbours_talk(a_frame(MAC_B, MAC_A, b"E" * 60))
