"""The network namespace of a node's probes, reconciled like an overlay's."""

from collections.abc import Iterable
from pathlib import Path

from skep.dataplane import underlays
from skep.dataplane.netns.healer import Healer
from skep.dataplane.netns.kernel import checksums, pinned
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.observation import EXCLUSIVE
from skep.dataplane.netns.reconciler import NetnsReconciler
from skep.dataplane.netns.repair_counts import Repairs
from skep.dataplane.netns.state import NamespaceState
from skep.dataplane.plan.overlay import Underlay
from skep.dataplane.plan.packet_filter import probe_filter
from skep.dataplane.plan.probe import DEVICE, probe_state
from skep.dataplane.probe.probe_socket import Sockets
from skep.model.networks.paths import ProbeTargets

_PIN = "probe"
_PART = "probes"


class ProbeNamespace:
    """A pinned namespace with a VXLAN device, and the rules in the node's own namespace that accept peers' packets.

    Args:
        pins: Folder where the namespace is pinned.
        home: Reconciler of the node's own namespace.
        bridges: The containers' bridges, from which no probes are accepted.
    """

    def __init__(
        self,
        *,
        pins: Namespaces,
        home: NetnsReconciler,
        repairs: Repairs,
        healer: Healer,
        bridges: Iterable[str],
    ) -> None:
        self._pins = pins
        self._home = home
        self._healer = healer
        self._bridges = tuple(bridges)
        self._reconciler = NetnsReconciler("probes", self.path, pins, repairs, EXCLUSIVE)

    @property
    def path(self) -> Path:
        """Path at which the namespace is pinned."""
        return self._pins.path(_PIN)

    async def apply(self, targets: ProbeTargets, *, offloads: bool | None) -> Underlay:
        """Create or change the namespace for ``targets``.  Return the underlay that probes are sent from.

        ``offloads`` sets whether the device leaves checksums to the network card.  None leaves the setting unchanged.
        Raises: KernelRefused, NftFailed, OSError.
        """
        own = targets.node.data_path
        found = await self._pins.run(self._pins.home, underlays.find, {own})
        underlay = found.get(own, Underlay(own))
        self._home.set_part(_PART, NamespaceState(), probe_filter(targets, self._bridges))
        await self._home.apply()
        await pinned.make_where_missing(self._pins, _PIN, self._reconciler, self._healer)
        self._reconciler.set_part(_PART, probe_state(targets, underlay, offloads=offloads))
        await self._reconciler.apply()
        await self._healer.watch(self._reconciler)
        return underlay

    async def remove(self) -> None:
        """Remove the namespace and its rules if they exist.  Raises: KernelRefused, NftFailed, OSError."""
        self._healer.forget(self._reconciler)
        if self._home.has_part(_PART):
            self._home.remove_part(_PART)
            await self._home.apply()
        await pinned.remove(self._pins, _PIN)
        self._reconciler.reset()

    async def has_offloads(self) -> bool:
        """Return whether the device leaves checksums to the network card.  Raises: OSError."""
        return await self._pins.run(self.path, checksums.offloads, DEVICE)

    async def sockets(self, address: str) -> Sockets:
        """Open sockets at ``address``.  The caller closes them.  Raises: OSError."""
        return await self._pins.run(self.path, Sockets, address)

    def identity(self) -> int:
        """Return the inode of the namespace, which changes when the namespace is created again.  Raises: OSError."""
        return self.path.stat().st_ino
