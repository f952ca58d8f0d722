"""Encrypted networks between two nodes: what passes on the wire, what disturbs it, and keys that change under load.

The sniff test: the underlay is captured while one container sends a text to another on the other node.
"""

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from skep.dataplane.netns.kernel.namespaces import inside
from skep.dataplane.plan.overlay import Underlay
from skep.dataplane.plan.rotation import KeyLifetimes
from skep.dataplane.plan.wireguard import WireGuardKey, device_name
from skep.dataplane.wireguard import keys as wireguard_keys
from skep.dataplane.wireguard.devices import SOCKETS
from skep.dataplane.wireguard.tunnels import Options
from skep.errors import SkepError
from skep.model.networks.tables import NetworkHead, NetworkTable
from skep.model.networks.wireguard import EncryptionMethod
from skep.model.values.ids import NodeId
from tests.support.encryption.encrypted_traffic import (
    CLOCK,
    PORT,
    TEXT,
    End,
    Pings,
    captured_in,
    sockets_of,
    transfer,
    udp_to,
)
from tests.support.encryption.secure_lab import SECURE_TWO, SecureLab, secure_lab, wait_reaches
from tests.support.networks.overlay_lab import LabNode, place, reaches, shell

pytestmark = [pytest.mark.needs("root", "ip", "nsenter", "wireguard-go"), pytest.mark.timeout(90)]

PLAIN_TWO = msgspec.structs.replace(SECURE_TWO, is_encrypted=False)
ADDRESSES = ("10.0.2.5", "10.0.2.6")
WIREGUARD, PLAIN_VXLAN = (4799, 4800), 4789
DAILY = KeyLifetimes()


class Pair(msgspec.Struct):
    """Two nodes with a container each."""

    secure: SecureLab
    ends: tuple[End, End]

    @property
    def nodes(self) -> list[LabNode]:
        return self.secure.lab.nodes

    @property
    def container(self):  # type: ignore[no-untyped-def]
        """The endpoint of the first node's."""
        return next(iter(self.nodes[0].endpoints.values()))

    def captured(self):  # type: ignore[no-untyped-def]
        """All that passes the second node's underlay."""
        return captured_in(self.nodes[1].home, "under")

    async def publish(self, *nodes: int) -> None:
        """The tables as managers send them, with the keys that the nodes publish by now; to ``nodes``, else to all."""
        self.secure.lab.tell(SECURE_TWO)
        networks = [self.secure.networks[number] for number in nodes] or self.secure.networks
        await self.secure.lab.apply(networks)


@asynccontextmanager
async def a_pair(
    root: Path,
    head: NetworkHead = SECURE_TWO,
    *,
    method: EncryptionMethod = EncryptionMethod.USER_SPACE,
    limits: KeyLifetimes = DAILY,
) -> AsyncIterator[Pair]:
    def timed(options: Options) -> Options:
        return msgspec.structs.replace(options, method=method, limits=limits)

    async with secure_lab(root, 2, options=timed) as secure:
        ends = [
            await node.attach(network, place(head, f"{address}/24"))
            for node, network, address in zip(secure.lab.nodes, secure.networks, ADDRESSES, strict=True)
        ]
        secure.lab.tell(head)
        await secure.lab.apply(secure.networks)
        await wait_reaches(ends[0], ADDRESSES[1])
        one, other = (End(Path(end.netns), address) for end, address in zip(ends, ADDRESSES, strict=True))
        yield Pair(secure, (one, other))


def encrypted(seen: list[bytes]) -> list[bytes]:
    """The datagrams to WireGuard's ports."""
    return [one for port in WIREGUARD for one in udp_to(seen, port)]


async def test_a_sniffer_sees_that_traffic_flows_and_not_what_it_says(tmp_path: Path) -> None:
    async with a_pair(tmp_path) as pair:
        content = TEXT * 20_000
        with pair.captured() as seen:
            assert await asyncio.to_thread(transfer, *pair.ends, content) == content
        assert sum(map(len, encrypted(seen))) > len(content), "all of it passed here"
        assert udp_to(seen, PLAIN_VXLAN) == []
        wire = b"".join(seen)
        assert TEXT.strip() not in wire
        inner = [socket.inet_aton(end.address) for end in pair.ends]
        assert [one for one in inner if one in wire] == [], "nor which containers talk to each other"


async def test_the_plain_twin_shows_the_text(tmp_path: Path) -> None:
    async with a_pair(tmp_path, PLAIN_TWO) as pair:
        content = TEXT * 20_000
        with pair.captured() as seen:
            assert await asyncio.to_thread(transfer, *pair.ends, content) == content
        assert udp_to(seen, PLAIN_VXLAN)
        assert TEXT.strip() in b"".join(seen)


