"""Encrypted overlays between two nodes in namespaces: what passes on the wire, and what disturbs it.

The talk's sniff test: somebody listens on the underlay while one container sends a text to another on the other node.
"""

import asyncio
import itertools
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from bench.overlay_pair import DEVICE, VNI, OverlayPair, Side, overlay_pair, sh
from skep.aio.clock import SystemClock
from skep.errors import FailedPrecondition
from skep.node.network.encrypted.frames import GREETING, HEADER, PIECE, parse
from skep.node.network.namespaces import inside

pytestmark = pytest.mark.needs("root", "ip", "nsenter")

TEXT = b"the queen is dead, long live the queen "
PORT = 7000
CLOCK = SystemClock()
_ETH_P_ALL = 3
_OUTGOING = 4


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[OverlayPair]:
    with overlay_pair(tmp_path) as both:
        yield both


def sockets_of(source: Side, target: Side, kind: socket.SocketKind) -> tuple[socket.socket, socket.socket]:
    """A sender in one container, a receiver in the other; not connected yet."""
    out = inside(Path("/run/netns") / source.container, lambda: socket.socket(socket.AF_INET, kind))
    into = inside(Path("/run/netns") / target.container, lambda: socket.socket(socket.AF_INET, kind))
    into.bind((target.address, PORT))
    into.settimeout(5)
    out.settimeout(5)
    return out, into


def transfer(source: Side, target: Side, content: bytes) -> bytes:
    """What arrives of ``content`` over TCP."""
    out, into = sockets_of(source, target, socket.SOCK_STREAM)
    with out, into:
        into.listen()
        out.connect((target.address, PORT))
        connection, _ = into.accept()
        with connection:
            sending = threading.Thread(target=lambda: (out.sendall(content), out.close()))
            sending.start()
            received = bytearray()
            while part := connection.recv(1 << 20):
                received += part
            sending.join()
    return bytes(received)


@contextmanager
def captured(side: Side, device: str = "up0") -> Iterator[list[bytes]]:
    """All frames on a device of the node, both ways, while the block runs; whole once it has ended."""

    def opened() -> socket.socket:
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        raw.setsockopt(socket.SOL_SOCKET, 33, 32 << 20)  # SO_RCVBUFFORCE
        raw.bind((device, 0))
        return raw

    raw = inside(Path("/run/netns") / side.node, opened)
    raw.settimeout(0.1)
    seen: list[bytes] = []
    is_over = threading.Event()

    def read() -> None:
        while True:
            try:
                seen.append(raw.recv(1 << 17))
            except TimeoutError:
                if is_over.is_set():
                    return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield seen
    finally:
        is_over.set()
        reader.join()
        raw.close()


def udp_to(seen: list[bytes], port: int) -> list[bytes]:
    """The UDP payloads among the captured frames that go to ``port`` (IPv4)."""
    return [
        frame[42:]
        for frame in seen
        if frame[12:14] == b"\x08\x00"
        and frame[23] == socket.IPPROTO_UDP
        and frame[36:38] == port.to_bytes(2, "big")
    ]


async def dropped(pair: OverlayPair) -> list[Counter[str]]:
    """What each side has dropped until now.  The first greeting may come before its receiver knows of anybody."""
    return [Counter((await side.client.status()).counts.dropped) for side in (pair.a, pair.b)]


async def test_a_sniffer_sees_that_traffic_flows_and_not_what_it_says(pair: OverlayPair) -> None:
    await pair.encrypt()
    before = await dropped(pair)
    content = TEXT * 20_000
    with captured(pair.b) as seen:
        assert await asyncio.to_thread(transfer, pair.a, pair.b, content) == content
    assert await dropped(pair) == before
    datagrams = udp_to(seen, 4799)
    assert sum(map(len, datagrams)) > len(content), "all of it passed here"
    assert all(parse(memoryview(one)) or one[1] == GREETING for one in datagrams)
    assert udp_to(seen, 4789) == []
    wire = b"".join(seen)
    assert TEXT.strip() not in wire
    inner = (pair.a.mac, pair.b.mac, socket.inet_aton(pair.a.address), socket.inet_aton(pair.b.address))
    assert [one for one in inner if one in wire] == [], "nor who talks to whom"


