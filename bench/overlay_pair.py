"""Two nodes in namespaces of their own with a network between them: one container on each, over VXLAN or encrypted.

What a node's overlay has is made here by hand, with ``ip``: a namespace with a bridge, and the device that carries its
frames as the bridge's port.  Used by ``encrypted.py`` and by the integration tests of encrypted networks.
"""

import asyncio
import random
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from skep.aio.clock import SystemClock
from skep.dataplane.encrypted.client import ForwarderClient
from skep.dataplane.encrypted.forwarder import Status
from skep.dataplane.encrypted.frames import GSO_BYTES_MAX, inner_mtu
from skep.dataplane.encrypted.plan import Plan, PlannedEndpoint, PlannedPeer, PlannedSegment
from skep.model.ids import NodeId
from skep.model.pair_keys import PairKey
from skep.paths import Paths

VNI = 4097
DEVICE = "enc4097"
FORWARDER_PROGRAM = (
    "import sys; from pathlib import Path; from skep.paths import Paths;"
    "from skep.dataplane.encrypted.process import run; run(Paths(Path(sys.argv[1]), Path(sys.argv[2])))"
)
_END_S = 10.0


def sh(*words: str) -> str:
    """Run a command.  Raises: CalledProcessError."""
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=30).stdout


def in_namespace(name: str, *words: str) -> list[str]:
    return ["nsenter", f"--net=/run/netns/{name}", *words]


