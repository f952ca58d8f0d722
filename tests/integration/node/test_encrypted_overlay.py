"""Encrypted overlays between two nodes in namespaces: what passes on the wire, and what disturbs it.

The talk's sniff test: somebody listens on the underlay while one container sends a text to another on the other node.
"""

import asyncio
import os
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from bench.overlay_pair import DEVICE, VNI, OverlayPair, overlay_pair, sh
from skep.dataplane.encrypted.frames import GREETING, HEADER, PIECE, parse
from skep.dataplane.netns.namespaces import inside
from skep.errors import FailedPrecondition
from tests.integration.node.encrypted_traffic import (
    CLOCK,
    PORT,
    TEXT,
    Pings,
    captured,
    sockets_of,
    transfer,
    udp_to,
)

pytestmark = pytest.mark.needs("root", "ip", "nsenter")


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[OverlayPair]:
    with overlay_pair(tmp_path) as both:
        yield both


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
