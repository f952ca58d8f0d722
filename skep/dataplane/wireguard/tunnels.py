"""The WireGuard tunnels of one node.

Keeps their devices, addresses and routes as the tables of encrypted networks require.

The devices are in a separate network namespace (``<run>/tunnels``) without other devices and other egress.  VXLANs of
encrypted networks send their packets there.  Each packet passes a tunnel or is dropped, so nothing leaves unencrypted
even if a device, its process, a key or a route is missing.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import structlog
from pyroute2.netlink.exceptions import NetlinkError

from skep.aio.clock import Clock
from skep.aio.race import is_set_within
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.repair_counts import Repairs
from skep.dataplane.netns.state import Address, Link, NamespaceState, Route
from skep.dataplane.plan.overlay import LOOPBACK, LOOPBACK_MTU, Underlay
from skep.dataplane.plan.packet_filter import tunnel_sources
from skep.dataplane.plan.rotation import (
    KeyLifetimes,
)
from skep.dataplane.plan.wireguard import (
    INNER_PORT_OFFSET,
    KeyChoice,
    WireGuardKey,
    WireGuardPlan,
    chosen,
    inner_address,
    own_port,
    plan_of,
    tunnel_mtu,
    tunnelled,
)
from skep.dataplane.wireguard.methods import EncryptionRefusal
from skep.dataplane.wireguard.own_keys import OwnKeys
from skep.dataplane.wireguard.tunnel_devices import SYSCTLS, Process, TunnelDevices, TunnelNamespace
from skep.errors import SkepError, Unavailable
from skep.model.networks.tables import NetworkHead, NetworkTable
from skep.model.networks.wireguard import (
    ENCRYPTION_LABEL,
    PUBLIC_KEYS_LABEL,
    EncryptionMethod,
    PublicKey,
    public_keys_label,
)
from skep.model.swarm import DEFAULT_DATA_PATH_PORT
from skep.model.values.ids import NetworkId, NodeId
from skep.paths import Paths

log = structlog.get_logger()

PERIOD_S = 1.0
"""Seconds between checks for completed handshakes and removed devices."""
HURRY_S = 0.1
"""Seconds between checks while a device does not exist yet."""
DEVICE_KINDS = {EncryptionMethod.KERNEL: "wireguard", EncryptionMethod.USER_SPACE: "tun"}
"""The kernel's name of the kind of device, by method."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Encryption settings of this node.

    Args:
        method: The WireGuard implementation, or the reason why the node does not encrypt.
        since_boot: Returns the seconds since boot, the same for all processes of a boot.
        process: Creates the supervisor of wireguard-go for a slot.
        port: UDP port of slot 0, or 0 for the port after VXLAN's.
    """

    method: EncryptionMethod | EncryptionRefusal
    since_boot: Callable[[], float]
    process: Callable[[int], Process] | None = None
    port: int = 0
    limits: KeyLifetimes = KeyLifetimes()

    def devices(
        self, run_directory: Path, namespace: Path, namespaces: Namespaces, clock: Clock
    ) -> TunnelDevices:
        """Return the keeper of this node's devices in ``namespace``."""
        return TunnelDevices(
            run_directory,
            namespace,
            namespaces,
            self.process if self.method is EncryptionMethod.USER_SPACE else None,
            clock,
            are_in_kernel=self.method is EncryptionMethod.KERNEL,
        )


NO_ENCRYPTION = Options(
    method=EncryptionRefusal("this node cannot encrypt overlay networks"), since_boot=lambda: 0.0
)


