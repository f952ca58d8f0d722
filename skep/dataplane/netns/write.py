"""Executes operations in one network namespace.

Adding an existing item, or removing a missing one, is not an error, so that two writers of the same item do no harm.
"""

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any

import structlog
from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from skep.dataplane.netns import parents, read
from skep.dataplane.netns.diff import (
    AddLink,
    ChangeLink,
    DeleteLink,
    Operation,
    Put,
    Remove,
    SetSysctl,
)
from skep.dataplane.netns.kernel import netlink
from skep.dataplane.netns.kernel.checksums import set_offloads
from skep.dataplane.netns.kernel.namespaces import Namespaces, set_sysctl
from skep.dataplane.netns.state import (
    Address,
    EntryKind,
    Link,
    NamespaceState,
    NeighborEntry,
    Route,
    RouteKind,
    RoutingRule,
)
from skep.errors import Unavailable
from skep.model.networks.tables import ParentLink

log = structlog.get_logger()

_DEADLINE_S = 10.0
"""Time limit in seconds for all kernel calls for one namespace.  They take a millisecond on a quiet machine."""
_PRESENT = frozenset({errno.EEXIST})
_ABSENT = frozenset({errno.ENOENT, errno.ENODEV, errno.EADDRNOTAVAIL, errno.ESRCH, errno.ENXIO})
_NDMSG = struct.Struct("=BxxxiHBB")
# Source: linux/neighbour.h (NTF_*, NUD_*, NDA_*) and linux/rtnetlink.h (RT_SCOPE_*).
_SELF, _MASTER = 0x02, 0x04
_PERMANENT, _STATIC = 0x80, 0x40
_DESTINATION, _MAC = 1, 2
_SCOPE_LINK, _SCOPE_HOST = 253, 254
_BROADCAST_LENGTH = 31
"""Networks with at least this prefix length have no broadcast address (RFC 3021)."""
_KERNEL_METRIC6 = 256
"""Metric of the kernel's own IPv6 routes (IP6_RT_PRIO_ADDRCONF)."""


class KernelRefused(Unavailable):
    """The kernel refused a change that an overlay needs.  It is retried."""


async def apply_operations(namespaces: Namespaces, path: Path, operations: Sequence[Operation]) -> None:
    """Execute ``operations`` in the namespace at ``path``, in their order.

    VXLAN devices are created from the namespace where their UDP socket stays.  Raises: KernelRefused.
    """
    if not operations:
        return
    try:
        async with asyncio.timeout(_DEADLINE_S):
            await _carry_out(namespaces, path, operations)
    except TimeoutError as error:
        raise KernelRefused(f"the kernel did not answer in {_DEADLINE_S:g} s") from error
    except (OSError, NetlinkError) as error:
        raise KernelRefused(f"the kernel refused a change of the network: {error}") from error


_MODES: Mapping[str, Mapping[str, int | str]] = {
    "macvlan": {"private": "private", "vepa": "vepa", "bridge": "bridge", "passthru": "passthru"},
    "ipvlan": {"l2": 0, "l3": 1, "l3s": 2},
}
"""Modes of macvlan and ipvlan devices, as pyroute2 expects them."""


async def remove_devices(namespaces: Namespaces, path: Path) -> None:
    """Remove the VXLAN devices and ports of the namespace at ``path``, which is about to be removed itself.

    The kernel frees a namespace and its devices later, but a VXLAN's id and port must be free at once, and so must the
    interface name in a running container that was disconnected.  Failures are logged.
    """
    try:
        found = await namespaces.run(path, read.read_namespace, _leads_outside, NamespaceState())
        await apply_operations(namespaces, path, [DeleteLink(name) for name in found.state.links])
    except (Unavailable, OSError) as error:
        log.warning("network not cleared", path=str(path), error=str(error))


def _leads_outside(link: Link) -> bool:
    return link.kind in ("vxlan", "veth")


