"""The PROXY header, which names the client of a relayed connection.

Source: haproxy, doc/proxy-protocol.txt, sections 2.1 (version 1) and 2.2 (version 2).
"""

import struct
from ipaddress import ip_address

_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
_VERSION_2_PROXY = 0x21
_TCP_OVER_IPV4, _TCP_OVER_IPV6 = 0x11, 0x21


def proxy_header(version: int, client: tuple[str, int], own: tuple[str, int]) -> bytes:
    """The header of a TCP connection from ``client`` to ``own`` (address, port; of one family).

    ``version``: 1 or 2; 0: no header.
    """
    if version == 0:
        return b""
    source, destination = ip_address(client[0].partition("%")[0]), ip_address(own[0].partition("%")[0])
    is_ipv4 = source.version == 4
    if version == 1:
        family = "TCP4" if is_ipv4 else "TCP6"
        return f"PROXY {family} {source} {destination} {client[1]} {own[1]}\r\n".encode()
    addresses = source.packed + destination.packed + struct.pack("!HH", client[1], own[1])
    family_byte = _TCP_OVER_IPV4 if is_ipv4 else _TCP_OVER_IPV6
    return _SIGNATURE + struct.pack("!BBH", _VERSION_2_PROXY, family_byte, len(addresses)) + addresses
