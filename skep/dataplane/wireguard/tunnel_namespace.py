"""The network namespace of the tunnels: created while it is used, and kept in its desired state."""

import asyncio
import os
from pathlib import Path

import structlog

from skep.aio.clock import Clock
from skep.dataplane.netns.kernel import pinned
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.nft_table import NftTable
from skep.dataplane.netns.observation import EXCLUSIVE
from skep.dataplane.netns.reconciler import NetnsReconciler
from skep.dataplane.netns.repair_counts import Repairs
from skep.dataplane.netns.state import NamespaceState

log = structlog.get_logger()

NAMESPACE = "wireguard"
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


class TunnelNamespace:
    """The namespace of the devices, and of the sockets of encrypted networks' VXLANs."""

    def __init__(self, pins: Namespaces, repairs: Repairs, clock: Clock) -> None:
        self._pins = pins
        self._clock = clock
        self.path: Path = pins.path(NAMESPACE)
        self._reconciler = NetnsReconciler("tunnels", self.path, pins, repairs, EXCLUSIVE)
        self._healed_at = -HEAL_S
        self.opening = asyncio.Lock()
        """Held while the namespace is created or removed."""
        self.users = 0
        """Number of blocks that need the namespace, even if no network does."""

    async def create(self) -> bool:
        """Create the namespace if it does not exist.  Returns whether it was created."""
        if os.path.ismount(self.path):
            return False
        await self._pins.destroy(NAMESPACE)
        await self._pins.create(NAMESPACE, SYSCTLS)
        self._reconciler.reset()
        return True

    async def remove(self) -> None:
        """Remove the namespace with its devices."""
        if os.path.exists(self.path):
            await pinned.remove(self._pins, NAMESPACE)
            log.info("wireguard tunnels removed")
        self._reconciler.reset()

    def invalidate(self) -> None:
        """Make the next change read the namespace first, because devices have come or gone."""
        self._reconciler.invalidate()

    async def apply(self, state: NamespaceState, table: NftTable) -> None:
        """Apply a desired state, and repair deviations now and then.  Raises: KernelRefused, NftFailed, OSError."""
        self._reconciler.set_part(NAMESPACE, state, table)
        await self._reconciler.apply()
        if self._clock.monotonic() - self._healed_at >= HEAL_S:
            await self._reconciler.heal()
            self._healed_at = self._clock.monotonic()
