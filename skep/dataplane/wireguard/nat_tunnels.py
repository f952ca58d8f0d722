"""This node's tunnels through NAT: one WireGuard device in the node's own namespace (``plan/nat.py``).

The device, its address, routes and rules exist while managers say that the node needs tunnels.  They outlive the node
process.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

import msgspec
import structlog
from pyroute2.netlink.exceptions import NetlinkError

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.failures import describe_error
from skep.aio.race import is_set_within
from skep.dataplane import underlays
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.observation import Scope
from skep.dataplane.netns.reconciler import NetnsReconciler
from skep.dataplane.netns.repair_counts import Repairs
from skep.dataplane.netns.state import Link, NamespaceState
from skep.dataplane.plan import nat
from skep.dataplane.plan.overlay import USUAL_MTU
from skep.dataplane.plan.wireguard import WireGuardKey, WireGuardPlan, tunnel_mtu
from skep.dataplane.wireguard import keys
from skep.dataplane.wireguard.methods import EncryptionRefusal
from skep.dataplane.wireguard.tunnel_devices import HEAL_S
from skep.dataplane.wireguard.tunnels import DEVICE_KINDS, Options
from skep.errors import SkepError, Unavailable
from skep.linux.network.route_lookup import source_address
from skep.model.networks.data_planes import TUNNEL_LABEL
from skep.model.networks.paths import NatTunnels, ProbeTargets
from skep.model.networks.reserved_ports import (
    IMAGES_USE,
    TUNNEL_SLOT,
    ReservedPorts,
    between_nodes,
    of_data_path,
    tunnel_port,
)
from skep.model.networks.used_ports import UsedPort
from skep.model.networks.wireguard import EncryptionMethod, PublicKey, public_keys_label
from skep.model.swarm import DEFAULT_DATA_PATH_PORT
from skep.paths import Paths

log = structlog.get_logger()

PERIOD_S = 1.0
"""Seconds between checks for a removed device."""
HURRY_S = 0.1
"""Seconds between checks while the device does not exist yet."""
READ_AGAIN_S = 30.0
"""Seconds between two readings of the device and of the machine's addresses, which only others change."""
FIRST_RETRY_S, LONGEST_RETRY_S = 0.2, 5.0
"""First and longest pause in seconds after an error."""
SHOWN_AFTER_S = 10.0
"""Seconds after which an error that persists becomes a condition of the node.  Processes may start meanwhile."""
_ANYWHERE = "192.0.2.1"
"""An address to which the default route leads.  Source: RFC 5737."""
_PART = "nat"


class MachineFacts(msgspec.Struct, frozen=True):
    """The machine around the tunnels.

    Args:
        mtu: The MTU inside the tunnels.
        has_address: Whether the machine has the node's underlay address.
    """

    mtu: int
    has_address: bool