class Side:
    """One node: namespaces ``node``, ``overlay`` and ``container``; its underlay and its container's addresses."""

    def __init__(self, prefix: str, number: int, directory: Path) -> None:
        self.id = NodeId(f"node{number}")
        self.node = f"{prefix}-n{number}"
        self.overlay = f"{prefix}-o{number}"
        self.container = f"{prefix}-c{number}"
        self.underlay = f"192.0.2.{number}"
        self.address = f"10.77.0.{number}"
        self.mac = bytes((0x02, 0x42, 10, 77, 0, number))
        self.paths = Paths(directory / f"data{number}", directory / f"run{number}")
        self.paths.run.mkdir(parents=True)
        self.client = ForwarderClient(self.paths.forwarder_socket, SystemClock(), random.random)
        self.forwarder: subprocess.Popen[bytes] | None = None

    @property
    def container_namespace(self) -> Path:
        return Path("/run/netns", self.container)

    @property
    def mac_text(self) -> str:
        return self.mac.hex(":")

    def start_forwarder(self) -> None:
        """Begin the process; it is not ready yet when this returns."""
        command = [sys.executable, "-c", FORWARDER_PROGRAM, str(self.paths.data), str(self.paths.run)]
        self.forwarder = subprocess.Popen(in_namespace(self.node, *command))

    def end_forwarder(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it, by its pid, and wait for that."""
        if self.forwarder is not None:
            self.forwarder.send_signal(number)
            self.forwarder.wait(_END_S)
            self.forwarder = None
        self.client.close()

    def attach(self) -> None:
        """Make the carrying device a port of the bridge, as the node's overlay does when it appears."""
        sh("ip", "-n", self.overlay, "link", "set", DEVICE, "master", "br0", "up")
        sh("ip", "-n", self.overlay, "link", "set", DEVICE, "type", "bridge_slave", "learning", "off")
        sh("ip", "-n", self.container, "link", "set", "eth0", "gso_max_size", str(GSO_BYTES_MAX))

    def plan(self, other: "Side", keys: Sequence[PairKey], *, mac: bytes | None = None) -> Plan:
        """What this side's forwarder is to do.  ``mac``: that of the other's container, if not its own."""
        return Plan(
            node_id=self.id,
            address=self.underlay,
            mtu=1500,
            peers=(PlannedPeer(node_id=other.id, address=other.underlay, keys=tuple(keys)),),
            segments=(
                PlannedSegment(
                    vni=VNI,
                    namespace=f"/run/netns/{self.overlay}",
                    device=DEVICE,
                    endpoints=(
                        PlannedEndpoint(node_id=other.id, mac=mac or other.mac, addresses=(other.address,)),
                    ),
                ),
            ),
        )


class OverlayPair:
    """Both sides, and what is between them."""

    def __init__(self, a: Side, b: Side) -> None:
        self.a = a
        self.b = b

    def keys(self, epochs: Sequence[int]) -> tuple[tuple[PairKey, ...], tuple[PairKey, ...]]:
        """Keys of these epochs, as a and as b see them: the same whenever they are asked for."""
        there = [PairKey(epoch, _key(b"there", epoch), _key(b"back", epoch)) for epoch in epochs]
        back = [PairKey(key.epoch, key.receiving, key.sending) for key in there]
        return tuple(there), tuple(back)

    async def encrypt(self, epochs: Sequence[int] = (1,)) -> None:
        """Start both forwarders, tell them everything, and wait until they agree."""
        for side in (self.a, self.b):
            side.start_forwarder()
        await self.tell(epochs)
        self.attach()
        await self.wait_agreed()

    def attach(self) -> None:
        """Both bridges carry by the encrypting device."""
        for side in (self.a, self.b):
            side.attach()

    def detach(self) -> None:
        """They do not any more."""
        for side in (self.a, self.b):
            sh("ip", "-n", side.overlay, "link", "set", DEVICE, "nomaster")

    async def tell(self, epochs: Sequence[int]) -> None:
        """Both sides have keys of these epochs from now on."""
        to_a, to_b = self.keys(epochs)
        await self.a.client.apply(self.a.plan(self.b, to_a))
        await self.b.client.apply(self.b.plan(self.a, to_b))

    async def wait_agreed(self, within_s: float = 10.0) -> None:
        """Until frames can go both ways.  Raises: TimeoutError."""
        async with asyncio.timeout(within_s):
            while not all([_agreed(await side.client.status()) for side in (self.a, self.b)]):
                await SystemClock().sleep(0.01)

    def carry_by_vxlan(self) -> None:
        """The plain twin: what an unencrypted overlay has."""
        for own, other in ((self.a, self.b), (self.b, self.a)):
            vxlan = ("type", "vxlan", "id", str(VNI), "dstport", "4789", "local", own.underlay)
            sh("ip", "-n", own.node, "link", "add", "vx0", *vxlan, "nolearning", "proxy")
            sh("ip", "-n", own.node, "link", "set", "vx0", "netns", own.overlay)
            sh("ip", "-n", own.overlay, "link", "set", "vx0", "master", "br0", "mtu", "1450", "up")
            forward = ("fdb", "replace", other.mac_text, "dev", "vx0")
            sh("bridge", "-n", own.overlay, *forward, "dst", other.underlay, "self", "permanent")
            sh("bridge", "-n", own.overlay, *forward, "master", "static")
            neighbour = (other.address, "lladdr", other.mac_text, "dev", "vx0", "nud", "permanent")
            sh("ip", "-n", own.overlay, "neigh", "replace", *neighbour)
            self._set_container_mtu(own, 1450)
            sh("ip", "-n", own.container, "link", "set", "eth0", "gso_max_size", "65536")

    def uncarry(self) -> None:
        """Take the VXLAN devices away again."""
        for side in (self.a, self.b):
            sh("ip", "-n", side.overlay, "link", "del", "vx0")
            self._set_container_mtu(side, inner_mtu(1500))

    def _set_container_mtu(self, side: Side, mtu: int) -> None:
        sh("ip", "-n", side.overlay, "link", "set", "br0", "mtu", str(mtu))
        sh("ip", "-n", side.overlay, "link", "set", "port0", "mtu", str(mtu))
        sh("ip", "-n", side.container, "link", "set", "eth0", "mtu", str(mtu))

    def close(self) -> None:
        for side in (self.a, self.b):
            side.end_forwarder()


@contextmanager
def overlay_pair(directory: Path) -> Iterator[OverlayPair]:
    """Two nodes without anything that carries their overlay yet; everything is gone at the end."""
    prefix = f"skx{secrets.token_hex(2)}"
    sides = [Side(prefix, number, directory) for number in (1, 2)]
    pair = OverlayPair(*sides)
    try:
        for side in sides:
            _build(side)
        a, b = sides
        sh("ip", "-n", a.node, "link", "add", "up0", "type", "veth", "peer", "name", "up0", "netns", b.node)
        for side in sides:
            sh("ip", "-n", side.node, "address", "add", f"{side.underlay}/24", "dev", "up0")
            sh("ip", "-n", side.node, "link", "set", "up0", "up")
        yield pair
    finally:
        pair.close()
        for side in sides:
            for name in (side.container, side.overlay, side.node):
                with suppress(subprocess.CalledProcessError):
                    sh("ip", "netns", "del", name)


def _build(side: Side) -> None:
    for name in (side.node, side.overlay, side.container):
        sh("ip", "netns", "add", name)
        sh("ip", "-n", name, "link", "set", "lo", "up")
    mtu = str(inner_mtu(1500))
    sh("ip", "-n", side.overlay, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
    sh("ip", "-n", side.overlay, "link", "set", "br0", "mtu", mtu, "up")
    ends = ("port0", "mtu", mtu, "type", "veth", "peer", "name", "eth0", "mtu", mtu)
    sh("ip", "-n", side.overlay, "link", "add", *ends, "address", side.mac_text, "netns", side.container)
    sh("ip", "-n", side.overlay, "link", "set", "port0", "master", "br0", "up")
    sh("ip", "-n", side.container, "address", "add", f"{side.address}/24", "dev", "eth0")
    sh("ip", "-n", side.container, "link", "set", "eth0", "up")


def _agreed(status: Status) -> bool:
    return all(peer.is_agreed for peer in status.peers)


def _key(direction: bytes, epoch: int) -> bytes:
    return (direction + epoch.to_bytes(4, "big")).ljust(32, b".")
