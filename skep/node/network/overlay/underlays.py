"""Which device has an address of the underlay, and what it carries."""

import struct
import sys
from collections.abc import Collection, Iterable
from socket import inet_ntop

from skep.model.ids import NodeId
from skep.model.tables import Table
from skep.node.network.netlink import GETADDR, GETLINK, attributes, dumped
from skep.node.network.overlay.wanted import Underlay, plain_address

_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBi")
_MTU, _ADDRESS, _LOCAL = 4, 1, 2


def own_addresses(tables: Iterable[Table], node_id: NodeId) -> frozenset[str]:
    """Addresses that the node's VXLANs leave from, as the tables say."""
    own = (table.nodes.get(node_id) for table in tables)
    return frozenset(node.underlay for node in own if node is not None and node.underlay)


def find(addresses: Collection[str]) -> dict[str, Underlay]:
    """Those of ``addresses`` that the calling thread's namespace has.  Blocks.  Raises: OSError."""
    if not addresses:
        return {}
    wanted = {plain_address(one): one for one in addresses}
    mtus = {}
    for _, body in dumped(GETLINK, _IFINFO.pack(0, 0, 0, 0, 0)):
        found = dict(attributes(body[_IFINFO.size :]))
        mtus[_IFINFO.unpack_from(body)[2]] = int.from_bytes(found[_MTU], sys.byteorder)
    underlays = {}
    for _, body in dumped(GETADDR, _IFADDR.pack(0, 0, 0, 0, 0)):
        family, _, _, _, index = _IFADDR.unpack_from(body)
        found = dict(attributes(body[_IFADDR.size :]))
        value = found.get(_LOCAL) or found.get(_ADDRESS)
        address = inet_ntop(family, value) if value else ""
        if address in wanted and index in mtus:
            underlays[wanted[address]] = Underlay(wanted[address], mtus[index])
    return underlays
