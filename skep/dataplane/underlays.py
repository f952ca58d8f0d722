"""Finds the device with a node's underlay address, and the MTU towards other nodes."""

import struct
import sys
from collections.abc import Collection, Iterable, Mapping
from socket import AF_INET, inet_ntop
from typing import Protocol

from skep.dataplane.netns.kernel.netlink import GETADDR, GETLINK, attributes, dump
from skep.dataplane.plan.overlay import Underlay, plain_address
from skep.model.networks.tables import NetworkTable
from skep.model.values.ids import NodeId

_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBi")
# Source: linux/if_link.h and linux/if_addr.h: IFLA_IFNAME, IFLA_MTU, IFA_ADDRESS, IFA_LOCAL.
_NAME, _MTU, _ADDRESS, _LOCAL = 3, 4, 1, 2


class UnderlayMeasurements(Protocol):
    """Measurements of the underlay between nodes (``probe.data_path.DataPath``)."""

    def underlay_between(self, node: NodeId, nodes: Collection[NodeId], underlay: Underlay) -> Underlay:
        """Return ``underlay``, the device of this ``node``, with the MTU reduced to the measured paths between
        ``nodes``.
        """


class Underlays:
    """The underlays that a node's VXLANs send from.  ``found`` is the result of ``find`` for the node's addresses."""

    def __init__(self, measurements: UnderlayMeasurements) -> None:
        self.found: Mapping[str, Underlay] = {}
        self._measurements = measurements

    def addresses(self, own: NodeId, tables: Iterable[NetworkTable]) -> frozenset[str]:
        """Return the addresses that the tables list for node ``own``."""
        nodes = (table.nodes.get(own) for table in tables)
        return frozenset(node.underlay for node in nodes if node is not None and node.underlay)

    def of(self, own: NodeId, table: NetworkTable | None) -> Underlay | None:
        """Return the underlay of one network, with the MTU that reaches all of its nodes.

        None if node ``own`` has no address in the network.
        """
        node = table.nodes.get(own) if table is not None else None
        if table is None or node is None or not node.underlay:
            return None
        return self._between(own, table.nodes, node.underlay)

    def of_tunnels(self, own: NodeId, tables: Iterable[NetworkTable]) -> Underlay:
        """Return the underlay that the tunnels of all encrypted networks use."""
        nodes = (table.nodes.get(own) for table in tables if table.head.is_encrypted)
        address = next((node.underlay for node in nodes if node is not None), "")
        return self.found.get(address, Underlay(address))

    def _between(self, own: NodeId, nodes: Collection[NodeId], address: str) -> Underlay:
        return self._measurements.underlay_between(own, nodes, self.found.get(address, Underlay(address)))


def find(addresses: Collection[str], without: str = "") -> dict[str, Underlay]:
    """Return an underlay for each of ``addresses`` that the calling thread's namespace has on another device than
    ``without``.

    Blocks.  Raises: OSError.
    """
    if not addresses:
        return {}
    wanted = {plain_address(one): one for one in addresses}
    mtus = {}
    for _, body in dump(GETLINK, _IFINFO.pack(0, 0, 0, 0, 0)):
        found = dict(attributes(body[_IFINFO.size :]))
        if bytes(found[_NAME]).rstrip(b"\0").decode() != without:
            mtus[_IFINFO.unpack_from(body)[2]] = int.from_bytes(found[_MTU], sys.byteorder)
    underlays = {}
    for _, body in dump(GETADDR, _IFADDR.pack(0, 0, 0, 0, 0)):
        family, _, _, _, index = _IFADDR.unpack_from(body)
        found = dict(attributes(body[_IFADDR.size :]))
        value = found.get(_LOCAL) or found.get(_ADDRESS)
        address = inet_ntop(family, value) if value else ""
        if address in wanted and index in mtus:
            underlays[wanted[address]] = Underlay(wanted[address], mtus[index])
    return underlays


def prefix_lengths() -> dict[str, int]:
    """Return the prefix length of each IPv4 address of the calling thread's namespace.  Blocks.  Raises: OSError."""
    lengths = {}
    for _, body in dump(GETADDR, _IFADDR.pack(0, 0, 0, 0, 0)):
        family, length, _, _, _ = _IFADDR.unpack_from(body)
        found = dict(attributes(body[_IFADDR.size :]))
        if family == AF_INET and (value := found.get(_LOCAL) or found.get(_ADDRESS)):
            lengths[inet_ntop(family, value)] = length
    return lengths
