"""The CSI drivers of this machine: every socket in one folder, by the name that its driver gives itself."""

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
from skep.csi.driver import LOOK_S, Driver, call, is_name
from skep.errors import NotFound, SkepError

log = structlog.get_logger(__name__)

SOCKETS_MAX = 64
SOCKET_NAME = "csi.sock"
"""Of a driver that has a folder of its own, as in Kubernetes."""

_Identity = tuple[str, int, int]
"""A socket: path, inode, time of its creation."""


class Drivers:
    """Found anew at each look; one that has restarted is another."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._folder = folder
        self._clock = clock
        self._known: dict[_Identity, Driver] = {}
        self._silent: dict[_Identity, tuple[Backoff, float]] = {}
        """Those that gave no name: when they are asked again."""
        self._lock = asyncio.Lock()

    async def get(self, name: str) -> Driver:
        """A driver by name.  Raises: NotFound."""
        driver = self._named(await self._sockets()).get(name)
        if (
            driver is None
        ):  # not waited for otherwise: another socket that is asked for its name may be silent
            driver = (await self.all()).get(name)
        if driver is None:
            raise NotFound(f'driver "{name}" not found: no socket in {self._folder} is of that name')
        return driver

    async def all(self) -> Mapping[str, Driver]:
        """Those that have a socket now and have given their name, by name."""
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

    def _named(self, sockets: Iterable[_Identity]) -> Mapping[str, Driver]:
        found: dict[str, Driver] = {}
        for socket in sockets:
            if (driver := self._known.get(socket)) is not None:
                found.setdefault(driver.name, driver)
        return found

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
            backoff = self._silent.get(socket, (Backoff(1.0, 30.0), 0.0))[0]
            self._silent[socket] = backoff, self._clock.monotonic() + backoff.next_delay_s()
            log.info("driver gave no name", socket=socket[0], reason=str(error))
            return
        self._silent.pop(socket, None)
        if is_name(response.name):
            self._known[socket] = Driver(response.name, Path(socket[0]))
        else:
            log.warning("driver's name is none of CSI", socket=socket[0], name=response.name[:100])


def _sockets(folder: Path) -> Iterator[_Identity]:
    """``NAME.sock`` and ``NAME/csi.sock`` of a folder, by name.  Blocks."""
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
