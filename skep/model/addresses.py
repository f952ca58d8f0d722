"""``host:port`` as text; an IPv6 host stands in brackets: ``10.0.0.1:2377``, ``[fd00::1]:2377``."""

from ipaddress import ip_interface

_FROM_HERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def joined(host: object, port: int | str) -> str:
    """An address of ``host``, which has no brackets yet, and ``port``."""
    text = str(host)
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


def parted(addr: str) -> tuple[str, str]:
    """Host and port of ``addr``, the host without its brackets; either is empty where ``addr`` says nothing of it."""
    host, _, port = addr.rpartition(":")
    return host.strip("[]"), port


def host_of(addr: str) -> str:
    """``10.0.0.1:2377`` or ``[fd00::1]:2377`` -> the host alone, without brackets."""
    return parted(addr)[0]


def from_here(addr: str) -> str:
    """Where a listener on ``addr`` is reached from its own machine: one on all addresses at the loopback."""
    host, port = parted(addr)
    return joined(_FROM_HERE.get(host, host), port)


def is_subnet(text: str) -> bool:
    """Whether ``text`` is an address with the length of a prefix (``10.0.9.0/24``)."""
    address, slash, length = text.partition("/")
    try:
        ip_interface(text)
    except ValueError:
        return False
    return bool(address and slash) and length.isdigit()
