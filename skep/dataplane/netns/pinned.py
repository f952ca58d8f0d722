"""The pinned namespaces of overlays and of probes: made where they are missing, removed with their devices."""

import os

from skep.dataplane.netns.healer import Healer
from skep.dataplane.netns.namespaces import Namespaces
from skep.dataplane.netns.reconciler import NetnsReconciler
from skep.dataplane.netns.write import remove_vxlans
from skep.dataplane.plan.overlay import OVERLAY_SYSCTLS


async def make_where_missing(
    pins: Namespaces, name: str, reconciler: NetnsReconciler, healer: Healer
) -> None:
    """Have the namespace of ``reconciler`` at ``name``; nothing is known of one made anew.  Raises: OSError."""
    if not os.path.ismount(pins.path(name)):
        await pins.destroy(name)
        await pins.create(name, OVERLAY_SYSCTLS)
        reconciler.reset()
        healer.forget(reconciler)


async def remove(pins: Namespaces, name: str) -> None:
    """Remove the devices that send and the pin; harmless when nothing is there.  Raises: OSError."""
    path = pins.path(name)
    if os.path.ismount(path):
        await remove_vxlans(pins, path)
    await pins.destroy(name)
