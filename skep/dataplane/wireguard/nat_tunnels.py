"""This node's tunnels through NAT: one WireGuard device in the node's own namespace (``plan/nat.py``).

The device, its address, routes and rules exist while managers say that the node needs tunnels.  They outlive the node
process.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping

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
from skep.dataplane.wireguard.tunnel_devices import HEAL_S, TunnelDevices
from skep.dataplane.wireguard.tunnels import DEVICE_KINDS, Options
from skep.errors import SkepError, Unavailable
from skep.linux.network.route_lookup import source_address
from skep.model.networks.data_planes import TUNNEL_LABEL
from skep.model.networks.paths import NatTunnels, ProbeTargets
from skep.model.networks.reserved_ports import TUNNEL_SLOT, tunnel_port
from skep.model.networks.wireguard import EncryptionMethod, PublicKey, public_keys_label
from skep.model.swarm import DEFAULT_DATA_PATH_PORT
from skep.paths import Paths

log = structlog.get_logger()

PERIOD_S = 1.0
"""Seconds between checks for a removed device."""
HURRY_S = 0.1
"""Seconds between checks while the device does not exist yet."""
FIRST_RETRY_S, LONGEST_RETRY_S = 0.2, 5.0
"""First and longest pause in seconds after an error."""
_PART = "nat"


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
    ) -> None:
        self._file = paths.nat_key
        self._namespaces = namespaces
        self._options = options
        self._clock = clock
        self._devices = TunnelDevices(
            paths.run,
            namespaces.home,
            namespaces,
            options.process if options.method is EncryptionMethod.USER_SPACE else None,
            clock,
            are_in_kernel=options.method is EncryptionMethod.KERNEL,
        )
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
        """Keep the tunnels of ``targets`` from now on, or none."""
        tunnels = targets.tunnels if targets is not None else None
        if targets is not None:
            self._vxlan_port = targets.node.vxlan_port
        if tunnels != self._tunnels or not self._is_known:
            self._tunnels, self._is_known = tunnels, True
            self._changed.set()

    async def run(self, changed: Callable[[], Awaitable[None]]) -> None:
        """Keep the device, its address, routes and rules until cancelled.

        ``changed`` is called when the address or the MTU has changed.  It may raise SkepError, and is then retried.
        """
        if isinstance(self._options.method, EncryptionRefusal):
            return
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    self._changed.clear()
                    if self._is_known:
                        await self._try_step(group, changed)
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

    async def _step(self, group: asyncio.TaskGroup) -> NamespaceState:
        tunnels = self._tunnels
        if tunnels is None or tunnels.address != self._address:
            await self._close(group)
            self._address = tunnels.address if tunnels is not None else ""
        if tunnels is None:
            return NamespaceState()
        pair = self._own_key()
        self._devices.supervise(group, {TUNNEL_SLOT})
        mtu = await self._mtu(tunnels)
        if await self._devices.place({TUNNEL_SLOT}, mtu):
            self._reconciler.invalidate()
        name, method = self._devices.name(TUNNEL_SLOT), self._options.method
        assert isinstance(method, EncryptionMethod), "otherwise there are no tunnels"
        state = NamespaceState()
        if self._devices.placed:
            state = nat.tunnel_state(tunnels, Link(name=name, kind=DEVICE_KINDS[method], mtu=mtu))
        self._reconciler.set_part(_PART, state, nat.tunnel_filter(tunnels, name))
        await self._reconciler.apply()
        if self._clock.monotonic() - self._healed_at >= HEAL_S:
            await self._reconciler.heal()
            self._healed_at = self._clock.monotonic()
        device = nat.tunnel_device(tunnels, pair, self._port)
        await self._devices.configure(WireGuardPlan(devices={TUNNEL_SLOT: device}), lambda: (pair,))
        return state

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

    async def _mtu(self, tunnels: NatTunnels) -> int:
        """Return the MTU inside the tunnels, by the device that packets to the first peer leave through."""
        endpoint = next((peer.endpoint for peer in tunnels.peers if peer.endpoint), "")
        run, home = self._namespaces.run, self._namespaces.home
        own = await run(home, source_address, endpoint) if endpoint else tunnels.address
        found = await run(home, underlays.find, {own} if own else set[str]())
        return tunnel_mtu(found[own].mtu if own in found else USUAL_MTU, is_ipv6=False)

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
