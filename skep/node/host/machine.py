"""Facts about this machine, read once at start, and its network interfaces.

The facts are reported to the managers and shown by ``/info`` and ``/version``.  From the interfaces, ``docker swarm
init`` chooses the node's address.  They are read by netlink and not with the ``ip`` command: on Ubuntu 24.04 the JSON
of ``ip -details`` is invalid once a VXLAN device exists.
"""

import asyncio
import os
import platform
import socket
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from pathlib import Path

import msgspec
from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl.ifinfmsg import IFF_LOOPBACK, IFF_UP

from skep.api.formats.swarm_requests import Interface, Interfaces
from skep.engine.capacity import processors
from skep.errors import Unavailable
from skep.linux.processes import boot_id

_SECOND_TO_NANO = 1_000_000_000
"""Docker counts processor time and processors in billionths."""

_TIMEOUT_S = 5.0
"""Time limit in seconds for listing the machine's addresses."""
_OUR_KINDS = frozenset({"bridge", "vxlan", "ifb", "dummy"})
"""Kinds of links that carry containers' networks.

``veth`` is not included, because a machine that is itself a container has its address on a veth.
"""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about the machine, as in ``/info``."""

    hostname: str
    architecture: str
    """Name of the architecture in the kernel, such as x86_64 or aarch64."""
    kernel: str
    os_name: str
    """For example ``Debian GNU/Linux 12 (bookworm)``."""
    os_version: str
    distribution: str = ""
    """Short name of the distribution, such as ``debian``."""
    cpus: int
    memory_bytes: int
    boot_id: str = ""

    @property
    def go_architecture(self) -> str:
        """The architecture's name in Go, as in ``/version`` and in images' platforms: amd64, arm64."""
        return _GO_ARCHITECTURES.get(self.architecture, self.architecture)

    @property
    def nano_cpus(self) -> int:
        """Number of processors in Docker's unit, 10^9 per processor."""
        return self.cpus * _SECOND_TO_NANO


_GO_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


def this_machine() -> Machine:
    """Read the facts about the machine that this process runs on."""
    release = _os_release()
    return Machine(
        hostname=socket.gethostname(),
        architecture=platform.machine(),
        kernel=platform.release(),
        os_name=release.get("PRETTY_NAME", "Linux"),
        os_version=release.get("VERSION_ID", ""),
        distribution=release.get("ID", ""),
        cpus=processors(),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        boot_id=boot_id(),
    )


def _os_release() -> dict[str, str]:
    for path in (Path("/etc/os-release"), Path("/usr/lib/os-release")):
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError:
            continue
        return {key: value.strip("\"'") for key, _, value in (line.partition("=") for line in lines) if value}
    return {}


class KernelLink(msgspec.Struct, frozen=True):
    """A link as the kernel reports it.

    ``flags`` has the ``IFF_`` bits of if.h.  ``kind`` is empty for a physical device.
    """

    index: int
    name: str
    flags: int = 0
    kind: str = ""


async def read_interfaces() -> Interfaces:
    """Return every interface with its addresses, by name.  Raises: Unavailable: the kernel does not respond."""
    try:
        async with asyncio.timeout(_TIMEOUT_S), AsyncIPRoute() as route:
            links = [
                KernelLink(one["index"], one.get("ifname"), one["flags"], one.get(("linkinfo", "kind")) or "")
                async for one in await route.link("dump")
            ]
            addresses = [
                # On a point-to-point link, ``address`` is the far end and ``local`` is this machine's end.
                (one["index"], one.get("local") or one.get("address"))
                async for one in await route.addr("dump", family=socket.AF_UNSPEC)
            ]
    except (OSError, NetlinkError, TimeoutError) as error:
        raise Unavailable(f"the addresses of this machine cannot be read: {error}") from error
    return interfaces_of(links, addresses)


def interfaces_of(links: Iterable[KernelLink], addresses: Iterable[tuple[int, str]]) -> Interfaces:
    """Return the links with their addresses, by name.  Each address is given with the index of its link.

    If a physical device has an address, bridges and similar devices are left out, as in Docker Engine.
    """
    of_links: dict[int, list[str]] = {}
    for index, address in addresses:
        of_links.setdefault(index, []).append(address)
    return {link.name: _interface(link, of_links) for link in links}


def _interface(link: KernelLink, addresses: Mapping[int, Iterable[str]]) -> Interface:
    return Interface(
        addresses=tuple(map(ip_address, addresses.get(link.index, ()))),
        is_up=bool(link.flags & IFF_UP),
        is_loopback=bool(link.flags & IFF_LOOPBACK),
        is_ours=link.kind in _OUR_KINDS,
    )