class EncryptedNetworks:
    """Tables of encrypted networks, with this node and its device."""

    def __init__(self) -> None:
        self.node = NodeId("")
        self.underlay = Underlay("")
        self.vxlan_port = DEFAULT_DATA_PATH_PORT
        """The data path port of the cluster, or the default until it is known."""
        self.tables: tuple[NetworkTable, ...] | None = None
        """The tables, or None until some were applied."""
        self._tunnelled: dict[NetworkId, tuple[NetworkTable, Mapping[NodeId, str], NetworkTable]] = {}

    def set(self, node: NodeId, tables: Iterable[NetworkTable], underlay: Underlay) -> None:
        """Keep the encrypted networks among ``tables``."""
        self.node, self.underlay = node, underlay
        every = tuple(tables)
        self.vxlan_port = next((table.head.port for table in every), self.vxlan_port)
        self.tables = tuple(table for table in every if table.head.is_encrypted)
        carried = {table.head.id for table in self.tables}
        self._tunnelled = {id: one for id, one in self._tunnelled.items() if id in carried}

    @property
    def mtu(self) -> int:
        """MTU inside the tunnels."""
        return tunnel_mtu(self.underlay.mtu, is_ipv6=":" in self.underlay.address)

    def names(self) -> str:
        """Return the names of the networks, in order."""
        return ", ".join(sorted(table.head.name for table in self.tables or ()))

    def inside(self, table: NetworkTable, addresses: Mapping[NodeId, str]) -> NetworkTable:
        """Return a network's table with ``addresses`` inside the tunnels."""
        known = self._tunnelled.get(table.head.id)
        if known is None or known[0] is not table or known[1] != addresses:
            known = (table, addresses, tunnelled(table, self.node, addresses))
            self._tunnelled[table.head.id] = known
        return known[2]