async def _carry_out(namespaces: Namespaces, path: Path, operations: Sequence[Operation]) -> None:
    entries: list[Put | Remove] = []

    async def flush() -> None:
        if entries:
            await namespaces.run(path, _write_entries, tuple(entries))
            entries.clear()

    async with AsyncExitStack() as stack:
        changes: _Changes | None = None
        for operation in operations:
            if isinstance(operation, Put | Remove) and isinstance(operation.item, NeighborEntry):
                entries.append(operation)
                continue
            await flush()
            if isinstance(operation, SetSysctl):
                await namespaces.run(path, set_sysctl, operation.name, operation.value)
                continue
            if changes is None:
                route = await stack.enter_async_context(namespaces.netlink(path))
                changes = _Changes(namespaces, path, route)
            await changes.do(operation)
        await flush()


class _Changes:
    """Executes changes of one namespace through ``route``."""

    def __init__(self, namespaces: Namespaces, path: Path, route: AsyncIPRoute) -> None:
        self._namespaces = namespaces
        self._path = path
        self._route = route
        self._indices: dict[str, int] = {}

    async def do(self, operation: Operation) -> None:
        match operation:
            case AddLink(link):
                await self._add(link)
            case ChangeLink(link):
                await self._set(link)
            case DeleteLink(name):
                index = await self._index(name)
                if index:
                    await _tolerating(_ABSENT, self._route.link("del", index=index))
                self._indices.pop(name, None)
            case Put(Address(link, interface)):
                address, _, length = interface.partition("/")
                options = _address_options(address, int(length))
                call = self._route.addr("add", index=await self._require(link), **options)
                await _tolerating(_PRESENT, call)
            case Remove(Address(link, interface)):
                address, _, length = interface.partition("/")
                call = self._route.addr(
                    "del", index=await self._index(link), address=address, prefixlen=int(length)
                )
                await _tolerating(_ABSENT, call)
            case Put(RoutingRule() as rule):
                await _tolerating(_PRESENT, self._route.rule("add", **_rule_options(rule)))
            case Remove(RoutingRule() as rule):
                await _tolerating(_ABSENT, self._route.rule("del", **_rule_options(rule)))
            case Put(Route() as route):
                # Name the device, because another link may have the kernel's route to the same destination (multicast,
                # link-local).
                how = "append" if route.is_kernels and not route.source else "add"
                call = self._route.route(how, **_route_options(route, await self._require(route.link)))
                await _tolerating(_PRESENT, call)
            case Remove(Route() as route):
                call = self._route.route("del", **_route_options(route, await self._index(route.link)))
                await _tolerating(_ABSENT, call)
            case _:
                raise AssertionError(f"not an operation on a link: {operation}")

    async def _add(self, link: Link) -> None:
        options: dict[str, Any] = {"ifname": link.name, "kind": link.kind}
        if link.mtu:
            options["mtu"] = link.mtu
        if link.mac:
            options["address"] = link.mac
        match link.kind:
            case "bridge":
                # Set the MTU afterwards, or the kernel does not keep it: it follows the ports, and is 1500 without any.
                options.pop("mtu", None)
                await _tolerating(_PRESENT, self._route.link("add", br_mcast_snooping=0, **options))
            case "vxlan":
                await self._add_vxlan(link, options)
            case _ if link.parent is not None:
                await self._add_on_parent(link, link.parent, options)
            case _ if link.peer is not None:
                if not os.path.ismount(link.peer.netns):  # the container is just ending
                    log.warning(
                        "namespace of the other end does not exist", link=link.name, namespace=link.peer.netns
                    )
                    return
                with _opened(link.peer.netns) as namespace:
                    far = {"ifname": link.peer.interface, "net_ns_fd": namespace}
                    far |= {"address": link.peer.mac} if link.peer.mac else {}
                    far |= {"mtu": link.mtu} if link.mtu else {}
                    # No error is tolerated, because a device with this name on either side would be another device.
                    await self._route.link("add", peer=far, **options)
            case _:
                raise KernelRefused(f"cannot create {link.name}: its other end is unknown")
        await self._set(link)

    async def _add_on_parent(self, link: Link, parent: ParentLink, options: dict[str, Any]) -> None:
        """Create a device on a parent in the node's own namespace, and move it into this namespace."""
        if parent.kind == "ipvlan":
            options.pop("address", None)  # an ipvlan device has its parent's address
        options[f"{parent.kind}_mode"] = _MODES[parent.kind][parent.mode]
        # Kernels before 6.14 refuse a name that exists in the node's own namespace, such as its eth0.
        options["ifname"] = f"new-{link.name}"
        async with self._namespaces.netlink(self._namespaces.home) as route:
            index = await parents.index_of(route, parent)
            with _opened(str(self._path)) as namespace:
                try:
                    made = route.link("add", link=index, net_ns_fd=namespace, **options)
                    await _tolerating(_PRESENT, made)
                except NetlinkError as error:
                    if error.code != errno.EOPNOTSUPP:
                        raise
                    raise KernelRefused(f"the kernel of this node has no {parent.kind} devices") from error
        await self._rename(options["ifname"], link.name)

    async def _rename(self, name: str, final: str) -> None:
        """Rename a new link, which is down.  Remove it if the final name exists."""
        index = await self._require(name)
        del self._indices[name]
        try:
            await self._route.link("set", index=index, ifname=final)
        except NetlinkError as error:
            await _tolerating(_ABSENT, self._route.link("del", index=index))
            if error.code not in _PRESENT:
                raise

    async def _add_vxlan(self, link: Link, options: dict[str, Any]) -> None:
        assert link.vxlan is not None, "a wanted VXLAN has its parameters"
        local = "vxlan_local6" if ":" in link.vxlan.local else "vxlan_local"
        options |= {
            "vxlan_id": link.vxlan.vni,
            "vxlan_port": link.vxlan.port,
            local: link.vxlan.local,
            "vxlan_learning": False,
            "vxlan_proxy": True,
        }
        if link.vxlan.is_whole:
            options["vxlan_df"] = 1
        sockets = Path(link.sockets) if link.sockets else self._namespaces.home
        async with self._namespaces.netlink(sockets) as route:
            if self._path == sockets:
                await _tolerating(_PRESENT, route.link("add", **options))
            else:
                with _opened(self._path) as namespace:
                    call = route.link("add", net_ns_fd=namespace, **options)
                    await _tolerating(_PRESENT, call)

    async def _set(self, link: Link) -> None:
        index = await self._require(link.name)
        options: dict[str, Any] = {"mtu": link.mtu} if link.mtu else {}
        if link.mac:
            options["address"] = link.mac
        if link.master:
            options["master"] = await self._require(link.master)
        await self._route.link("set", index=index, state="up" if link.is_up else "down", **options)
        if link.is_closed_port and link.master:
            await self._route.brport("set", index=index, learning=0, unicast_flood=0)
        if link.offloads is not None:
            await self._namespaces.run(self._path, set_offloads, link.name, link.offloads)

    async def _index(self, name: str) -> int:
        """Return the index of a link, or 0 if it does not exist."""
        if name not in self._indices:
            found = await self._namespaces.run(self._path, _index_of, name)
            if not found:
                return 0
            self._indices[name] = found
        return self._indices[name]

    async def _require(self, name: str) -> int:
        index = await self._index(name)
        if not index:
            raise OSError(errno.ENODEV, f"there is no link {name}")
        return index


