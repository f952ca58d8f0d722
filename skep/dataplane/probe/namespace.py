"""The namespace of a node's probes, made and kept like an overlay's."""

from collections.abc import Iterable
from pathlib import Path

from skep.dataplane import underlays
from skep.dataplane.netns import pinned
from skep.dataplane.netns.checksums import offloads
from skep.dataplane.netns.healer import Healer
from skep.dataplane.netns.namespaces import Namespaces
from skep.dataplane.netns.reconciler import EXCLUSIVE, NetnsReconciler
from skep.dataplane.netns.repairs import Repairs
from skep.dataplane.netns.state import State
from skep.dataplane.plan.overlay import Underlay
from skep.dataplane.plan.packet_filter import probe_filter
from skep.dataplane.plan.probe import DEVICE, probe_state
from skep.dataplane.probe.probe_socket import Sockets
from skep.model.paths import ProbeTargets

_NAME = "probe"
_PART = "probes"


class ProbeNamespace:
    """A pinned namespace with a VXLAN device, and the rules at home that let its peers' packets in.

    ``pins``: where it is pinned; ``home``: the node's own namespace; ``bridges``: those that containers' packets come
    by.
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
        return self._pins.path(_NAME)

    async def settle(self, targets: ProbeTargets, *, left_to_card: bool | None) -> Underlay:
        """Bring ``targets`` about; what its probes leave from.

        ``left_to_card``: checksums of what the device sends; None: as it is.  Raises: KernelRefused, NftFailed,
        OSError.
        """
        own = targets.node.data_path
        found = await self._pins.run(self._pins.home, underlays.find, {own})
        underlay = found.get(own, Underlay(own))
        self._home.set_part(_PART, State(), probe_filter(targets, self._bridges))
        await self._home.apply()
        await pinned.make_where_missing(self._pins, _NAME, self._reconciler, self._healer)
        self._reconciler.set_part(_PART, probe_state(targets, underlay, offloads=left_to_card))
        await self._reconciler.apply()
        await self._healer.watch(self._reconciler)
        return underlay

    async def remove(self) -> None:
        """Leave nothing; harmless when nothing is there.  Raises: KernelRefused, NftFailed, OSError."""
        self._healer.forget(self._reconciler)
        if self._home.has_part(_PART):
            self._home.remove_part(_PART)
            await self._home.apply()
        await pinned.remove(self._pins, _NAME)
        self._reconciler.reset()

    async def is_left_to_card(self) -> bool:
        """Whether the device leaves checksums to the card at present.  Raises: OSError."""
        return await self._pins.run(self.path, offloads, DEVICE)

    async def sockets(self, address: str) -> Sockets:
        """New ones at ``address``; the caller closes them.  Raises: OSError."""
        return await self._pins.run(self.path, Sockets, address)

    def identity(self) -> int:
        """Another number where the namespace is another one.  Raises: OSError."""
        return self.path.stat().st_ino