class WireGuardTunnels:
    """All tunnels of one node.  ``say`` sets a node condition.  An empty text clears it.

    Overlays call ``apply`` with every change of tables.  For an encrypted network they use ``table`` and ``inside`` in
    place of its table and underlay.  ``run`` does the rest.
    """

    def __init__(
        self,
        paths: Paths,
        namespaces: Namespaces,
        options: Options,
        repairs: Repairs,
        clock: Clock,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._options = options
        self._say = say
        self._keys = OwnKeys(paths.wireguard_keys, options.since_boot, options.limits, clock, say)
        self._space = TunnelNamespace(Namespaces(paths.tunnels, namespaces.home), repairs, clock)
        self._devices = options.devices(paths.run, self._space.path, namespaces, clock)
        self._networks = EncryptedNetworks()
        self._changed = asyncio.Event()
        self._plan = WireGuardPlan()
        self._choice = KeyChoice()
        self._followed: Mapping[NodeId, str] = {}
        """The inner addresses that overlays have applied."""
        self._last_error = ""

    @property
    def namespace(self) -> Path:
        """Namespace of the devices, and of the sockets of encrypted networks' VXLANs."""
        return self._space.path

    # --- for the node's description ---------------------------------------------------------------------------

    def labels(self) -> Mapping[str, str]:
        """Return the engine labels with the encryption method and this node's public keys.

        Empty if it does not encrypt.

        Raises: Unavailable: the keys cannot be read, so it is unknown which keys the peers have.
        """
        method = self._options.method
        if isinstance(method, EncryptionRefusal):
            return {}
        try:
            published = tuple(
                PublicKey(pair.public, own_port(pair.slot, self._networks.vxlan_port, self._options.port))
                for pair in self._own_keys()
            )
        except Unavailable:
            if self._networks.tables is None:
                raise
            # Keep publishing the keys that peers have.  If none were published, peers would end working tunnels.
            own = (
                table.nodes[self._networks.node]
                for table in self._networks.tables
                if self._networks.node in table.nodes
            )
            published = next((node.wireguard_keys for node in own), ())
        return {ENCRYPTION_LABEL: method.value, PUBLIC_KEYS_LABEL: public_keys_label(published)}

    # --- for the overlays -------------------------------------------------------------------------------------

    def refusal(self, head: NetworkHead) -> str:
        """Return why a container cannot join this network here, or an empty text if it can."""
        if head.is_encrypted and isinstance(self._options.method, EncryptionRefusal):
            return f"network {head.name} is encrypted, and {self._options.method.reason}; nothing is sent in clear"
        return ""

    async def apply(self, node: NodeId, tables: Iterable[NetworkTable], underlay: Underlay) -> None:
        """Provide tunnels for the encrypted networks in ``tables`` from now on.

        ``underlay`` is this node's device.  When this returns, VXLANs of encrypted networks can be created.
        Raises: OSError; Unavailable: see ``require_keys``.
        """
        self._networks.set(node, tables, underlay)
        try:
            if self._networks.tables and not isinstance(self._options.method, EncryptionRefusal):
                await self._open()
            self._decide()
        finally:
            self._changed.set()

    def require_keys(self) -> None:
        """Check that the keys are readable.

        Raises: Unavailable: they are not.  The plan is then unknown, and the present configuration must stay.
        """
        self._keys.require()

    @asynccontextmanager
    async def kept_open(self) -> AsyncIterator[None]:
        """Allow VXLANs of encrypted networks to be created during the block, even before their tables were applied.

        Raises: OSError; Unavailable: see ``require_keys``.
        """
        self._space.users += 1
        try:
            if not isinstance(self._options.method, EncryptionRefusal):
                await self._open()
            yield
        finally:
            self._space.users -= 1
            if not self._networks.tables:
                self._changed.set()

    def table(self, table: NetworkTable) -> NetworkTable:
        """Return an encrypted network's table with addresses inside the tunnels."""
        return self._networks.inside(table, self._choice.addresses)

    def inside(self, underlay: Underlay | None) -> Underlay | None:
        """Return the underlay inside the tunnels on top of ``underlay``, or None if this node cannot encrypt."""
        if underlay is None or isinstance(self._options.method, EncryptionRefusal):
            return None
        mtu = tunnel_mtu(underlay.mtu, is_ipv6=":" in underlay.address)
        return Underlay("::", mtu, netns=str(self.namespace))

    def address_of(self, node: NodeId) -> str:
        """Return the address inside the tunnels for packets to another node, or an empty text if it has none."""
        return self._choice.addresses.get(node, "")

    def port_of(self, node: NodeId) -> int:
        """Return the UDP port at which that node receives these packets, or 0 if it is not known."""
        address = self._choice.addresses.get(node)
        return next((one.port for one in self._plan.peers.get(node, ()) if one.inner == address), 0)

    # --- keeping ----------------------------------------------------------------------------------------------

    async def run(self, moved: Callable[[], Awaitable[None]]) -> None:
        """Keep devices, addresses and routes in their desired state until cancelled.

        ``moved`` is called when nodes' addresses inside the tunnels change.  It may raise SkepError, and is then
        retried.
        """
        if isinstance(self._options.method, EncryptionRefusal):
            await self._refuse()
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    self._changed.clear()
                    if self._networks.tables is not None:
                        await self._try_step(group, moved)
                    if self._plan.devices or self._last_error:
                        is_complete = self._devices.placed.keys() == self._plan.devices.keys()
                        await is_set_within(self._changed, PERIOD_S if is_complete else HURRY_S)
                    else:
                        await self._changed.wait()
        finally:
            self._devices.forget_processes()

    async def _try_step(self, group: asyncio.TaskGroup, moved: Callable[[], Awaitable[None]]) -> None:
        try:
            await self._step(group)
            if (addresses := self._choice.addresses) != self._followed:
                await moved()
                self._followed = addresses
            self._note("")
        except (SkepError, OSError, NetlinkError) as error:
            self._note(str(error))

    async def _refuse(self) -> None:
        """Keep the node's condition up to date on a node that does not encrypt."""
        assert isinstance(self._options.method, EncryptionRefusal), "as its caller found"
        while True:
            await self._changed.wait()
            self._changed.clear()
            names = self._networks.names()
            self._say(f"encrypted networks ({names}): {self._options.method.reason}" if names else "")

    async def _step(self, group: asyncio.TaskGroup) -> None:
        self._decide()
        self._devices.supervise(group, self._plan.devices.keys())
        if not self._plan.devices:
            await self._close()
            return
        await self._open()
        if await self._devices.place(self._plan.devices.keys(), self._networks.mtu):
            self._space.invalidate()
        # Accept the sources before packets can arrive from them.
        await self.settle()
        await self._devices.configure(self._plan, lambda: self._keys.pairs)
        before = self._choice
        self._decide()
        if self._choice.slots != before.slots:
            await self._devices.reroute(before, self._choice)
            await self.settle()
        self._say(unreachable(self._plan))

    def _decide(self) -> None:
        """Update plan and choice from the present tables, keys and handshakes.

        Raises: Unavailable: see ``require_keys``.
        """
        if isinstance(self._options.method, EncryptionRefusal):
            return
        pairs = self._own_keys()
        self._plan = plan_of(self._networks.node, pairs, self._networks.tables or (), port=self._options.port)
        self._choice = chosen(self._plan, self._devices.handshakes or ())

    def _own_keys(self) -> tuple[WireGuardKey, ...]:
        """Return the key pairs that are due now.  Raises: Unavailable: see ``require_keys``."""
        return self._keys.due(self._plan, self._devices.handshakes, is_settled=self._networks.tables == ())

    # --- the namespace ----------------------------------------------------------------------------------------

    async def _open(self) -> None:
        async with self._space.opening:
            if await self._space.create():
                self._devices.placed = {}
            if self._devices.handshakes is None:
                await self._devices.find_handshakes(self._own_keys())

    async def _close(self) -> None:
        async with self._space.opening:
            if self._networks.tables or self._space.users:
                return
            await self._space.remove()
            self._devices.forget()
            self._say("")

    async def settle(self) -> None:
        """Apply addresses, routes and rules of the devices that exist."""
        method, mtu = self._options.method, self._networks.mtu
        assert isinstance(method, EncryptionMethod), "otherwise there is no plan"
        names = {
            slot: self._devices.name(slot) for slot in self._devices.placed if slot in self._plan.devices
        }
        links = {name: Link(name=name, kind=DEVICE_KINDS[method], mtu=mtu) for name in names.values()}
        links[LOOPBACK] = Link(name=LOOPBACK, kind="loopback", mtu=LOOPBACK_MTU)
        state = NamespaceState(
            links=links,
            addresses=frozenset(
                Address(names[pair.slot], f"{inner_address(pair.public)}/128")
                for pair in self._keys.pairs
                if pair.slot in names
            )
            | {Address(LOOPBACK, "127.0.0.1/8"), Address(LOOPBACK, "::1/128")},
            routes=frozenset(
                Route(names[slot], f"{address}/128")
                for address, slot in self._choice.slots.items()
                if slot in names
            ),
            sysctls=SYSCTLS,
        )
        port = self._networks.vxlan_port + INNER_PORT_OFFSET
        await self._space.apply(state, tunnel_sources(self._plan.sources, port))

    def _note(self, error: str) -> None:
        """Log ``error``, but only once if it is repeated."""
        if error and error != self._last_error:
            log.warning("encrypted networks not carried, retrying", reason=error)
        self._last_error = error


def unreachable(plan: WireGuardPlan) -> str:
    """Return a sentence for the node's condition, or an empty text if all peers are reachable."""
    sentences = []
    if plan.keyless:
        sentences.append(
            f"encrypted networks exchange nothing with {_listed(plan.keyless)}, without a WireGuard key: "
            "upgrade them, or see there why they cannot encrypt"
        )
    if plan.contested:
        sentences.append(
            f"encrypted networks exchange nothing by a WireGuard key that several nodes publish: "
            f"{_listed(plan.contested)}: one of them has copied it"
        )
    return "; ".join(sentences)


def _listed(nodes: Collection[NodeId], most: int = 3) -> str:
    shown = ", ".join(f"node {id[:12]}" for id in tuple(nodes)[:most])
    return f"{shown} and {len(nodes) - most} more" if len(nodes) > most else shown