@contextmanager
def _opened(path: str | Path) -> Iterator[int]:
    """Open a namespace and yield its descriptor.  Opening a namespace does not block."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


async def _tolerating(numbers: frozenset[int], call: Any) -> None:
    try:
        await call
    except NetlinkError as error:
        if error.code not in numbers:
            raise


def _address_options(address: str, length: int) -> dict[str, Any]:
    options = {
        "address": address,
        "prefixlen": length,
        "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
    }
    if address.startswith("127."):
        return options | {"scope": _SCOPE_HOST}
    if ":" not in address and length < _BROADCAST_LENGTH:
        options["broadcast"] = str(IPv4Interface(f"{address}/{length}").network.broadcast_address)
    return options


def _route_options(route: Route, index: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "dst": route.destination,
        "oif": index,
        "family": socket.AF_INET6 if ":" in route.destination else socket.AF_INET,
    }
    if route.gateway:
        options["gateway"] = route.gateway
    else:
        options["scope"] = _SCOPE_HOST if route.kind is RouteKind.LOCAL else _SCOPE_LINK
    if route.is_policy:
        options |= {"table": route.table} | ({"flags": ["onlink"]} if route.gateway else {})
    elif route.is_kernels:
        options |= {"proto": read.BY_KERNEL, "table": route.table, "type": int(route.kind)}
    if route.source:
        options["prefsrc"] = route.source
    elif route.is_kernels and route.kind is not RouteKind.LOCAL:
        options["priority"] = _KERNEL_METRIC6
    return options


def _rule_options(rule: RoutingRule) -> dict[str, Any]:
    family = socket.AF_INET6 if rule.version == 6 else socket.AF_INET
    options = {"family": family, "priority": rule.priority, "table": rule.table}
    if not rule.is_policy:
        return options | {"protocol": read.BY_KERNEL}
    options |= {"fwmark": rule.mark} if rule.mark else {}
    options |= {"ip_proto": rule.protocol} if rule.protocol else {}
    return options | (
        {"src": rule.source, "src_len": 32 if rule.version == 4 else 128} if rule.source else {}
    )


# --- entries --------------------------------------------------------------------------------------------------


def _write_entries(changes: Iterable[Put | Remove]) -> None:
    indices = {name: index for index, name in socket.if_nameindex()}
    requests, tolerated = [], []
    for change in changes:
        entry = change.item
        assert isinstance(entry, NeighborEntry), "sorted out before"
        is_put = isinstance(change, Put)
        index = indices.get(entry.link, 0)
        is_of_bridge = entry.kind in (EntryKind.PORT, EntryKind.OWN)
        if not index and (not is_put or is_of_bridge):
            continue  # the link was removed meanwhile, or is a port that its container no longer needs
        kind = netlink.NEWNEIGH if is_put else netlink.DELNEIGH
        # An entry that the kernel has created must stay the kernel's, so that it follows the bridge's address.
        how = netlink.EXCL if entry.kind is EntryKind.OWN else netlink.REPLACE
        requests.append((kind, netlink.CREATE | how if is_put else 0, entry_message(entry, index)))
        if is_of_bridge or not is_put:
            tolerated.append(_PRESENT | _ABSENT)  # as above, if it is removed at this moment
        else:
            tolerated.append(_PRESENT)
    for number, fine in zip(netlink.send_changes(requests), tolerated, strict=True):
        if number and number not in fine:
            raise OSError(number, f"entry of a neighbor: {os.strerror(number)}")


def entry_message(entry: NeighborEntry, index: int) -> bytes:
    """Return the kernel's form of an entry of the link ``index``.

    A bridge entry for a port is ``static``: ``permanent`` would mean the bridge itself, which would swallow the frames.
    A VXLAN entry, and the entry of the bridge's own address, need the flag ``self``.  Without it, the kernel silently
    ignores them.
    """
    mac = netlink.attribute(_MAC, bytes.fromhex(entry.mac.replace(":", "")))
    if entry.kind is EntryKind.PORT:
        return _NDMSG.pack(netlink.AF_BRIDGE, index, _STATIC, _MASTER, 0) + mac
    if entry.kind is EntryKind.OWN:
        return _NDMSG.pack(netlink.AF_BRIDGE, index, _PERMANENT, _SELF, 0) + mac
    family = socket.AF_INET6 if ":" in entry.address else socket.AF_INET
    address = netlink.attribute(_DESTINATION, socket.inet_pton(family, entry.address))
    if entry.kind is EntryKind.FORWARD:
        return _NDMSG.pack(netlink.AF_BRIDGE, index, _PERMANENT | _STATIC, _SELF, 0) + mac + address
    return _NDMSG.pack(family, index, _PERMANENT, 0, 0) + mac + address


def _index_of(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0
