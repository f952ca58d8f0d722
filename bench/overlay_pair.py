"""Two nodes in separate namespaces with a container on each, connected by VXLAN, plain or encrypted.

The parts of a node's overlay are created here by hand, with ``ip``: a namespace with a bridge, and the VXLAN device
that carries its frames as the bridge's port.  The WireGuard tunnels are the product's own
(``skep.dataplane.wireguard``).
"""

import asyncio
import secrets
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from skep.aio.clock import SystemClock
from skep.dataplane.netns.diff import AddLink
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.repair_counts import Repairs
from skep.dataplane.netns.state import Link, Vxlan
from skep.dataplane.netns.write import apply_operations
from skep.dataplane.plan.overlay import Underlay
from skep.dataplane.plan.wireguard import INNER_PORT_OFFSET, device_name
from skep.dataplane.wireguard.tunnels import Options, WireGuardTunnels
from skep.errors import Unavailable
from skep.model.networks.tables import NetworkHead, NetworkTable, Segment, TableNode
from skep.model.networks.wireguard import EncryptionMethod, published_keys
from skep.model.values.ids import NetworkId, NodeId
from skep.paths import Paths

VNI = 4097
PLAIN, ENCRYPTED = "vx0", "vx1"
"""Devices that carry the overlay."""
PORT = 4789
MTU, ENCRYPTED_MTU = 1450, 1370
_END_S = 10.0


def sh(*words: str) -> str:
    """Run a command.  Raises: CalledProcessError."""
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=30).stdout


class WireGuardGo:
    """wireguard-go in a node's namespace, without a supervisor."""

    def __init__(self, node: str, device: str) -> None:
        self._command = ("nsenter", f"--net=/run/netns/{node}", "wireguard-go", "--foreground", device)
        self.process: asyncio.subprocess.Process | None = None

    async def run(self) -> None:
        silent = subprocess.DEVNULL
        self.process = await asyncio.create_subprocess_exec(*self._command, stdout=silent, stderr=silent)
        try:
            await asyncio.Event().wait()
        finally:
            self.process.terminate()
            await asyncio.shield(self.process.wait())

    def dismiss(self) -> None:
        """Do nothing, because it ends with ``run`` anyway."""


class Side:
    """One node: namespaces ``node``, ``overlay`` and ``container``, its underlay and its container's addresses."""

    def __init__(self, prefix: str, number: int, directory: Path, method: EncryptionMethod) -> None:
        self.id = NodeId(f"node{number}")
        self.node = f"{prefix}-n{number}"
        self.overlay = f"{prefix}-o{number}"
        self.container = f"{prefix}-c{number}"
        self.underlay = f"192.0.2.{number}"
        self.address = f"10.77.0.{number}"
        self.mac = bytes((0x02, 0x42, 10, 77, 0, number))
        self.paths = Paths(directory / f"data{number}", directory / f"run{number}")
        self.paths.run.mkdir(parents=True)
        self.namespaces = Namespaces(self.paths.netns, Path("/run/netns", self.node))
        self.wireguard_go = WireGuardGo(self.node, device_name(self.paths.run, 0))
        clock = SystemClock()
        options = Options(
            method=method,
            since_boot=clock.since_boot,
            process=(lambda _: self.wireguard_go) if method is EncryptionMethod.USER_SPACE else None,
        )
        self.tunnels = WireGuardTunnels(self.paths, self.namespaces, options, Repairs(), clock)

    @property
    def container_namespace(self) -> Path:
        return Path("/run/netns", self.container)

    @property
    def mac_text(self) -> str:
        return self.mac.hex(":")


