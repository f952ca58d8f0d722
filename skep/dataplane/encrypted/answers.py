"""Answers to "who has this address?", given at once from what the table says: nothing is flooded to other nodes.

ARP (RFC 826) and neighbour solicitations (RFC 4861, section 4.3).  Frames are those of a TAP: 10 bytes of virtio
header come first.
"""

import struct
from collections.abc import Mapping

from skep.dataplane.encrypted.frames import ETHERNET_BYTES, VNET_BYTES

_NO_OFFLOAD = bytes(VNET_BYTES)
_TYPE_AT = VNET_BYTES + 12
_ARP = b"\x08\x06"
_IPV6 = b"\x86\xdd"
_ARP_REQUEST = bytes.fromhex("0001080006040001")
_ARP_REPLY = bytes.fromhex("0001080006040002")
_ARP_BYTES = 28
_IPV6_HEADER = struct.Struct("!IHBB16s16s")
_ICMP_SOLICITATION, _ICMP_ADVERTISEMENT = 135, 136
_ROUTER_SOLICITATION, _REDIRECT = 133, 137
_ICMPV6 = 58
_SOLICITATION_BYTES = 24
_SOLICITED_AND_OVERRIDE = 0x60000000
_TARGET_LINK_ADDRESS = b"\x02\x01"
_HOP_LIMIT = 255


def is_neighbours_talk(frame: bytes | memoryview) -> bool:
    """Whether ``frame`` is ARP, or neighbour discovery: neither ever crosses to another node.

    Answers come from the table, so what a container claims of addresses is heard on its own node at most.
    """
    kind = frame[_TYPE_AT : _TYPE_AT + 2]
    if kind != _IPV6:
        return kind == _ARP
    icmp = _TYPE_AT + 2 + _IPV6_HEADER.size
    return (
        len(frame) > icmp
        and frame[_TYPE_AT + 8] == _ICMPV6
        and _ROUTER_SOLICITATION <= frame[icmp] <= _REDIRECT
    )


def answer(frame: bytes | memoryview, neighbours: Mapping[bytes, bytes]) -> bytes | None:
    """The frame that answers ``frame``; None: it asks for no address in ``neighbours``, or asks nothing.

    Args:
        neighbours: MAC address (6 bytes) by address (4 or 16 bytes).
    """
    view = bytes(frame[VNET_BYTES:])
    match view[12:14]:
        case b"\x08\x06" if len(view) >= ETHERNET_BYTES + _ARP_BYTES:
            return _arp_reply(view[ETHERNET_BYTES:], neighbours)
        case b"\x86\xdd" if len(view) >= ETHERNET_BYTES + _IPV6_HEADER.size + _SOLICITATION_BYTES:
            return _advertisement(view[6:12], view[ETHERNET_BYTES:], neighbours)
        case _:
            return None


def _arp_reply(packet: bytes, neighbours: Mapping[bytes, bytes]) -> bytes | None:
    sender_mac, sender, target = packet[8:14], packet[14:18], packet[24:28]
    mac = neighbours.get(target)
    # Who asks for its own address looks for somebody else who has it; that is not answered from a table.
    if packet[:8] != _ARP_REQUEST or mac is None or sender == target:
        return None
    ethernet = sender_mac + mac + _ARP
    return _NO_OFFLOAD + ethernet + _ARP_REPLY + mac + target + sender_mac + sender


def _advertisement(asker: bytes, packet: bytes, neighbours: Mapping[bytes, bytes]) -> bytes | None:
    _, _, protocol, hops, sender, _ = _IPV6_HEADER.unpack_from(packet)
    kind, target = packet[40], packet[48:64]
    mac = neighbours.get(target)
    # From no address at all: the asker looks whether its own is free (RFC 4862), as above.
    is_question = protocol == _ICMPV6 and kind == _ICMP_SOLICITATION and hops == _HOP_LIMIT and any(sender)
    if not is_question or mac is None:
        return None
    rest = struct.pack("!I", _SOLICITED_AND_OVERRIDE) + target + _TARGET_LINK_ADDRESS + mac
    body = struct.pack("!BBH", _ICMP_ADVERTISEMENT, 0, 0) + rest
    pseudo = target + sender + struct.pack("!II", len(body), _ICMPV6)
    body = struct.pack("!BBH", _ICMP_ADVERTISEMENT, 0, _checksum(pseudo + body)) + rest
    header = _IPV6_HEADER.pack(6 << 28, len(body), _ICMPV6, _HOP_LIMIT, target, sender)
    return _NO_OFFLOAD + asker + mac + _IPV6 + header + body


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
