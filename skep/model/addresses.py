"""Addresses as text.

``host:port``: an IPv6 host stands in brackets: ``10.0.0.1:2377``, ``[fd00::1]:2377``.  Addresses from labels, specs
and statuses are parsed here before anything is made of them: Python takes any text after ``%`` for an IPv6 scope, and
rules for the kernel would be made of it.
"""

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface
from typing import TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address

_FROM_HERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def joined(host: object, port: int | str) -> str:
    """An address of ``host``, which has no brackets yet, and ``port``."""
    text = str(host)
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


def parted(addr: str) -> tuple[str, str]:
    """Host and port of ``addr``, the host without brackets; empty if missing."""
    host, _, port = addr.rpartition(":")
    return host.strip("[]"), port


def host_of(addr: str) -> str:
    """``10.0.0.1:2377`` or ``[fd00::1]:2377`` -> the host alone, without brackets."""
    return parted(addr)[0]


def from_here(addr: str) -> str:
    """The address of a listener on ``addr`` for its own machine: loopback if it listens on all addresses."""
    host, port = parted(addr)
    return joined(_FROM_HERE.get(host, host), port)


@lru_cache(maxsize=16384)
def parsed(text: str) -> Address:
    """``text`` as an address without scope.  Raises: ValueError."""
    if "%" in text:
        raise ValueError(f"{text!r} has a scope, which means nothing on another machine")
    return ip_address(text)


def is_address(text: str) -> bool:
    """Whether ``text`` is an address, without a scope, and nothing else."""
    try:
        parsed(text)
    except ValueError:
        return False
    return True


def is_of_a_machine(address: Address) -> bool:
    """Whether ``address`` can be an address of one machine for others.

    Not so: loopback, multicast, broadcast and unspecified addresses, those of one link (IPv6), and IPv4 addresses in
    the guise of IPv6 ones.
    """
    if isinstance(address, IPv6Address):
        if address.is_link_local or address.ipv4_mapped is not None:
            return False
    elif address == IPv4Address("255.255.255.255"):
        return False
    return not (address.is_loopback or address.is_multicast or address.is_unspecified)


def is_subnet(text: str) -> bool:
    """Whether ``text`` is an address with the length of a prefix (``10.0.9.0/24``)."""
    address, slash, length = text.partition("/")
    if "%" in address:
        return False
    try:
        ip_interface(text)
    except ValueError:
        return False
    return bool(address and slash) and length.isdigit()


def next_port(addr: str) -> str:
    """``addr`` (``ip:port``) with the next port."""
    host, port = parted(addr)
    return joined(host, int(port) + 1)


def plain_address(address: str) -> str:
    """Without a zone; of an IPv4 address in an IPv6 one, the former."""
    found = ip_address(address.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return str(mapped or found)


def is_public(address: str) -> bool:
    """Whether ``address`` is one of the internet's."""
    return ip_address(plain_address(address)).is_global
