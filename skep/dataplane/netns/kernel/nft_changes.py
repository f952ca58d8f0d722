"""Finds the nftables tables that another writer has changed, from the kernel's notifications.

nftables reports the changes of each transaction and, last, the name of the thread that made it.  All threads of a
``Namespaces`` object have the same name (its ``writer``), so Skep's own transactions are recognized.

Source: linux, net/netfilter/nf_tables_api.c (nf_tables_gen_notify).
"""

import asyncio
import errno
import socket
from collections.abc import Callable

from skep.dataplane.netns.kernel import netlink

# Source: linux/netfilter/nfnetlink.h and nf_tables.h.
_SUBSYSTEM_NFTABLES = 10
_NEW_GENERATION = 15
_TABLE_ATTRIBUTE = 1
"""Number of the attribute with the table's name, the first attribute of every message about a table."""
# Source: linux/netfilter/nf_tables.h: NFTA_GEN_PROC_NAME.
_GENERATION_PROCESS_NAME = 3
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_BUFFER_BYTES = 1 << 20
"""Bytes of reports that the kernel keeps while this process is busy."""
# Source: asm-generic/socket.h.
_SO_RCVBUFFORCE = 33
_READS_MAX = 64
"""Number of reads in a row before other work of the event loop, which a flood of changes must not hold up."""


def open_notifications() -> socket.socket:
    """Open a socket with the nftables notifications of the calling thread's namespace.  Raises: OSError."""
    opened = netlink.open_listener(netlink.NETFILTER, (netlink.GROUP_NFTABLES,))
    try:
        try:
            opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        except PermissionError:
            # Root of a user namespace stays below the machine's limit (net.core.rmem_max).
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    except BaseException:
        opened.close()
        raise
    return opened


class TableWatch:
    """Watches nftables tables for changes by other writers.  Create it in the event loop.

    Args:
        opened: Socket from ``open_notifications``, owned by this object from now on.
        writer: Name of our own threads.
        on_change: Called with the changed tables (for example ``ip skep``).  Called with None if notifications were
            lost, because then any table may have changed.
    """

    def __init__(
        self, opened: socket.socket, writer: str, on_change: Callable[[frozenset[str] | None], None]
    ) -> None:
        self._socket = opened
        self._changes = ForeignChanges(writer)
        self._on_change = on_change
        asyncio.get_running_loop().add_reader(opened, self._read)

    @property
    def is_open(self) -> bool:
        """Whether changes are still reported."""
        return self._socket.fileno() >= 0

    def close(self) -> None:
        """Stop watching.  Idempotent."""
        if self.is_open:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()

    def _read(self) -> None:
        try:
            tables = self._changes.read(self._socket)
        except OSError:  # no further notifications will arrive
            self.close()
            return
        if tables is None or tables:
            self._on_change(tables)


class ForeignChanges:
    """Parses the notifications of one namespace.  ``writer`` is the name of our own threads."""

    def __init__(self, writer: str) -> None:
        self._writer = writer
        self._touched: set[str] = set()

    def parse(self, data: bytes) -> frozenset[str]:
        """Return the tables (for example ``ip skep``) that another writer has changed according to these messages."""
        changed: set[str] = set()
        for type_, body in netlink.messages(data):
            if type_ >> 8 != _SUBSYSTEM_NFTABLES:
                continue
            attributes = dict(netlink.attributes(body[4:]))
            if type_ & 0xFF != _NEW_GENERATION:
                family = _FAMILIES.get(body[0], "") if body else ""
                self._touched.add(f"{family} {_text(attributes.get(_TABLE_ATTRIBUTE, b''))}")
                continue
            if _text(attributes.get(_GENERATION_PROCESS_NAME, b"")) != self._writer:
                changed |= self._touched
            self._touched.clear()
        return frozenset(changed)

    def read(self, opened: socket.socket) -> frozenset[str] | None:
        """Return the changed tables from the messages in ``opened``, or None if some were lost.  Raises: OSError."""
        changed: frozenset[str] = frozenset()
        is_lost = False
        for _ in range(_READS_MAX):
            try:
                changed |= self.parse(opened.recv(1 << 16))
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                is_lost = True
                self._touched.clear()
        return None if is_lost else changed


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")
