"""The WireGuard devices of this node: their processes, places and configuration, and the handshakes on them."""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from socket import AF_INET6
from typing import Protocol

import structlog

from skep.aio.clock import Clock
from skep.dataplane.netns.kernel import pinned
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.nft_table import NftTable
from skep.dataplane.netns.observation import EXCLUSIVE
from skep.dataplane.netns.reconciler import NetnsReconciler
from skep.dataplane.netns.repair_counts import Repairs
from skep.dataplane.netns.state import NamespaceState
from skep.dataplane.plan.rotation import Handshake, handshakes_of, noted
from skep.dataplane.plan.wireguard import (
    KeyChoice,
    Session,
    WireGuardDevice,
    WireGuardKey,
    WireGuardPlan,
    changes,
    device_name,
)
from skep.dataplane.wireguard.devices import KernelDevices, UserSpaceDevices, WireGuardDevices
from skep.errors import SkepError

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


class Process(Protocol):
    """A supervised wireguard-go (``supervision.supervisor.Supervisor``)."""

    async def run(self) -> None:
        """Keep the process running until cancelled."""

    def dismiss(self) -> None:
        """Stop the process when ``run`` is cancelled."""


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


class TunnelDevices:
    """One device for each slot of a key, in the namespace of the tunnels."""

    def __init__(
        self,
        run_directory: Path,
        namespace: Path,
        namespaces: Namespaces,
        process: Callable[[int], Process] | None,
        clock: Clock,
        *,
        are_in_kernel: bool,
    ) -> None:
        """Create the devices' keeper.

        Args:
            process: Creates the supervisor of wireguard-go for a slot, or None if devices need no process.
        """
        self._run_directory = run_directory
        self._namespace = namespace
        self._namespaces = namespaces
        self._process = process
        self._clock = clock
        self._devices: WireGuardDevices = (
            KernelDevices(namespaces) if are_in_kernel else UserSpaceDevices(namespaces)
        )
        self.handshakes: Mapping[Session, Handshake] | None = None
        """The handshakes, or None until the devices were read."""
        self.placed: Mapping[int, int] = {}
        """Index of the device in each slot."""
        self._configured: dict[int, WireGuardDevice] = {}
        self._processes: dict[int, tuple[Process, asyncio.Task[None]]] = {}

    def name(self, slot: int) -> str:
        """Return the name of the device in a slot."""
        return device_name(self._run_directory, slot)

    def forget(self) -> None:
        """Forget devices and handshakes, because the namespace was removed."""
        self.placed, self.handshakes = {}, None
        self._configured.clear()

    def forget_processes(self) -> None:
        """Forget the processes, which ended with their task group."""
        self._processes.clear()

    def supervise(self, group: asyncio.TaskGroup, slots: Set[int]) -> None:
        """Run a process for each device if devices need one."""
        if self._process is None:
            return
        for slot in self._processes.keys() - slots:
            process, task = self._processes.pop(slot)
            process.dismiss()
            task.cancel()
        for slot in slots - self._processes.keys():
            process = self._process(slot)
            task = group.create_task(process.run(), name=f"wireguard-go {slot}")
            self._processes[slot] = (process, task)

    async def find_handshakes(self, pairs: Sequence[WireGuardKey]) -> None:
        """Read the handshakes of devices that an earlier node process has configured, so that traffic continues on
        them.
        """
        found = []
        for pair in pairs:
            try:
                found.append(await self._devices.read_device(self.name(pair.slot), self._namespace))
            except SkepError:
                continue
        self.handshakes = noted({}, handshakes_of(found, pairs), self._clock.monotonic())

    async def place(self, slots: Set[int], mtu: int) -> bool:
        """Move the devices of ``slots`` into the namespace.  Returns whether any device has changed."""
        placed = {}
        for slot in slots:
            if index := await self._devices.place(self.name(slot), self._namespace, mtu):
                placed[slot] = index
        if placed == self.placed:
            return False
        for slot in placed.keys() | self.placed.keys():
            if placed.get(slot) != self.placed.get(slot):
                self._configured.pop(slot, None)
        self.placed = placed
        return True

    async def configure(self, plan: WireGuardPlan, keys: Callable[[], Sequence[WireGuardKey]]) -> None:
        """Configure the devices as planned, and note the handshakes on them.  ``keys`` returns this node's pairs."""
        found = []
        planned = [(slot, wanted) for slot, wanted in plan.devices.items() if slot in self.placed]
        for slot, wanted in planned:
            device = await self._devices.read_device(self.name(slot), self._namespace)
            change = changes(device, wanted, self._configured.get(slot))
            if change.is_needed:
                await self._devices.write(self.name(slot), self._namespace, change)
            self._configured[slot] = wanted
            found.append(device)
        self.handshakes = noted(self.handshakes or {}, handshakes_of(found, keys()), self._clock.monotonic())

    async def reroute(self, before: KeyChoice, choice: KeyChoice) -> None:
        """Move routes from one device to another.

        They are replaced in place, so that packets always have a route.
        """
        moved = {
            address: self.placed[slot]
            for address, slot in choice.slots.items()
            if slot in self.placed and before.slots.get(address, slot) != slot
        }
        if not moved:
            return
        async with self._namespaces.netlink(self._namespace) as route:
            for address, index in moved.items():
                await route.route("replace", dst=f"{address}/128", oif=index, family=AF_INET6)
