"""Keeps the virtual addresses in one container's namespace up to date with the network tables.

A service is loaded when the container first resolves its name, and stays loaded for the life of the container, because
a program may keep using the address.  Changes that arrive during a write are written together afterwards.
"""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from functools import partial

import structlog

from skep.dataplane.netns.kernel import conntrack, netlink, nft
from skep.dataplane.netns.state import Flow
from skep.dataplane.plan.flows import is_unaccepted
from skep.dataplane.plan.vip import (
    FAMILIES,
    Backends,
    VipBackends,
    VipPlan,
    WrittenTable,
    is_ipv6,
    noted,
    plan,
)
from skep.dataplane.vip.elements import ElementSocket
from skep.model.values.ids import NetworkId, ServiceId

log = structlog.get_logger()

Services = frozenset[tuple[NetworkId, ServiceId]]
BackendsOf = Callable[[NetworkId], Mapping[ServiceId, VipBackends]]

Write = Callable[[VipPlan], Awaitable[None]]
"""Writes a plan into the namespace.  Raises: SkepError, OSError."""

# Source: linux/neighbour.h: NDA_* and NUD_*.
_DESTINATION, _LINK_ADDRESS = 1, 2
_INCOMPLETE, _STALE = 0x01, 0x04
_HEADER = struct.Struct("=BBHiHBB")
_UNUSED_MAC = bytes.fromhex("02ffffffffff")
_TIMEOUT_S = 2.0
"""Time limit in seconds for the kernel's response."""


class VirtualAddresses:
    """The virtual addresses of one container.

    ``loaded`` has the services that an earlier process had loaded.  The namespace has tables for them, which may be
    outdated.
    """

    def __init__(self, backends_of: BackendsOf, write: Write, loaded: Services = frozenset()) -> None:
        self._backends_of = backends_of
        self._write = write
        self._writing = asyncio.Lock()
        self._loaded = loaded
        self._usable = loaded
        self._written: Mapping[str, WrittenTable] = {}
        self._is_outdated = self._is_unknown = bool(loaded)

    @property
    def loaded(self) -> Services:
        """The services whose rules are in the namespace or are being written."""
        return self._loaded

    @property
    def networks(self) -> frozenset[NetworkId]:
        """The networks of the loaded services."""
        return frozenset(network for network, _ in self._loaded)

    @property
    def backends(self) -> VipBackends:
        """The backends that the namespace has rules for."""
        return {address: found for one in self._written.values() for address, found in one.backends.items()}

    def is_usable(self, services: Services) -> bool:
        """Return whether the rules of ``services`` are in the namespace."""
        return services <= self._usable

    async def load(self, services: Services) -> None:
        """Write the rules of ``services`` and keep them up to date.  Raises: SkepError, OSError."""
        if not services <= self._loaded:
            self._loaded |= services
            self._is_outdated = True
        await self.apply()

    def mark_changed(self, services: Services) -> bool:
        """Record that the backends of ``services`` have changed.

        Returns whether ``apply`` has work to do or is running.
        """
        if services & self._loaded:
            self._is_outdated = True
        return self._is_outdated or self._writing.locked()

    def mark_unknown(self) -> None:
        """Record that another program may have changed the rules.

        The next ``apply`` writes all rules again.
        """
        if self._loaded:
            self._is_unknown = self._is_outdated = True

    async def apply(self) -> None:
        """Write the changes, and return once the namespace is up to date.  Raises: SkepError, OSError."""
        async with self._writing:
            while self._is_outdated:
                services = self._loaded
                written = None if self._is_unknown else self._written
                self._is_outdated = self._is_unknown = False
                try:
                    backends: dict[str, Backends] = {}
                    for network, service in sorted(services):
                        backends.update(self._backends_of(network).get(service, {}))
                    planned = plan(written, backends)
                    if planned.text:
                        await self._write(planned)
                except BaseException as error:
                    self._is_outdated = self._is_unknown = True
                    if written is None or not isinstance(error, nft.NftFailed):
                        raise
                    continue  # the namespace differs from the assumed state, so write everything again
                self._written = planned.after
                self._usable = services


def write_plan(planned: VipPlan, elements: ElementSocket) -> None:
    """Write a plan into the calling thread's namespace.  Blocks.  Raises: NftFailed, OSError.

    ``elements`` is a socket of this namespace.
    """
    if planned.elements is None:
        nft.run(planned.text)
    else:
        elements.change(planned.elements)
    if planned.is_anew:
        if planned.stale:
            nft.run(noted(_delete_flows(planned.stale)))
    elif planned.stale:
        families = sorted({FAMILIES[is_ipv6(one)] for one in planned.stale})
        used = frozenset(one for family in families for one in elements.datagrams(family))
        if stale := {one: backends for one, backends in planned.stale.items() if one in used}:
            _delete_flows(stale)


