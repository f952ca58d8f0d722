"""The pinned namespaces of overlays and of probes: made where they are missing, removed with their devices."""

import os

from skep.dataplane.netns.namespaces import Namespaces
from skep.dataplane.overlay.changing import remove_vxlans
from skep.dataplane.overlay.domain import Domain
from skep.dataplane.overlay.healing import Healing
from skep.dataplane.overlay.wanted import OVERLAY_SYSCTLS


async def make_where_missing(pins: Namespaces, name: str, domain: Domain, healing: Healing) -> None:
    """Have the namespace of ``domain`` at ``name``; nothing is known of one made anew.  Raises: OSError."""
    if not os.path.ismount(pins.path(name)):
        await pins.destroy(name)
        await pins.create(name, OVERLAY_SYSCTLS)
        domain.forget()
        healing.forget(domain)


async def remove(pins: Namespaces, name: str) -> None:
    """Remove the devices that send and the pin; harmless when nothing is there.  Raises: OSError."""
    path = pins.path(name)
    if os.path.ismount(path):
        await remove_vxlans(pins, path)
    await pins.destroy(name)