async def test_what_was_captured_and_is_sent_again_is_dropped(tmp_path: Path) -> None:
    """Replayed or altered, from the node's address or a stranger's: the container sees each datagram once."""
    async with a_pair(tmp_path) as pair:
        out, into = sockets_of(*pair.ends, socket.SOCK_DGRAM)
        with out, into:
            with pair.captured() as seen:
                out.sendto(TEXT, (pair.ends[1].address, PORT))
                assert into.recv(2048) == TEXT
            recorded = [one for one in udp_to(seen, 4799) if len(one) > len(TEXT)]
            assert recorded
            source, target = pair.nodes
            await shell(source.home, "ip address add 192.0.2.66/24 dev under")
            for address in (source.underlay, "192.0.2.66"):
                with inside(source.home, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as raw:
                    raw.bind((address, 0))
                    for one in recorded:
                        altered = bytearray(one)
                        altered[-1] ^= 0x7F
                        raw.sendto(one, (target.underlay, 4799))
                        raw.sendto(altered, (target.underlay, 4799))
            out.sendto(b"last", (pair.ends[1].address, PORT))
            assert into.recv(2048) == b"last", "nothing of it came between"


async def test_plain_vxlan_that_is_injected_reaches_no_container(tmp_path: Path) -> None:
    """A frame of the network's VXLAN id, sent in clear to the ports of VXLAN outside and inside."""
    async with a_pair(tmp_path) as pair:
        source, target = pair.nodes
        (own,) = target.endpoints.values()
        mac = bytes.fromhex(own.endpoints[0].mac_address.replace(":", ""))
        packet = _udp_packet("10.0.2.5", "10.0.2.6", PORT, TEXT)
        frame = (
            b"\x08\0\0\0" + (4098).to_bytes(3, "big") + b"\0" + mac + b"\x02\x42\x0a\0\x02\x05\x08\0" + packet
        )
        out, into = sockets_of(*pair.ends, socket.SOCK_DGRAM)
        with out, into, inside(source.home, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as raw:
            for port in (4789, 4801):
                raw.sendto(frame, (target.underlay, port))
            out.sendto(b"last", (pair.ends[1].address, PORT))
            assert into.recv(2048) == b"last"


async def test_keys_change_under_load_without_a_loss(tmp_path: Path) -> None:
    async with a_pair(tmp_path, limits=KeyLifetimes(period_s=6.0, overlap_s=4.0)) as pair:
        await rotate_under_load(pair, 20.0)


async def rotate_under_load(pair: Pair, seconds: float) -> None:
    """Rotations of both nodes, published to one before the other, while a counted stream goes on; then a transfer."""
    used: set[bytes] = set()
    turn = 0
    with Pings(*pair.ends).running() as pings:
        began = CLOCK.monotonic()
        while CLOCK.monotonic() - began < seconds:
            turn += 1
            for number in (0, 1) if turn % 2 else (1, 0):
                await pair.publish(number)
                await pings.wait_arrived(20)
            used |= {one.key for node in pair.nodes for one in node.public_keys()}
    # Not beside the pings: a transfer fills the queues that they are in, and then the kernel drops some.
    content = TEXT * 20_000
    assert await asyncio.to_thread(transfer, *pair.ends, content) == content
    assert len(used) >= 6, "each node had three keys at least"
    assert [number for number, _ in pings.arrived] == list(range(pings.sent))
    assert pings.sent > 2000


async def test_a_peer_without_the_new_key_is_reached_with_the_older_one(tmp_path: Path) -> None:
    async with a_pair(tmp_path, limits=KeyLifetimes(period_s=3.0, overlap_s=0.5)) as pair:
        late = pair.nodes[0].public_keys()
        async with asyncio.timeout(10):
            while len(pair.nodes[0].public_keys()) < 2:
                await CLOCK.sleep(0.05)
        assert pair.nodes[0].public_keys()[0] == late[0]
        with Pings(*pair.ends).running() as pings:
            await pings.wait_arrived(300)
        assert pings.sent == len(pings.arrived), "no table has come since"
        await pair.publish()
        with Pings(*pair.ends).running() as pings:
            await pings.wait_arrived(300)
        assert pings.sent == len(pings.arrived)


async def test_a_peer_that_does_not_hear_of_new_keys_holds_up_no_packet_of_others(tmp_path: Path) -> None:
    """The third node has the first tables only, the others get every table: nothing is lost to either."""

    def timed(options: Options) -> Options:
        return msgspec.structs.replace(options, limits=KeyLifetimes(period_s=3.0, overlap_s=0.5))

    async with secure_lab(tmp_path, 3, options=timed) as secure:
        lab, networks = secure.lab, secure.networks
        addresses = (*ADDRESSES, "10.0.2.7")
        ends = [
            await node.attach(network, place(SECURE_TWO, f"{address}/24"))
            for node, network, address in zip(lab.nodes, networks, addresses, strict=True)
        ]
        lab.tell(SECURE_TWO)
        await lab.apply(networks)
        for address in addresses[1:]:
            await wait_reaches(ends[0], address)
        one, other, late = (
            End(Path(end.netns), address) for end, address in zip(ends, addresses, strict=True)
        )
        with Pings(one, other).running() as pings, Pings(one, late).running() as late_pings:
            began = CLOCK.monotonic()
            while CLOCK.monotonic() - began < 3 * 3.0:
                lab.tell(SECURE_TWO)
                await lab.apply(networks[:2])
                await pings.wait_arrived(20)
        assert len(lab.nodes[0].public_keys()) == 2, "the older one is in use, so there is no third"
        for stream in (pings, late_pings):
            assert [number for number, _ in stream.arrived] == list(range(stream.sent))


@pytest.mark.parametrize("which", ["sender", "receiver"])
async def test_a_killed_wireguard_go_is_back_within_three_seconds_and_nothing_leaves_in_clear(
    tmp_path: Path, which: str
) -> None:
    async with a_pair(tmp_path) as pair:
        victim = pair.nodes[0 if which == "sender" else 1]
        with pair.captured() as seen, Pings(*pair.ends).running() as pings:
            for _ in range(3):
                await pings.wait_arrived(50)
                pair.secure.processes[victim.id, 0].kill()
            await pings.wait_arrived(50)
            longest_s = pings.longest_gap_s
        assert longest_s < 3.0
        assert only_wireguard(seen)


async def test_nothing_leaves_while_there_is_no_device(tmp_path: Path) -> None:
    """The device is away and does not come back; the node even has a default route of IPv6."""
    async with a_pair(tmp_path) as pair:
        node = pair.nodes[0]
        await shell(
            node.home,
            "sysctl -qw net.ipv6.conf.all.disable_ipv6=0; ip -6 addr add fd09::1/64 dev under nodad",
        )
        await shell(node.home, "ip -6 route add default via fd09::2 dev under")
        process = pair.secure.processes[node.id, 0]
        process.stop()
        await shell(
            pair.secure.networks[0].tunnels.namespace, f"ip link del {device_name(node.paths.run, 0)}"
        )
        with pair.captured() as seen:
            assert not await reaches(pair.container, ADDRESSES[1])
        assert [frame for frame in seen if TEXT in frame or _is_udp(frame)] == []
        process.resume()
        await wait_reaches(pair.container, ADDRESSES[1])


async def test_nothing_passes_while_keys_do_not_match(tmp_path: Path) -> None:
    """The second node is published with a key that is not its own: it cannot prove to have it."""
    async with a_pair(tmp_path) as pair:
        (right,) = pair.nodes[1].public_keys()
        wrong = msgspec.structs.replace(right, key=bytes(31) + b"\x09")
        published, pair.nodes[1].public_keys = pair.nodes[1].public_keys, lambda: (wrong,)
        await pair.publish()
        with pair.captured() as seen:
            assert not await reaches(pair.container, ADDRESSES[1])
        assert {one[0] for one in encrypted(seen)} <= {1}, "handshakes alone, which nobody answers"
        pair.nodes[1].public_keys = published
        await pair.publish()
        await wait_reaches(pair.container, ADDRESSES[1])


async def test_a_node_that_is_gone_from_the_tables_is_no_peer_at_once(tmp_path: Path) -> None:
    """As after an eviction: it still has its keys, and nothing of it is taken any more."""
    async with a_pair(tmp_path) as pair:
        table = pair.secure.lab.tell(SECURE_TWO)
        gone = pair.nodes[1].id
        pair.secure.lab.tables[SECURE_TWO.id] = without_node(table, gone)
        await pair.secure.lab.apply(pair.secure.networks[:1])
        name = device_name(pair.nodes[0].paths.run, 0)
        async with asyncio.timeout(3):
            while "public_key" in await _shown(name):
                await CLOCK.sleep(0.02)
        out, into = sockets_of(pair.ends[1], pair.ends[0], socket.SOCK_DGRAM)
        with out, into:
            into.settimeout(0.5)
            out.sendto(TEXT, (pair.ends[0].address, PORT))
            with pytest.raises(TimeoutError):
                into.recv(2048)


async def test_a_node_process_that_follows_goes_on_with_keys_and_sessions(tmp_path: Path) -> None:
    """The first node's process ends, as by an orderly stop; its tunnels go on, and the next one changes nothing.

    Not even while it cannot read the keys.
    """

    def unreadable(_: Path) -> tuple[WireGuardKey, ...]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with secure_lab(tmp_path, 2) as secure:
        lab, networks = secure.lab, secure.networks
        one = await lab.nodes[0].attach(networks[0], place(SECURE_TWO, f"{ADDRESSES[0]}/24"))
        other = await lab.nodes[1].attach(networks[1], place(SECURE_TWO, f"{ADDRESSES[1]}/24"))
        lab.tell(SECURE_TWO)
        await lab.apply(networks)
        await wait_reaches(one, ADDRESSES[1])
        keys = lab.nodes[0].public_keys()
        process = secure.processes["n1", 0].process
        source, target = End(Path(one.netns), ADDRESSES[0]), End(Path(other.netns), ADDRESSES[1])
        with Pings(source, target).running() as pings:
            await pings.wait_arrived(50)
            await secure.stop(0)
            await pings.wait_arrived(50)
            async with lab.nodes[0].running() as network:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(wireguard_keys, "load", unreadable)
                    with pytest.raises(SkepError, match="WireGuard keys cannot be read: Too many open files"):
                        await network.overlays.apply(lab.id_of(network), lab.tables, frozenset(lab.tables))
                    assert lab.nodes[0].public_keys() == keys
                    await pings.wait_arrived(50)
                await network.overlays.apply(lab.id_of(network), lab.tables, frozenset(lab.tables))
                assert lab.nodes[0].public_keys() == keys
                await pings.wait_arrived(300)
        assert pings.sent == len(pings.arrived)
        assert secure.processes["n1", 0].process is process, "it was not started anew"


async def test_a_device_that_is_not_wanted_any_more_while_it_is_configured_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last table goes in the middle of a step; the tunnels are removed, and made again when it is back."""
    async with a_pair(tmp_path) as pair:
        node, tunnels = pair.nodes[0], pair.secure.networks[0].tunnels
        settled = tunnels.settle

        async def settle_and_lose() -> None:
            await settled()
            tunnels.settle = settled  # type: ignore[method-assign]
            await tunnels.apply(node.id, [], Underlay(node.underlay))

        tunnels.settle = settle_and_lose  # type: ignore[method-assign]
        async with asyncio.timeout(20):
            while tunnels.namespace.exists():
                await CLOCK.sleep(0.05)
        await tunnels.apply(node.id, pair.secure.lab.tables.values(), Underlay(node.underlay))
        name = device_name(node.paths.run, 0)
        async with asyncio.timeout(20):
            while not (SOCKETS / f"{name}.sock").exists() or "public_key" not in await _shown(name):
                await CLOCK.sleep(0.05)
    assert "KeyError" not in capsys.readouterr().out


def without_node(table: NetworkTable, gone: NodeId) -> NetworkTable:
    """The table when that node takes no part any more."""
    nodes = {id: node for id, node in table.nodes.items() if id != gone}
    return msgspec.structs.replace(table, nodes=nodes)


def only_wireguard(seen: list[bytes]) -> bool:
    """Whether all UDP among the captured frames goes to WireGuard's ports."""
    return all(_is_wireguards(frame) for frame in seen if _is_udp(frame))


def _udp_packet(source: str, target: str, port: int, content: bytes) -> bytes:
    """IPv4, without a UDP checksum."""
    length = 28 + len(content)
    words = [0x4500, length, 0, 0, 64 << 8 | socket.IPPROTO_UDP, 0]
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    words += [int.from_bytes(addresses[at : at + 2], "big") for at in range(0, 8, 2)]
    total = sum(words)
    words[5] = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    words += [port, port, length - 20, 0]
    return b"".join(word.to_bytes(2, "big") for word in words) + content


def _is_udp(frame: bytes) -> bool:
    is_v4 = frame[12:14] == b"\x08\x00" and frame[23] == socket.IPPROTO_UDP
    return is_v4 or (frame[12:14] == b"\x86\xdd" and frame[20] == socket.IPPROTO_UDP)


def _is_wireguards(frame: bytes) -> bool:
    return frame[12:14] == b"\x08\x00" and int.from_bytes(frame[36:38], "big") in WIREGUARD


async def _shown(name: str) -> str:
    reader, writer = await asyncio.open_unix_connection(f"/var/run/wireguard/{name}.sock")
    writer.write(b"get=1\n\n")
    shown = await reader.readuntil(b"\n\n")
    writer.close()
    return shown.decode()
