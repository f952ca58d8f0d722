"""The WireGuard tunnels of one node.

Keeps their devices, addresses and routes as the tables of encrypted networks require.

The devices are in a separate network namespace (``<run>/tunnels``) without other devices and other egress.  VXLANs of
encrypted networks send their packets there.  Each packet passes a tunnel or is dropped, so nothing leaves unencrypted
even if a device, its process, a key or a route is missing.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from socket import AF_INET6
from typing import Protocol

import msgspec
import structlog
from pyroute2.netlink.exceptions import NetlinkError

from skep.aio.clock import Clock
from skep.aio.race import is_set_within
from skep.dataplane.netns.kernel import pinned
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.observation import EXCLUSIVE
from skep.dataplane.netns.reconciler import NetnsReconciler
from skep.dataplane.netns.repair_counts import Repairs
from skep.dataplane.netns.state import Address, Link, NamespaceState, Route
from skep.dataplane.plan.overlay import LOOPBACK, LOOPBACK_MTU, Underlay
from skep.dataplane.plan.packet_filter import tunnel_sources
from skep.dataplane.plan.rotation import (
    Handshake,
    KeyLifetimes,
    handshakes_of,
    noted,
)
from skep.dataplane.plan.wireguard import (
    INNER_PORT_OFFSET,
    KeyChoice,
    Session,
    WireGuardDevice,
    WireGuardKey,
    WireGuardPlan,
    changes,
    chosen,
    device_name,
    inner_address,
    own_port,
    plan_of,
    tunnel_mtu,
    tunnelled,
)
from skep.dataplane.wireguard.devices import KernelDevices, UserSpaceDevices, WireGuardDevices
from skep.dataplane.wireguard.methods import EncryptionRefusal
from skep.dataplane.wireguard.own_keys import OwnKeys
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

NAMESPACE = "wireguard"
PERIOD_S = 1.0
"""Seconds between checks for completed handshakes and removed devices."""
HURRY_S = 0.1
"""Seconds between checks while a device does not exist yet."""
HEAL_S = 5.0
"""Seconds between comparisons of the namespace with its desired state."""
SYSCTLS = {
    "net/ipv4/ip_forward": "0",
    "net/ipv6/conf/all/disable_ipv6": "0",
    "net/ipv6/conf/all/forwarding": "0",
    "net/ipv6/conf/default/disable_ipv6": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/default/accept_ra": "0",
    "net/ipv6/conf/default/addr_gen_mode": "1",
}
"""Sysctls of the tunnels' namespace.  Addresses inside are IPv6, even if the node itself has only IPv4."""
_KINDS = {EncryptionMethod.KERNEL: "wireguard", EncryptionMethod.USER_SPACE: "tun"}


