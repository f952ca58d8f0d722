"""The CSI drivers of this machine: the sockets in one folder, by driver name.

A driver gets its volumes' secrets, so the name that it claims is checked.  A driver in a container has its own folder,
``NAME/csi.sock``, and can only be the driver NAME.  Programs of the machine create ``*.sock``.  If several of these
sockets claim one name, ``NAME.sock`` wins, otherwise the oldest socket.
"""

import asyncio
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.csi import csi_pb2 as pb
from skep.csi.driver import LOOK_S, CsiDriver, call, is_name
from skep.errors import NotFound, SkepError

log = structlog.get_logger(__name__)

SOCKETS_MAX = 64
"""Maximum number of sockets in one folder.  Further sockets are ignored."""
SOCKET_NAME = "csi.sock"
"""Name of the socket of a driver with its own folder, as in Kubernetes."""

_Identity = tuple[str, int, int]
"""A socket: path, inode, creation time."""


class Drivers:
    """The drivers of a folder, discovered again at each call.  A restarted driver counts as a new one."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._folder = folder
        self._clock = clock
        self._known: dict[_Identity, CsiDriver] = {}
        self._silent: dict[_Identity, tuple[Backoff, float]] = {}
        """Sockets whose driver returned no valid name, with the time of the next attempt."""
        self._holders: dict[str, _Identity] = {}
        """The socket that owns each name."""
        self._lock = asyncio.Lock()

    async def get(self, name: str) -> CsiDriver:
        """Return a driver by name.  Raises: NotFound."""
        driver = self._named(await self._sockets()).get(name)
        if driver is None:
            # A known driver is not waited for, because another socket that is asked for its name may be silent.
            driver = (await self.all()).get(name)
        if driver is None:
            raise NotFound(f'driver "{name}" not found: no socket in {self._folder} belongs to it')
        return driver

    async def all(self) -> Mapping[str, CsiDriver]:
        """Return the drivers with a socket and a known name, by name."""
        async with self._lock:
            sockets = await self._sockets()
            for gone in set(self._known) - set(sockets):
                del self._known[gone]
            for gone in set(self._silent) - set(sockets):
                del self._silent[gone]
            new = [one for one in sockets if one not in self._known and self._is_due(one)]
            await asyncio.gather(*map(self._introduce, new))
        return self._named(sockets)

    async def _sockets(self) -> Sequence[_Identity]:
        return await asyncio.to_thread(lambda: list(_sockets(self._folder))[:SOCKETS_MAX])

    def _named(self, sockets: Iterable[_Identity]) -> Mapping[str, CsiDriver]:
        def rank(socket: _Identity) -> tuple[bool, bool, int, str]:
            name = self._known[socket].name
            return not _is_called(socket, name), socket != self._holders.get(name), socket[2], socket[0]

        found: dict[str, _Identity] = {}
        for socket in sorted((one for one in sockets if one in self._known), key=rank):
            found.setdefault(self._known[socket].name, socket)
        self._holders = found
        return {name: self._known[socket] for name, socket in found.items()}

    def _is_due(self, socket: _Identity) -> bool:
        waiting = self._silent.get(socket)
        return waiting is None or waiting[1] <= self._clock.monotonic()

    async def _introduce(self, socket: _Identity) -> None:
        try:
            response = await call(
                Path(socket[0]),
                "Identity/GetPluginInfo",
                pb.GetPluginInfoRequest(),
                pb.GetPluginInfoResponse,
                LOOK_S,
            )
        except SkepError as error:
            self._ask_again(socket)
            log.info("CSI driver name not received", socket=socket[0], reason=str(error))
            return
        path, name = Path(socket[0]), response.name
        if not is_name(name):
            self._ask_again(socket)
            log.warning("CSI driver name invalid", socket=socket[0], name=name[:100])
        elif path.name == SOCKET_NAME and path.parent != self._folder and path.parent.name != name:
            self._ask_again(socket)
            log.warning("CSI driver name does not match its folder", socket=socket[0], name=name)
        else:
            self._silent.pop(socket, None)
            self._known[socket] = CsiDriver(name, path)

    def _ask_again(self, socket: _Identity) -> None:
        backoff = self._silent.get(socket, (Backoff(1.0, 30.0), 0.0))[0]
        self._silent[socket] = backoff, self._clock.monotonic() + backoff.next_delay_s()


def _is_called(socket: _Identity, name: str) -> bool:
    """Return whether the path of ``socket`` has the driver's name."""
    path = Path(socket[0])
    return path.parent.name == name if path.name == SOCKET_NAME else path.stem == name


def _sockets(folder: Path) -> Iterator[_Identity]:
    """Yield ``NAME.sock`` and ``NAME/csi.sock`` of a folder, sorted by name.  Blocks."""
    for entry in _entries(folder):
        path = os.path.join(folder, entry)
        if not entry.endswith(".sock"):
            path = os.path.join(path, SOCKET_NAME)
        with suppress(OSError):
            status = os.stat(path)
            if stat.S_ISSOCK(status.st_mode):
                yield path, status.st_ino, status.st_ctime_ns


def _entries(folder: Path) -> Sequence[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return ()