async def test_the_plain_twin_shows_the_text(pair: OverlayPair) -> None:
    pair.carry_by_vxlan()
    content = TEXT * 20_000
    with captured(pair.b) as seen:
        assert await asyncio.to_thread(transfer, pair.a, pair.b, content) == content
    assert udp_to(seen, 4789)
    assert TEXT.strip() in b"".join(seen)


async def test_what_was_captured_and_is_sent_again_is_dropped(pair: OverlayPair) -> None:
    """Replayed, altered, from a stranger's address: the container sees each datagram once."""
    await pair.encrypt()
    _, before = await dropped(pair)
    out, into = sockets_of(pair.a, pair.b, socket.SOCK_DGRAM)
    with out, into:
        with captured(pair.b) as seen:
            out.sendto(TEXT, (pair.b.address, PORT))
            assert into.recv(2048) == TEXT
        recorded = [one for one in udp_to(seen, 4799) if one[1] == PIECE]
        assert recorded

        def from_here(address: str) -> socket.socket:
            raw = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            raw.bind((address, 0))
            return raw

        sh("ip", "-n", pair.a.node, "address", "add", "192.0.2.66/24", "dev", "up0")
        for address in (pair.a.underlay, "192.0.2.66"):
            with inside(Path("/run/netns") / pair.a.node, lambda address=address: from_here(address)) as raw:
                for one in recorded:
                    altered = bytearray(one)
                    altered[HEADER.size - 1] ^= 0x7F  # another counter: not seen yet
                    raw.sendto(one, (pair.b.underlay, 4799))
                    raw.sendto(altered, (pair.b.underlay, 4799))
        out.sendto(b"last", (pair.b.address, PORT))
        assert into.recv(2048) == b"last", "nothing of it came between"
    _, after = await dropped(pair)
    assert after - before == {
        "forged": len(recorded),
        "replayed": len(recorded),
        "stranger": 2 * len(recorded),
    }


class Pings:
    """UDP datagrams from one container to the other, one every few milliseconds, numbered."""

    def __init__(self, pair: OverlayPair) -> None:
        self._pair = pair
        self._is_over = threading.Event()
        self.sent = 0
        self.arrived: list[tuple[int, float]] = []

    @contextmanager
    def running(self) -> Iterator["Pings"]:
        out, into = sockets_of(self._pair.a, self._pair.b, socket.SOCK_DGRAM)
        into.settimeout(0.3)

        def send() -> None:
            while not self._is_over.wait(0.002):
                out.sendto(self.sent.to_bytes(4, "big"), (self._pair.b.address, PORT))
                self.sent += 1

        def receive() -> None:
            while True:
                try:
                    number = int.from_bytes(into.recv(64), "big")
                except TimeoutError:
                    if self._is_over.is_set():
                        return
                else:
                    self.arrived.append((number, CLOCK.monotonic()))

        threads = [threading.Thread(target=run) for run in (send, receive)]
        with out, into:
            for thread in threads:
                thread.start()
            try:
                yield self
            finally:
                self._is_over.set()
                for thread in threads:
                    thread.join()

    async def wait_arrived(self, more: int, within_s: float = 10.0) -> None:
        wanted = len(self.arrived) + more
        async with asyncio.timeout(within_s):
            while len(self.arrived) < wanted:
                await CLOCK.sleep(0.005)

    @property
    def longest_gap_s(self) -> float:
        times = [at for _, at in self.arrived]
        return max(after - before for before, after in itertools.pairwise(times))


@pytest.mark.timeout(60)
async def test_keys_change_under_load_without_a_loss(pair: OverlayPair) -> None:
    """Ten rotations, told to one node first, then to the other, while a counted stream and a TCP transfer go on."""
    await pair.encrypt((1, 2))
    _, before = await dropped(pair)
    epochs: set[int] = set()
    with Pings(pair).running() as pings:
        await pings.wait_arrived(20)
        for newest in range(3, 13):
            to_a, to_b = pair.keys((newest - 2, newest - 1, newest))
            turns = [(pair.a, pair.b, to_a), (pair.b, pair.a, to_b)]
            for side, other, keys in turns if newest % 2 else reversed(turns):
                await side.client.apply(side.plan(other, keys))
                await pings.wait_arrived(20)
            async with asyncio.timeout(10):
                while (status := await pair.a.client.status()).peers[0].epoch != newest:
                    await CLOCK.sleep(0.005)
            epochs.add(status.peers[0].epoch)
    assert epochs == set(range(3, 13))
    assert pings.sent > 400
    assert [number for number, _ in pings.arrived] == list(range(pings.sent))
    _, after = await dropped(pair)
    assert (after - before).keys() <= {"greeting refused"}, "under the newest key, before the other has it"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("which", ["sender", "receiver"])
