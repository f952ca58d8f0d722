"""Addresses as text.

``host:port`` has an IPv6 host in brackets: ``10.0.0.1:2377``, ``[fd00::1]:2377``.  Addresses from labels, specs and
statuses are parsed here before use, because Python accepts any text after ``%`` as an IPv6 scope, and kernel rules are
built from addresses.
"""

import re
import socket
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface
from typing import Final, TypeAlias

PORT_MAX: Final = (1 << 16) - 1
"""A port has 16 bits."""

Address: TypeAlias = IPv4Address | IPv6Address

_FROM_HERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def joined(host: object, port: int | str) -> str:
    """Return the address of ``host``, which has no brackets yet, and ``port``."""
    text = str(host)
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


def parted(addr: str) -> tuple[str, str]:
    """Return host and port of ``addr``, the host without brackets, each empty if missing."""
    host, _, port = addr.rpartition(":")
    return host.strip("[]"), port


def host_of(addr: str) -> str:
    """Return the host of ``10.0.0.1:2377`` or ``[fd00::1]:2377``, without brackets."""
    return parted(addr)[0]


def from_here(addr: str) -> str:
    """Return the address at which this machine connects to a listener of its own, loopback if it listens on all
    addresses.
    """
    host, port = parted(addr)
    return joined(_FROM_HERE.get(host, host), port)


@lru_cache(maxsize=16384)
def parsed(text: str) -> Address:
    """Return ``text`` as an address without scope.  Raises: ValueError."""
    if "%" in text:
        raise ValueError(f"{text!r} has a scope, which means nothing on another machine")
    return ip_address(text)


def is_address(text: str) -> bool:
    """Return whether ``text`` is exactly an address without a scope."""
    try:
        parsed(text)
    except ValueError:
        return False
    return True


def is_of_a_machine(address: Address) -> bool:
    """Return whether ``address`` can be an address of one machine for others.

    Loopback, multicast, broadcast, unspecified, IPv6 link-local and IPv4-mapped addresses cannot.
    """
    if isinstance(address, IPv6Address):
        if address.is_link_local or address.ipv4_mapped is not None:
            return False
    elif address == IPv4Address("255.255.255.255"):
        return False
    return not (address.is_loopback or address.is_multicast or address.is_unspecified)


def is_subnet(text: str) -> bool:
    """Return whether ``text`` is an address with a prefix length (``10.0.9.0/24``)."""
    address, slash, length = text.partition("/")
    if "%" in address:
        return False
    try:
        ip_interface(text)
    except ValueError:
        return False
    return bool(address and slash) and length.isdigit()


def next_port(addr: str) -> str:
    """Return ``addr`` (``ip:port``) with the next port."""
    host, port = parted(addr)
    return joined(host, int(port) + 1)


def plain_address(address: str) -> str:
    """Return the address without a zone.  An IPv4-mapped address becomes IPv4."""
    found = ip_address(address.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return str(mapped or found)


def is_public(address: str) -> bool:
    """Return whether ``address`` is a public address of the internet."""
    return ip_address(plain_address(address)).is_global


def is_machine_host(host: str) -> bool:
    """Return whether a host is certainly the machine itself or on one of its links, without a look-up of names."""
    host = host.lower().rstrip(".")
    return host == "localhost" or host.endswith(".localhost") or is_local(host)


def is_local(host: str) -> bool:
    """Return whether an address is loopback or link-local, also in a form that only resolvers accept (``127.1``)."""
    address = _resolvers_address(host)
    if address is None:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified or address.is_link_local or address.is_multicast


def _resolvers_address(host: str) -> Address | None:
    try:
        return ip_address(host.partition("%")[0])
    except ValueError:
        pass
    if not re.fullmatch(r"[0-9a-fx.]+", host):
        return None  # inet_aton also accepts an address with text behind it
    try:
        return IPv4Address(socket.inet_aton(host))
    except OSError:
        return None
