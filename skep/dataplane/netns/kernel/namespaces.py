"""Works in network namespaces without forking: a thread enters a namespace, works there and returns.

``setns`` is per thread, so work inside a namespace runs on threads that do nothing else.  A container's namespace is
pinned by a bind mount at ``<run>/netns/<id>``.  It lives as long as the pin or a process in it, and survives a restart
of the node process.

The clients that are still connected to a container are counted from the kernel's tables of its namespace.  Source:
proc(5), /proc/net/tcp; the kernel's include/net/tcp_states.h.
"""

import asyncio
import ctypes
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from pyroute2 import AsyncIPRoute

from skep.linux.syscalls import CLONE_NEWNET, MS_BIND, mount, setns, unmount_if_mounted, unshare
from skep.linux.user_namespaces import process_in
from skep.model.values.user_map import UserMap

T = TypeVar("T")
P = ParamSpec("P")

# Source: linux/prctl.h.
_PR_SET_NAME = 15

THREADS = 16
"""Number of threads.  They mostly wait for the kernel: 40 updates take 160 ms with 4 threads and 45 ms with 16."""

_LISTEN = "0A"
_OPEN = frozenset({"01", "03", "04", "08", "09", "0B"})
"""TCP states in which data may still be sent or has yet to arrive.

These are ESTABLISHED, SYN_RECV, FIN_WAIT1, CLOSE_WAIT, LAST_ACK and CLOSING.  Not FIN_WAIT2: there the client has
received everything, and only has not closed its own side.
"""
_LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
"""127.0.0.1, ::1 and ::ffff:127.0.0.1, as a little-endian kernel writes them."""


class Namespaces:
    """The network namespaces of one node, and the threads that work in them.

    Containers' namespaces are pinned in ``directory``.  ``home`` is the node's own namespace.  In a playground, it is
    not the machine's namespace.
    """

    def __init__(self, directory: Path, home: Path = Path("/proc/self/ns/net")) -> None:
        self._directory = directory
        self.home = home
        self.writer = f"skep-{secrets.token_hex(5)}"
        """Name of this object's threads in the kernel (15 bytes).  nftables reports it with each change."""
        self._threads = ThreadPoolExecutor(
            THREADS, thread_name_prefix="netns", initializer=_name_thread, initargs=(self.writer,)
        )

    def path(self, id: str) -> Path:
        """Return the path at which namespace ``id`` is pinned."""
        return self._directory / id

    def users_path(self, id: str) -> Path:
        """Return the path at which the user namespace of namespace ``id`` is pinned, if it has its own."""
        return _users_pin(self.path(id))

    def pinned(self) -> list[str]:
        """Return the ids of all pinned namespaces."""
        with suppress(FileNotFoundError):
            return sorted(entry.name for entry in self._directory.iterdir())
        return []

    async def create(
        self, id: str, sysctls: Mapping[str, str], users: UserMap | None = None, joined: str = ""
    ) -> Path:
        """Create a namespace, pin it at its path, and set ``sysctls`` (``net/ipv4/...``) in it.

        With ``users``, it belongs to a new user namespace with these users, or to the existing one at the path
        ``joined``, so that their root may change it.
        Raises: OSError.
        """
        path = self.path(id)
        await self._on_thread(_create, path, sysctls, users, joined)
        return path

    async def destroy(self, id: str) -> None:
        """Remove the pin of a namespace.  The kernel frees the namespace and its devices once no process uses it."""
        await self._on_thread(_destroy, self.path(id))

    async def run(self, namespace: Path, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``call`` on a thread inside ``namespace``.  Sockets that it opens stay in that namespace."""
        return await self._on_thread(inside, namespace, lambda: call(*args, **kwargs))

    @asynccontextmanager
    async def netlink(self, namespace: Path) -> AsyncIterator[AsyncIPRoute]:
        """Open rtnetlink of ``namespace`` (links, addresses, routes) for the block."""
        # Not with ``netns=`` of pyroute2, which forks the whole process to open its socket.
        opened = await self.run(namespace, _netlink_socket)
        async with AsyncIPRoute(use_socket=opened, groups=0) as route:
            yield route

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown(wait=False)

    async def _on_thread(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: call(*args, **kwargs))


def _name_thread(name: str) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def set_sysctl(name: str, value: str) -> None:
    """Set the sysctl ``net/...`` in the present namespace.  A sysctl that this kernel lacks is ignored."""
    with suppress(FileNotFoundError):
        Path("/proc/sys", name).write_text(value)


def _create(path: Path, sysctls: Mapping[str, str], users: UserMap | None, joined: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o444, exist_ok=False)
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def set_all() -> None:
        for name, value in sysctls.items():
            set_sysctl(name, value)

    try:
        if users is not None:
            _users_pin(path).parent.mkdir(mode=0o700, exist_ok=True)
            _users_pin(path).touch(mode=0o444)
            with process_in(users.kernel_text, has_network=True, joined=joined) as pid:
                mount(f"/proc/{pid}/ns/net", path, None, MS_BIND)
                mount(f"/proc/{pid}/ns/user", _users_pin(path), None, MS_BIND)
            inside(path, set_all)
            return
        unshare(CLONE_NEWNET)
        try:
            mount("/proc/thread-self/ns/net", path, None, MS_BIND)
            set_all()
        finally:
            setns(own, CLONE_NEWNET)
    except BaseException:
        with suppress(OSError):  # a leftover pin is removed by the next sweep
            _destroy(path)
        raise
    finally:
        os.close(own)


def _users_pin(path: Path) -> Path:
    return path.parent.with_name("userns") / path.name


def _destroy(path: Path) -> None:
    for pin in (_users_pin(path), path):
        unmount_pin(pin)
        pin.unlink(missing_ok=True)


def unmount_pin(path: Path) -> None:
    """Remove the bind mount at ``path`` if there is one."""
    unmount_if_mounted(path)


def inside(namespace: Path, call: Callable[[], T]) -> T:
    """Run ``call`` in ``namespace`` on the calling thread.

    Only for threads that do nothing else meanwhile.  Raises: OSError.
    """
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        target = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(target, CLONE_NEWNET)
        finally:
            os.close(target)
        try:
            return call()
        finally:
            setns(own, CLONE_NEWNET)
    finally:
        os.close(own)


def _netlink_socket() -> socket.socket:
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    return socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)


def inbound(tables: Iterable[str]) -> int:
    """Count open TCP connections from elsewhere to listening ports.

    Args:
        tables: The texts of /proc/net/tcp and /proc/net/tcp6 of one namespace.
    """
    connections = [
        words for table in tables for line in table.splitlines()[1:] if len(words := line.split()) > 3
    ]
    listened = {_port(local) for _, local, _, state, *_ in connections if state == _LISTEN}
    return sum(
        state in _OPEN and _port(local) in listened and not remote.startswith(_LOOPBACK)
        for _, local, remote, state, *_ in connections
    )


def inbound_of(pid: int) -> int:
    """Count open TCP connections to the namespace of process ``pid``.  0 if the process has ended."""
    tables = []
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            tables.append(Path(f"/proc/{pid}/net/{name}").read_text())
    return inbound(tables)


def _port(address: str) -> str:
    return address.rpartition(":")[2]