def redirect_unaccepted(backends: VipBackends) -> None:
    """Delete flows of connections to these addresses that a removed backend has not accepted, so that their next packet
    is sent to a present one.

    Works in the calling thread's namespace.  Blocks.  Raises: OSError: some connections still wait.
    """
    for family, packed in _packed(backends).items():
        conntrack.delete_stale(
            family,
            lambda flow: is_unaccepted(flow, backends),
            concerns=partial(_has_one, packed),
            selection=conntrack.UNANSWERED,
        )


def _has_one(packed: Iterable[bytes], entry: bytes) -> bool:
    return any(one in entry for one in packed)


def delete_stale_flows(backends: VipBackends) -> frozenset[str]:
    """Delete UDP flows to these addresses whose backend was removed.  Return the addresses that have UDP flows.

    Also deletes flows of any protocol that began before the address had rules, and so have no backend.

    Works in the calling thread's namespace.  Blocks.  Raises: OSError: some flows may be stale.
    """
    seen: set[str] = set()

    def is_stale(flow: Flow) -> bool:
        address, backend = flow.original.destination, flow.reply.source
        if address not in backends:
            return False
        is_udp = flow.original.protocol == socket.IPPROTO_UDP
        if is_udp:
            seen.add(address)
        return backend == address or (is_udp and backend not in backends[address])

    for family in _packed(backends):
        conntrack.delete_stale(family, is_stale)
    return frozenset(seen)


def _packed(addresses: Iterable[str]) -> Mapping[socket.AddressFamily, set[bytes]]:
    """Return the bytes of ``addresses`` by family, IPv4 first."""
    families = socket.AF_INET, socket.AF_INET6
    found: dict[socket.AddressFamily, set[bytes]] = {family: set() for family in families}
    for one in addresses:
        family = families[is_ipv6(one)]
        found[family].add(socket.inet_pton(family, one))
    return {family: packed for family, packed in found.items() if packed}


def _delete_flows(backends: VipBackends) -> frozenset[str]:
    """Call ``delete_stale_flows``.  After an error, assume that every address has flows."""
    try:
        return delete_stale_flows(backends)
    except OSError as error:  # not fatal: new connections are not affected
        log.warning("stale flows not deleted", reason=str(error))
        return frozenset(backends)


def flush_pending(addresses: Collection[str]) -> None:
    """Release packets to ``addresses`` that wait in the kernel for a MAC address, in the calling thread's namespace.

    If a packet is sent before the rules of the address exist, the kernel asks for the MAC address of the virtual
    address, which nobody has.  The packet waits three seconds and then fails, and TCP does not retransmit while it
    waits.  So the neighbor entry is given an unused MAC address, and the next attempt reaches a backend.

    Blocks.  Raises: OSError.
    """
    for family, packed in _packed(addresses).items():
        with netlink.open_socket(socket.NETLINK_ROUTE, _TIMEOUT_S) as connection:
            for interface, address in list(_pending(connection, family)):
                if address in packed:
                    body = _HEADER.pack(family, 0, 0, interface, _STALE, 0, 0)
                    body += netlink.attribute(_DESTINATION, address)
                    body += netlink.attribute(_LINK_ADDRESS, _UNUSED_MAC)
                    connection.send(netlink.request(netlink.NEWNEIGH, netlink.ACK | netlink.REPLACE, body))
                    connection.recv(1 << 12)  # ignore an error, because the neighbor may have been removed


def _pending(connection: socket.socket, family: int) -> Iterator[tuple[int, bytes]]:
    """Yield interface and address of each neighbor that is being resolved."""
    head = _HEADER.pack(family, 0, 0, 0, 0, 0, 0)
    connection.send(netlink.request(netlink.GETNEIGH, netlink.DUMP, head))
    while True:
        for type_, body in netlink.messages(connection.recv(1 << 16)):
            if type_ == netlink.DONE:
                return
            if type_ == netlink.ERROR:
                raise OSError(netlink.error_number(body), "neighbors cannot be listed")
            _, _, _, interface, state, _, _ = _HEADER.unpack_from(body)
            address = dict(netlink.attributes(body[_HEADER.size :])).get(_DESTINATION)
            if state & _INCOMPLETE and address is not None:
                yield interface, address
