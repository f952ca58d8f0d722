"""Creates the pinned namespaces of overlays and probes if they are missing, and removes them with their devices."""

import os

from skep.dataplane.netns.healer import Healer
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.reconciler import NetnsReconciler
from skep.dataplane.netns.write import remove_devices
from skep.dataplane.plan.overlay import OVERLAY_SYSCTLS


async def make_where_missing(
    pins: Namespaces, name: str, reconciler: NetnsReconciler, healer: Healer
) -> None:
    """Create and pin the namespace ``name`` if it is missing, and make ``reconciler`` forget its assumed state.

    Raises: OSError.
    """
    if not os.path.ismount(pins.path(name)):
        await pins.destroy(name)
        await pins.create(name, OVERLAY_SYSCTLS)
        reconciler.reset()
        healer.forget(reconciler)


async def remove(pins: Namespaces, name: str) -> None:
    """Remove the VXLAN devices and ports of the namespace, then its pin.  Idempotent.  Raises: OSError."""
    path = pins.path(name)
    if os.path.ismount(path):
        await remove_devices(pins, path)
    await pins.destroy(name)