async def test_a_killed_forwarder_is_back_within_two_seconds(pair: OverlayPair, which: str) -> None:
    """Restarted at once, as its supervisor does: it resumes its plan by itself, with a session of its own."""
    await pair.encrypt()
    victim = pair.a if which == "sender" else pair.b
    with captured(pair.b) as seen, Pings(pair).running() as pings:
        for _ in range(3):
            await pings.wait_arrived(50)
            victim.end_forwarder(signal.SIGKILL)
            victim.start_forwarder()
        await pings.wait_arrived(50)
        longest_s = pings.longest_gap_s
    assert longest_s < 2.0
    headers = [header for one in udp_to(seen, 4799) if (header := parse(memoryview(one)))]
    by_sender = [(frame[26:30], header) for frame in seen if (header := parse(memoryview(frame[42:])))]
    nonces = [(sender, one.epoch, one.session, one.counter, one.position) for sender, one in by_sender]
    assert len(set(nonces)) == len(nonces)
    assert len({header.session for header in headers}) == 4, "each life has sessions of its own"


async def test_nothing_passes_in_clear_or_otherwise_while_keys_do_not_match(pair: OverlayPair) -> None:
    for side in (pair.a, pair.b):
        side.start_forwarder()
    to_a, _ = pair.keys((1,))
    await pair.a.client.apply(pair.a.plan(pair.b, to_a))
    await pair.b.client.apply(pair.b.plan(pair.a, to_a))  # a's, which is wrong
    for side in (pair.a, pair.b):
        side.attach()
    out, into = sockets_of(pair.a, pair.b, socket.SOCK_DGRAM)
    with out, into, captured(pair.b) as seen:
        async with asyncio.timeout(10):
            while (await pair.a.client.status()).counts.dropped.get("not agreed", 0) < 5:
                out.sendto(TEXT, (pair.b.address, PORT))
                await CLOCK.sleep(0.01)
        into.settimeout(0)
        with pytest.raises(BlockingIOError):
            into.recv(100)
    assert not (await pair.a.client.status()).peers[0].is_agreed
    assert TEXT not in b"".join(seen)
    assert [one for one in udp_to(seen, 4799) if one[1] != GREETING] == []


async def test_a_deleted_device_is_made_anew(pair: OverlayPair) -> None:
    await pair.encrypt()
    sh("ip", "-n", pair.b.overlay, "link", "del", DEVICE)
    async with asyncio.timeout(5):
        while True:
            with suppress(Exception):
                pair.b.attach()
                break
            await CLOCK.sleep(0.05)
    content = os.urandom(100_000)
    assert await asyncio.to_thread(transfer, pair.a, pair.b, content) == content


async def test_an_address_that_is_not_the_nodes_is_refused_with_the_reason(pair: OverlayPair) -> None:
    pair.a.start_forwarder()
    plan = pair.a.plan(pair.b, pair.keys((1,))[0])
    wrong = plan.__class__(node_id=plan.node_id, address="203.0.113.9")
    with pytest.raises(
        FailedPrecondition, match=r"203\.0\.113\.9 port 4799/udp: Cannot assign requested address"
    ):
        await pair.a.client.apply(wrong)
    status = await pair.a.client.apply(plan)
    assert status.segments == (VNI,)


async def test_the_plan_lies_where_only_root_reads_it_and_goes_away_devices_stay(pair: OverlayPair) -> None:
    await pair.encrypt()
    assert pair.a.paths.forwarder_plan.stat().st_mode & 0o777 == 0o600
    assert pair.a.paths.forwarder_socket.stat().st_mode & 0o777 == 0o600
    pair.a.end_forwarder()
    assert DEVICE in sh("ip", "-n", pair.a.overlay, "-brief", "link")