class Process(Protocol):
    """A supervised wireguard-go (``supervision.supervisor.Supervisor``)."""

    async def run(self) -> None:
        """Keep the process running until cancelled."""

    def dismiss(self) -> None:
        """Stop the process when ``run`` is cancelled."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How this node encrypts.

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


NO_ENCRYPTION = Options(
    method=EncryptionRefusal("this node cannot encrypt overlay networks"), since_boot=lambda: 0.0
)


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
        self._run_directory = paths.run
        self._keys = OwnKeys(paths.wireguard_keys, options.since_boot, options.limits, clock, say)
        self._namespaces = namespaces
        self._pins = Namespaces(paths.tunnels, namespaces.home)
        self._clock = clock
        self._say = say
        self._reconciler = NetnsReconciler("tunnels", self.namespace, self._pins, repairs, EXCLUSIVE)
        self._devices: WireGuardDevices = (
            KernelDevices(namespaces)
            if options.method is EncryptionMethod.KERNEL
            else UserSpaceDevices(namespaces)
        )
        self._opening = asyncio.Lock()
        """Held while the namespace is created or removed."""
        self._users = 0
        """Number of open ``kept_open`` blocks."""
        self._changed = asyncio.Event()
        self._node = NodeId("")
        self._vxlan_port = DEFAULT_DATA_PATH_PORT
        """The data path port of the cluster, or the default until it is known."""
        self._tables: tuple[NetworkTable, ...] | None = None
        self._underlay = Underlay("")
        self._plan = WireGuardPlan()
        self._handshakes: Mapping[Session, Handshake] | None = None
        """The handshakes, or None until the devices were read."""
        self._choice = KeyChoice()
        self._followed: Mapping[NodeId, str] = {}
        """The inner addresses that overlays have applied."""
        self._tunnelled: dict[NetworkId, tuple[NetworkTable, Mapping[NodeId, str], NetworkTable]] = {}
        self._healed_at = -HEAL_S
        self._placed: Mapping[int, int] = {}
        """Index of the device in each slot."""
        self._configured: dict[int, WireGuardDevice] = {}
        self._processes: dict[int, tuple[Process, asyncio.Task[None]]] = {}
        self._last_error = ""

    @property
    def namespace(self) -> Path:
        """Namespace of the devices, and of the sockets of encrypted networks' VXLANs."""
        return self._pins.path(NAMESPACE)

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
                PublicKey(pair.public, own_port(pair.slot, self._vxlan_port, self._options.port))
                for pair in self._own_keys()
            )
        except Unavailable:
            if self._tables is None:
                raise
            # Keep publishing the keys that peers have.  If none were published, peers would end working tunnels.
            own = (table.nodes[self._node] for table in self._tables if self._node in table.nodes)
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
        self._node, self._underlay = node, underlay
        every = tuple(tables)
        self._vxlan_port = next((table.head.port for table in every), self._vxlan_port)
        self._tables = tuple(table for table in every if table.head.is_encrypted)
        carried = {table.head.id for table in self._tables}
        self._tunnelled = {id: one for id, one in self._tunnelled.items() if id in carried}
        try:
            if self._tables and not isinstance(self._options.method, EncryptionRefusal):
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
        self._users += 1
        try:
            if not isinstance(self._options.method, EncryptionRefusal):
                await self._open()
            yield
        finally:
            self._users -= 1
            if not self._tables:
                self._changed.set()

    def table(self, table: NetworkTable) -> NetworkTable:
        """Return an encrypted network's table with addresses inside the tunnels."""
        known, addresses = self._tunnelled.get(table.head.id), self._choice.addresses
        if known is None or known[0] is not table or known[1] != addresses:
            known = (table, addresses, tunnelled(table, self._node, addresses))
            self._tunnelled[table.head.id] = known
        return known[2]

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
                    if self._tables is not None:
                        await self._try_step(group, moved)
                    if self._plan.devices or self._last_error:
                        is_complete = self._placed.keys() == self._plan.devices.keys()
                        await is_set_within(self._changed, PERIOD_S if is_complete else HURRY_S)
                    else:
                        await self._changed.wait()
        finally:
            self._processes.clear()

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
            names = ", ".join(sorted(table.head.name for table in self._tables or ()))
            self._say(f"encrypted networks ({names}): {self._options.method.reason}" if names else "")

    async def _step(self, group: asyncio.TaskGroup) -> None:
        self._decide()
        self._supervise(group)
        if not self._plan.devices:
            await self._close()
            return
        await self._open()
        await self._place()
        # Accept the sources before packets can arrive from them.
        await self._settle()
        await self._configure()
        before = self._choice
        self._decide()
        if self._choice.slots != before.slots:
            await self._reroute(before)
            await self._settle()
        self._say(unreachable(self._plan))

    def _decide(self) -> None:
        """Update plan and choice from the present tables, keys and handshakes.

        Raises: Unavailable: see ``require_keys``.
        """
        if isinstance(self._options.method, EncryptionRefusal):
            return
        pairs = self._own_keys()
        self._plan = plan_of(self._node, pairs, self._tables or (), port=self._options.port)
        self._choice = chosen(self._plan, self._handshakes or ())

    def _own_keys(self) -> tuple[WireGuardKey, ...]:
        """Return the key pairs that are due now.  Raises: Unavailable: see ``require_keys``."""
        return self._keys.due(self._plan, self._handshakes, is_settled=self._tables == ())

    # --- the namespace ----------------------------------------------------------------------------------------

    async def _open(self) -> None:
        async with self._opening:
            if not os.path.ismount(self.namespace):
                await self._pins.destroy(NAMESPACE)
                await self._pins.create(NAMESPACE, SYSCTLS)
                self._reconciler.reset()
                self._placed = {}
            if self._handshakes is None:
                self._handshakes = await self._found_handshakes()

    async def _close(self) -> None:
        async with self._opening:
            if self._tables or self._users:
                return
            if os.path.exists(self.namespace):
                await pinned.remove(self._pins, NAMESPACE)
                log.info("wireguard tunnels removed")
            self._reconciler.reset()
            self._placed, self._handshakes = {}, None
            self._configured.clear()
            self._say("")

    async def _found_handshakes(self) -> Mapping[Session, Handshake]:
        """Return the handshakes of devices that an earlier node process has configured, so that traffic continues on
        them.
        """
        found, pairs = [], self._own_keys()
        for pair in pairs:
            try:
                found.append(
                    await self._devices.read_device(
                        device_name(self._run_directory, pair.slot), self.namespace
                    )
                )
            except SkepError:
                continue
        return noted({}, handshakes_of(found, pairs), self._clock.monotonic())

    async def _settle(self) -> None:
        """Apply addresses, routes and rules of the devices that exist."""
        method, run = self._options.method, self._run_directory
        assert isinstance(method, EncryptionMethod), "otherwise there is no plan"
        names = {slot: device_name(run, slot) for slot in self._placed if slot in self._plan.devices}
        mtu = tunnel_mtu(self._underlay.mtu, is_ipv6=":" in self._underlay.address)
        links = {name: Link(name=name, kind=_KINDS[method], mtu=mtu) for name in names.values()}
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
        port = self._vxlan_port + INNER_PORT_OFFSET
        self._reconciler.set_part(NAMESPACE, state, tunnel_sources(self._plan.sources, port))
        await self._reconciler.apply()
        if self._clock.monotonic() - self._healed_at >= HEAL_S:
            await self._reconciler.heal()
            self._healed_at = self._clock.monotonic()

    async def _reroute(self, before: KeyChoice) -> None:
        """Move routes from one device to another.

        They are replaced in place, so that packets always have a route.
        """
        moved = {
            address: self._placed[slot]
            for address, slot in self._choice.slots.items()
            if slot in self._placed and before.slots.get(address, slot) != slot
        }
        if not moved:
            return
        async with self._namespaces.netlink(self.namespace) as route:
            for address, index in moved.items():
                await route.route("replace", dst=f"{address}/128", oif=index, family=AF_INET6)

    # --- devices ----------------------------------------------------------------------------------------------

    def _supervise(self, group: asyncio.TaskGroup) -> None:
        """Run a process for each device if devices need one."""
        if self._options.process is None or self._options.method is not EncryptionMethod.USER_SPACE:
            return
        for slot in self._processes.keys() - self._plan.devices.keys():
            process, task = self._processes.pop(slot)
            process.dismiss()
            task.cancel()
        for slot in self._plan.devices.keys() - self._processes.keys():
            process = self._options.process(slot)
            task = group.create_task(process.run(), name=f"wireguard-go {slot}")
            self._processes[slot] = (process, task)

    async def _place(self) -> None:
        mtu = tunnel_mtu(self._underlay.mtu, is_ipv6=":" in self._underlay.address)
        placed = {}
        for slot in self._plan.devices:
            name = device_name(self._run_directory, slot)
            if index := await self._devices.place(name, self.namespace, mtu):
                placed[slot] = index
        if placed != self._placed:
            self._reconciler.invalidate()
            for slot in placed.keys() | self._placed.keys():
                if placed.get(slot) != self._placed.get(slot):
                    self._configured.pop(slot, None)
            self._placed = placed

    async def _configure(self) -> None:
        found = []
        # Use a snapshot, because the plan may change to fewer devices while one of them is read.
        planned = [(slot, wanted) for slot, wanted in self._plan.devices.items() if slot in self._placed]
        for slot, wanted in planned:
            name = device_name(self._run_directory, slot)
            device = await self._devices.read_device(name, self.namespace)
            change = changes(device, wanted, self._configured.get(slot))
            if change.is_needed:
                await self._devices.write(name, self.namespace, change)
            self._configured[slot] = wanted
            found.append(device)
        handshakes = handshakes_of(found, self._keys.pairs)
        self._handshakes = noted(self._handshakes or {}, handshakes, self._clock.monotonic())

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