class TunnelsThroughNat:
    """The tunnels of one node.  ``set_targets`` says which, and ``run`` makes and keeps them."""

    def __init__(
        self,
        paths: Paths,
        namespaces: Namespaces,
        options: Options,
        repairs: Repairs,
        clock: Clock,
        rng: Callable[[], float],
        own_ports: Callable[[], ReservedPorts],
    ) -> None:
        """Create the tunnels.  ``own_ports`` returns the ports of the node's daemon."""
        self._file = paths.nat_key
        self._own_ports = own_ports
        self._namespaces = namespaces
        self._options = options
        self._clock = clock
        self._devices = options.devices(paths.run, namespaces.home, namespaces, clock)
        # A separate reconciler, because without its device this state cannot be applied, and nothing else may wait.
        scope = Scope(has_own_routes=False, is_exclusive=True)
        self._reconciler = NetnsReconciler("tunnels through NAT", namespaces.home, namespaces, repairs, scope)
        self._pair: WireGuardKey | None = None
        self._tunnels: NatTunnels | None = None
        self._address = ""
        """This node's address, for which the device was made."""
        self._vxlan_port = DEFAULT_DATA_PATH_PORT
        self._changed = asyncio.Event()
        self._is_known = False
        self._healed_at = float("-inf")
        self._read_at = float("-inf")
        self._machine = MachineFacts(tunnel_mtu(USUAL_MTU, is_ipv6=False), has_address=True)
        self._ports: tuple[UsedPort, ...] = ()
        self._applied: NatTunnels | None = None
        """The tunnels for which everything was read and configured."""
        self._fails_since: float | None = None
        self._backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S, rng=rng)
        self._followed = NamespaceState()
        """The state that overlays have followed."""
        self._last_error = ""

    @property
    def _port(self) -> int:
        return tunnel_port(self._vxlan_port, self._options.port)

    def labels(self) -> Mapping[str, str]:
        """Return the engine label with this node's public key, or nothing if it can have no tunnels.

        Raises: Unavailable: the key cannot be read or saved.
        """
        if isinstance(self._options.method, EncryptionRefusal):
            return {}
        return {TUNNEL_LABEL: public_keys_label([PublicKey(self._own_key().public, self._port)])}

    def set_targets(self, targets: ProbeTargets | None) -> None:
        """Keep the tunnels of ``targets`` from now on, or none.

        Without targets, the node is in no cluster.  Its key is forgotten then, because in its next cluster, or as
        another node of the same one, it would be the key of two nodes.
        """
        tunnels = targets.tunnels if targets is not None else None
        if targets is not None:
            self._vxlan_port = targets.node.vxlan_port
        else:
            self._pair = None
            with suppress(OSError):
                self._file.unlink(missing_ok=True)
        if tunnels != self._tunnels or not self._is_known:
            self._tunnels, self._is_known = tunnels, True
            self._changed.set()

    async def run(self, changed: Callable[[], Awaitable[None]], say: Callable[[str], None]) -> None:
        """Keep the device, its address, routes and rules until cancelled.

        ``changed`` is called when the address or the MTU has changed.  It may raise SkepError, and is then retried.
        ``say`` sets a node condition.  An empty text clears it.
        """
        if isinstance(self._options.method, EncryptionRefusal):
            return
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    self._changed.clear()
                    if self._is_known:
                        await self._try_step(group, changed)
                        say(self._condition())
                    if self._last_error:
                        await is_set_within(self._changed, self._backoff.next_delay_s())
                    elif self._tunnels is None:
                        await self._changed.wait()
                    else:
                        await is_set_within(self._changed, PERIOD_S if self._devices.placed else HURRY_S)
        finally:
            self._devices.forget_processes()

    async def _try_step(self, group: asyncio.TaskGroup, changed: Callable[[], Awaitable[None]]) -> None:
        error = ""
        try:
            state = await self._step(group)
            if state != self._followed:  # another address or MTU
                await changed()
                self._followed = state
        except (SkepError, OSError, NetlinkError) as problem:
            error = str(problem)
        if error and error != self._last_error:
            log.warning("tunnels through NAT not carried, retrying", reason=error)
        self._last_error = error
        if not error:
            self._backoff.reset()
            self._fails_since = None
        elif self._fails_since is None:
            self._fails_since = self._clock.monotonic()

    def _condition(self) -> str:
        if self._fails_since is None:
            return nat.condition(self._tunnels)
        is_lasting = self._clock.monotonic() - self._fails_since >= SHOWN_AFTER_S
        return f"the tunnels through NAT do not work: {self._last_error}" if is_lasting else ""

    async def _step(self, group: asyncio.TaskGroup) -> NamespaceState:
        tunnels = self._tunnels
        if tunnels is None or tunnels.address != self._address:
            await self._close(group)
            self._address = tunnels.address if tunnels is not None else ""
        if tunnels is None:
            return NamespaceState()
        pair = self._own_key()
        self._devices.supervise(group, {TUNNEL_SLOT})
        name, method = self._devices.name(TUNNEL_SLOT), self._options.method
        assert isinstance(method, EncryptionMethod), "otherwise there are no tunnels"
        now = self._clock.monotonic()
        is_due = tunnels is not self._applied or now - self._read_at >= READ_AGAIN_S
        if is_due:
            self._machine = await self._find_machine(tunnels, name)
            self._ports = self._ports_inside()
        mtu, has_address = self._machine.mtu, self._machine.has_address
        if await self._devices.place({TUNNEL_SLOT}, mtu):
            self._reconciler.invalidate()
            is_due = True
        state = NamespaceState()
        if self._devices.placed:
            link = Link(name=name, kind=DEVICE_KINDS[method], mtu=mtu)
            state = nat.tunnel_state(tunnels, link, has_address=has_address)
        self._reconciler.set_part(_PART, state, nat.tunnel_filter(tunnels, name, self._ports))
        await self._reconciler.apply()
        if now - self._healed_at >= HEAL_S:
            await self._reconciler.heal()
            self._healed_at = now
        if is_due and self._devices.placed:
            device = nat.tunnel_device(tunnels, pair, self._port)
            await self._devices.configure(WireGuardPlan(devices={TUNNEL_SLOT: device}), lambda: (pair,))
            self._applied, self._read_at = tunnels, now
        return state

    def _ports_inside(self) -> tuple[UsedPort, ...]:
        """Return this node's ports that others reach through the tunnels."""
        images = {port: use for port, use in self._own_ports().items() if use == IMAGES_USE}
        return between_nodes({**of_data_path(self._vxlan_port, self._options.port), **images})

    async def _close(self, group: asyncio.TaskGroup) -> None:
        """Remove everything of another address.  The device of an earlier process goes too, unless it is still needed.

        A node that never had tunnels is left alone.
        """
        self._devices.supervise(group, frozenset())
        name = self._devices.name(TUNNEL_SLOT)
        is_left = self._tunnels is None and await self._namespaces.run(self._namespaces.home, _exists, name)
        if self._reconciler.has_part(_PART) or is_left:
            self._reconciler.remove_part(_PART, (nat.TABLE,))
            await self._reconciler.apply()
            await self._reconciler.remove(name)
        self._devices.forget()
        self._applied = None

    async def _find_machine(self, tunnels: NatTunnels, name: str) -> MachineFacts:
        """Return the MTU by the device that packets to the first peer leave through, and whether the machine has the
        address of a node that others reach.
        """
        run, home = self._namespaces.run, self._namespaces.home
        endpoint = next((peer.endpoint for peer in tunnels.peers if peer.endpoint), _ANYWHERE)
        source = await run(home, source_address, endpoint)
        found = await run(home, underlays.find, {source, tunnels.address} - {""}, name)
        through = (
            found.get(source) if tunnels.is_behind_nat else found.get(tunnels.address, found.get(source))
        )
        mtu = through.mtu if through is not None else USUAL_MTU
        return MachineFacts(
            tunnel_mtu(mtu, is_ipv6=False), has_address=tunnels.is_behind_nat or tunnels.address in found
        )

    def _own_key(self) -> WireGuardKey:
        """Return the key of an earlier process of this boot, or make one.  Raises: Unavailable."""
        if self._pair is None:
            try:
                pairs = keys.load(self._file, {TUNNEL_SLOT})
                if not pairs:
                    private = keys.new_private_key()
                    pairs = (
                        WireGuardKey(private=private, slot=TUNNEL_SLOT, made_at=self._options.since_boot()),
                    )
                    keys.save(self._file, pairs)
            except OSError as error:
                reason = describe_error(error)
                raise Unavailable(f"the key of tunnels through NAT cannot be used: {reason}") from error
            self._pair = pairs[0]
        return self._pair


def _exists(device: str) -> bool:
    return any(name == device for _, name in socket.if_nameindex())