class OverlayPair:
    """Both sides, and the connection between them."""

    def __init__(self, a: Side, b: Side) -> None:
        self.a = a
        self.b = b

    @asynccontextmanager
    async def encrypting(self) -> AsyncIterator[None]:
        """Create tunnels between both nodes, and VXLAN devices that send through them."""
        table = NetworkTable(
            head=NetworkHead(
                id=NetworkId("pair"),
                name="pair",
                segments=(Segment("10.77.0.0/24", "10.77.0.254", VNI),),
                is_encrypted=True,
            ),
            nodes={
                side.id: TableNode(
                    id=side.id, underlay=side.underlay, wireguard_keys=published_keys(side.tunnels.labels())
                )
                for side in (self.a, self.b)
            },
        )
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(side.tunnels.run(_nothing)) for side in (self.a, self.b)]
            try:
                for own, other in ((self.a, self.b), (self.b, self.a)):
                    await own.tunnels.apply(own.id, [table], Underlay(own.underlay))
                    await self._add_encrypted(own, other)
                yield
            finally:
                for task in tasks:
                    task.cancel()

    async def _add_encrypted(self, own: Side, other: Side) -> None:
        sockets = str(own.tunnels.namespace)
        vxlan = Vxlan(vni=VNI, port=PORT + INNER_PORT_OFFSET, local="::")
        link = Link(name=ENCRYPTED, kind="vxlan", mtu=ENCRYPTED_MTU, vxlan=vxlan, sockets=sockets)
        overlay = Path("/run/netns", own.overlay)
        async with asyncio.timeout(_END_S):
            while True:
                with suppress(Unavailable):
                    await apply_operations(own.namespaces, overlay, [AddLink(link)])
                    break
        inner = own.tunnels.address_of(other.id)
        sh(
            "bridge",
            "-n",
            own.overlay,
            "fdb",
            "replace",
            other.mac_text,
            "dev",
            ENCRYPTED,
            "dst",
            inner,
            "self",
        )
        _response_for(own, other, ENCRYPTED)

    def carry(self, device: str) -> None:
        """Make this device the only port of both bridges."""
        mtu = ENCRYPTED_MTU if device == ENCRYPTED else MTU
        for own, other in ((self.a, self.b), (self.b, self.a)):
            for name in (PLAIN, ENCRYPTED):
                with suppress(subprocess.CalledProcessError):
                    sh("ip", "-n", own.overlay, "link", "set", name, "nomaster")
            sh("ip", "-n", own.overlay, "link", "set", device, "master", "br0", "mtu", str(mtu), "up")
            sh(
                "bridge",
                "-n",
                own.overlay,
                "fdb",
                "replace",
                other.mac_text,
                "dev",
                device,
                "master",
                "static",
            )
            sh("ip", "-n", own.overlay, "link", "set", "br0", "mtu", str(mtu))
            sh("ip", "-n", own.overlay, "link", "set", "port0", "mtu", str(mtu))
            sh("ip", "-n", own.container, "link", "set", "eth0", "mtu", str(mtu))

    def add_plain(self) -> None:
        """Add the devices of an unencrypted overlay."""
        for own, other in ((self.a, self.b), (self.b, self.a)):
            vxlan = ("type", "vxlan", "id", str(VNI), "dstport", str(PORT), "local", own.underlay)
            sh("ip", "-n", own.node, "link", "add", PLAIN, *vxlan, "nolearning", "proxy")
            sh("ip", "-n", own.node, "link", "set", PLAIN, "netns", own.overlay)
            forward = ("fdb", "replace", other.mac_text, "dev", PLAIN, "dst", other.underlay, "self")
            sh("bridge", "-n", own.overlay, *forward, "permanent")
            _response_for(own, other, PLAIN)


def _response_for(own: Side, other: Side, device: str) -> None:
    sh("ip", "-n", own.overlay, "link", "set", device, "up")
    neighbor = (other.address, "lladdr", other.mac_text, "dev", device, "nud", "permanent")
    sh("ip", "-n", own.overlay, "neigh", "replace", *neighbor)


async def _nothing() -> None:
    """Do nothing: no peer follows the rotation, because each side has one key."""


@contextmanager
def overlay_pair(
    directory: Path, method: EncryptionMethod = EncryptionMethod.USER_SPACE
) -> Iterator[OverlayPair]:
    """Create two nodes without devices for their overlay.  Everything is removed at the end."""
    prefix = f"skx{secrets.token_hex(2)}"
    sides = [Side(prefix, number, directory, method) for number in (1, 2)]
    try:
        for side in sides:
            _build(side)
        a, b = sides
        sh("ip", "-n", a.node, "link", "add", "up0", "type", "veth", "peer", "name", "up0", "netns", b.node)
        for side in sides:
            sh("ip", "-n", side.node, "address", "add", f"{side.underlay}/24", "dev", "up0")
            sh("ip", "-n", side.node, "link", "set", "up0", "up")
        yield OverlayPair(a, b)
    finally:
        for side in sides:
            with suppress(subprocess.CalledProcessError):
                sh("umount", str(side.tunnels.namespace))
            side.namespaces.close()
            for name in (side.container, side.overlay, side.node):
                with suppress(subprocess.CalledProcessError):
                    sh("ip", "netns", "del", name)


def _build(side: Side) -> None:
    for name in (side.node, side.overlay, side.container):
        sh("ip", "netns", "add", name)
        sh("ip", "-n", name, "link", "set", "lo", "up")
    sh("ip", "-n", side.overlay, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
    sh("ip", "-n", side.overlay, "link", "set", "br0", "up")
    ends = ("port0", "type", "veth", "peer", "name", "eth0")
    sh("ip", "-n", side.overlay, "link", "add", *ends, "address", side.mac_text, "netns", side.container)
    sh("ip", "-n", side.overlay, "link", "set", "port0", "master", "br0", "up")
    sh("ip", "-n", side.container, "address", "add", f"{side.address}/24", "dev", "eth0")
    sh("ip", "-n", side.container, "link", "set", "eth0", "up")
