"""VLAN and dummy devices in the node's own namespace that are parents of its networks.

Such a device is created with its network, and again by the first container that finds it missing, for instance after a
reboot.  It is removed with the last network that uses it.

Source: moby 20.10, libnetwork/drivers/macvlan/macvlan_setup.go (error texts).
"""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.errors import Unavailable
from skep.model.networks.tables import ParentLink

_DEADLINE_S = 10.0
"""Time limit in seconds for listing devices."""


class ParentDevices:
    """Creates and removes parent devices."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces

    async def make(self, parent: ParentLink) -> None:
        """Create the device if it is missing, and bring it up.  Raises: Unavailable: the kernel refused."""
        async with self._kernel() as route:
            await index_of(route, parent)

    async def remove(self, parent: ParentLink) -> None:
        """Remove the device if it has the kind that Skep creates.  Raises: Unavailable: the kernel refused."""
        async with self._kernel() as route:
            for index in await route.link_lookup(ifname=parent.device):
                (found,) = await route.link("get", index=index)
                if found.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") == parent.made:
                    await route.link("del", index=index)

    @asynccontextmanager
    async def _kernel(self) -> AsyncIterator[AsyncIPRoute]:
        try:
            async with asyncio.timeout(_DEADLINE_S), self._namespaces.netlink(self._namespaces.home) as route:
                yield route
        except TimeoutError as error:
            raise Unavailable(f"the kernel did not answer in {_DEADLINE_S:g} s") from error
        except (OSError, NetlinkError) as error:
            raise Unavailable(f"the kernel refused a change of the network: {error}") from error


async def index_of(route: AsyncIPRoute, parent: ParentLink) -> int:
    """Return the index of the device.  A missing device that belongs to Skep is created first.

    Raises: Unavailable: it is missing, or the kernel refused to create it.
    """
    found = await route.link_lookup(ifname=parent.device)
    if not found and parent.made:
        await _make(route, parent)
        found = await route.link_lookup(ifname=parent.device)
    if not found:
        raise Unavailable(f"a network's parent interface {parent.device} does not exist on this node")
    return int(found[0])


async def _make(route: AsyncIPRoute, parent: ParentLink) -> None:
    options: dict[str, Any] = {"ifname": parent.device, "kind": parent.made, "state": "up"}
    if parent.made == "vlan":
        below, _, number = parent.device.partition(".")
        lower = await route.link_lookup(ifname=below)
        if not lower:
            raise Unavailable(f"failed to find master interface {below} on the node")
        options |= {"link": lower[0], "vlan_id": int(number)}
    try:
        await route.link("add", **options)
    except NetlinkError as error:
        if error.code == errno.EEXIST:  # it was just created for another container
            return
        reason = os.strerror(error.code)
        if error.code == errno.EOPNOTSUPP:
            reason = f"the kernel of this node has no {parent.made} devices"
        raise Unavailable(f"failed to create {parent.device} {parent.made} link: {reason}") from error
