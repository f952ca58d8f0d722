"""Encrypted overlays by kernel WireGuard, on kernels that have it (docs/untested.md says where that was)."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from pyroute2 import AsyncIPRoute
from pyroute2.netlink.generic.wireguard import AsyncWireGuard

from bench.overlay_pair import VNI, OverlayPair, Side, in_namespace, overlay_pair, sh
from skep.dataplane.encrypted.wireguard import DEVICE, WireGuardDevice, device, inner_address, program, rules
from skep.dataplane.netns.namespaces import inside
from skep.model.pair_keys import NodeKeys, PairKey, PeerKeys
from skep.node.features import detect
from tests.integration.node.encrypted_traffic import TEXT, Pings, captured, transfer, udp_to

pytestmark = pytest.mark.needs("root", "ip", "nsenter", "nft")

VXLAN_PORT = 4789


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[OverlayPair]:
    missing = detect(tmp_path / "probe").missing
    if "wireguard" in missing:
        pytest.skip(f"this kernel has no WireGuard ({missing['wireguard']}): docs/untested.md")
    with overlay_pair(tmp_path) as both:
        yield both


class Ends:
    """The WireGuard devices of both nodes."""

    def __init__(self, pair: OverlayPair) -> None:
        self.pair = pair
        self._private = {side.id: os.urandom(32) for side in (pair.a, pair.b)}
        self._made: dict[str, WireGuardDevice] = {}

    async def tell(self, side: Side, other: Side, keys: Sequence[PairKey]) -> None:
        """Program this side's device as these keys want it."""
        peer = PeerKeys(node_id=other.id, keys=tuple(keys), wireguard_public=_public(self._private[other.id]))
        known = NodeKeys(peers={other.id: peer}, wireguard_private=self._private[side.id])
        wanted = device(side.id, known, {other.id: other.underlay}, vxlan_port=VXLAN_PORT, underlay_mtu=1500)
        assert wanted is not None
        async with AsyncExitStack() as stack:
            route = await stack.enter_async_context(
                AsyncIPRoute(use_socket=_netlink(side, socket.NETLINK_ROUTE))
            )
            generic = _netlink(side, socket.NETLINK_GENERIC)
            wireguard = await stack.enter_async_context(AsyncWireGuard(use_socket=generic))
            await program(route, wireguard, self._made.get(side.id), wanted)
        self._made[side.id] = wanted

    def carry(self) -> None:
        """VXLAN inside WireGuard, as ``OverlayPair.carry_by_vxlan`` has it outside."""
        for own, other in ((self.pair.a, self.pair.b), (self.pair.b, self.pair.a)):
            (own.paths.run / "rules").write_text(rules(VXLAN_PORT))
            sh(*in_namespace(own.node, "nft", "-f", str(own.paths.run / "rules")))
            vxlan = ("type", "vxlan", "id", str(VNI), "dstport", str(VXLAN_PORT + 12))
            sh(
                "ip",
                "-n",
                own.node,
                "link",
                "add",
                "vx0",
                *vxlan,
                "local",
                inner_address(own.id),
                "nolearning",
                "proxy",
            )
            sh("ip", "-n", own.node, "link", "set", "vx0", "netns", own.overlay)
            sh("ip", "-n", own.overlay, "link", "set", "vx0", "master", "br0", "mtu", "1370", "up")
            forward = ("fdb", "replace", other.mac_text, "dev", "vx0")
            sh("bridge", "-n", own.overlay, *forward, "dst", inner_address(other.id), "self", "permanent")
            sh("bridge", "-n", own.overlay, *forward, "master", "static")
            sh(
                "ip",
                "-n",
                own.overlay,
                "neigh",
                "replace",
                other.address,
                "lladdr",
                other.mac_text,
                "dev",
                "vx0",
                "nud",
                "permanent",
            )
            for namespace, name in ((own.overlay, "br0"), (own.overlay, "port0"), (own.container, "eth0")):
                sh("ip", "-n", namespace, "link", "set", name, "mtu", "1370")


def _public(private: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def _netlink(side: Side, family: int) -> socket.socket:
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    return inside(Path("/run/netns") / side.node, lambda: socket.socket(socket.AF_NETLINK, kind, family))


async def test_vxlan_goes_through_wireguard_and_nobody_reads_it(pair: OverlayPair) -> None:
    ends = Ends(pair)
    to_a, to_b = pair.keys((1,))
    await ends.tell(pair.a, pair.b, to_a)
    await ends.tell(pair.b, pair.a, to_b)
    ends.carry()
    content = TEXT * 20_000
    with captured(pair.b) as seen:
        assert await asyncio.to_thread(transfer, pair.a, pair.b, content) == content
    assert sum(map(len, udp_to(seen, VXLAN_PORT + 11))) > len(content)
    assert TEXT.strip() not in b"".join(seen)
    assert DEVICE in sh("ip", "-n", pair.a.node, "-brief", "link")


@pytest.mark.timeout(60)
async def test_keys_change_without_a_loss(pair: OverlayPair) -> None:
    ends = Ends(pair)
    for epoch in (1, 2, 3):
        to_a, to_b = pair.keys((epoch,))
        await ends.tell(pair.a, pair.b, to_a)
        await ends.tell(pair.b, pair.a, to_b)
        if epoch == 1:
            ends.carry()
            assert await asyncio.to_thread(transfer, pair.a, pair.b, TEXT) == TEXT
            continue
        with Pings(pair).running() as pings:
            await pings.wait_arrived(200)
        assert [number for number, _ in pings.arrived] == list(range(pings.sent))
