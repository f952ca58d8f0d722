"""The ports on which programs of this machine listen, from the kernel's socket lists.

Sources: sock_diag(7), linux/inet_diag.h; proc(5), /proc/net/tcp.
"""

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

_BYTES_MAX = 1 << 20
"""Limit in bytes for reading one list.

A busy server has tens of thousands of connections, but listening sockets come first in /proc/net/tcp.
"""
# Source: net/tcp_states.h.  A UDP socket without a peer has the state TCP_CLOSE.
_LISTENING, _UNCONNECTED = 0x0A, 0x07
_EPHEMERAL = range(32768, 61000)
"""The kernel's default range of ephemeral ports."""

# Source: linux/netlink.h, linux/sock_diag.h.
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLMSG_ERROR, _NLMSG_DONE = 4, 20, 2, 3
# Source: linux/netlink.h: NLM_F_REQUEST and NLM_F_DUMP.
_NLM_F_DUMP_REQUEST = 0x301
_HEADER, _REQUEST = struct.Struct("=IHHII"), struct.Struct("=BBBBI48x")
_RESPONSE_BYTES = 1 << 16
"""Buffer size in bytes.  The kernel fills messages of at most 32 KiB (netlink_dump in net/netlink/af_netlink.c)."""
_SUFFIXES = ("", "6")
"""Suffixes of the lists of IPv4 and IPv6."""

_Sockets: TypeAlias = Callable[[str], Iterable[tuple[str, int]]]
"""Returns address (in hexadecimal) and port of the listening TCP sockets of IPv4, or of IPv6 for the suffix ``6``."""


def listening_sockets(suffix: str) -> Iterator[tuple[str, int]]:
    """Yield address and port of the listening TCP sockets of IPv4, or IPv6 (``6``), in the thread's namespace.

    Raises: OSError.
    """
    body = _REQUEST.pack(
        socket.AF_INET6 if suffix else socket.AF_INET, socket.IPPROTO_TCP, 0, 0, 1 << _LISTENING
    )
    header = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_DUMP_REQUEST, 1, 0)
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
    ) as kernel:
        kernel.send(header + body)
        while True:
            response, at = kernel.recv(_RESPONSE_BYTES), 0
            while at + _HEADER.size <= len(response):
                size, kind, *_ = _HEADER.unpack_from(response, at)
                message, at = response[at + _HEADER.size : at + size], at + max(-(-size // 4) * 4, 4)
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    number = -struct.unpack_from("=i", message)[0]
                    raise OSError(number, os.strerror(number))
                # struct inet_diag_msg: four bytes, the ports of both sides, then their addresses of 16 bytes each
                yield message[8:24].hex(), int.from_bytes(message[4:6])


def read_listening_ports(
    proc: Path = Path("/proc/net"),
    settings: Path = Path("/proc/sys/net/ipv4"),
    listening: _Sockets | None = listening_sockets,
) -> frozenset[tuple[str, int]]:
    """Return ``(protocol, port)`` of every listening TCP socket, and of every UDP socket that accepts any source.

    Leaves out ephemeral ports, because clients, and servers of tests or file transfers, use them only for a moment.
    IPv6 sockets count if they listen on all addresses, since they then also accept IPv4.

    Without ``listening``, and on kernels without inet_diag, TCP sockets are read from files.  The kernel visits its
    whole table of connections for each of them: 5 ms on a machine with 20 GiB of memory, also without a connection.

    Raises: OSError: a list cannot be read, so its ports are unknown.
    """
    try:
        tcp = None if listening is None else [(suffix, tuple(listening(suffix))) for suffix in _SUFFIXES]
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EPROTONOSUPPORT):
            raise
        tcp = None
    lists = {"tcp": tcp or _listed(proc / "tcp", _LISTENING), "udp": _listed(proc / "udp", _UNCONNECTED)}
    ephemeral = _ephemeral(settings / "ip_local_port_range")
    return frozenset(
        (protocol, port)
        for protocol, families in lists.items()
        for suffix, sockets in families
        for address, port in sockets
        if (not suffix or not address.strip("0")) and port not in ephemeral
    )


def _listed(path: Path, state: int) -> list[tuple[str, tuple[tuple[str, int], ...]]]:
    return [
        (suffix, tuple(_sockets(_text(path.with_name(path.name + suffix)), state))) for suffix in _SUFFIXES
    ]


def _ephemeral(file: Path) -> range:
    try:
        first, last = map(int, file.read_text().split())
    except (FileNotFoundError, ValueError):
        return _EPHEMERAL
    return range(first, last + 1)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_BYTES_MAX).decode("ascii", "replace").rpartition("\n")[0]
    except FileNotFoundError:  # the kernel does not support IPv6
        return ""


def _sockets(text: str, state: int) -> Iterator[tuple[str, int]]:
    """Yield local address and port.

    Columns, in hexadecimal: number, local address and port, remote ones, state, ...
    """
    for line in text.splitlines()[1:]:
        words = line.split()
        try:
            address, _, port = words[1].partition(":")
            if int(words[3], 16) == state:
                yield address, int(port, 16)
        except (IndexError, ValueError):
            continue
