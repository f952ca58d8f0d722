"""Reads those parts of a node's description that come from files: devices, networks, ports in use.

The files are read in a thread every few seconds, and descriptions use the last result.  Directories with devices and
CDI descriptions are read again only if the modification time of one of them has changed.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import structlog

from skep.aio.clock import Clock, tick
from skep.aio.failures import describe_error
from skep.configuration.configuration import Configuration
from skep.engine.confinement.cdi import described, units
from skep.engine.confinement.devices import DEV, Failed, device_directories, device_paths
from skep.linux.network.ports import read_listening_ports
from skep.linux.network.routes import read_routes
from skep.model.networks.routes import MachineRoute
from skep.model.networks.used_ports import UsedPort
from skep.model.permissions.rights import is_listed

log = structlog.get_logger()

READ_EVERY_S = 5.0
"""Seconds between two reads of these files."""
UNITS_KEPT_S = 60.0
"""Seconds for which a CDI device without a description is still counted.  Vendors' tools write descriptions anew after
a driver update, and managers stop the tasks that hold a device which their node no longer has.
"""
UNITS_MAX = 256
"""Largest number of CDI devices that are counted, as each is a part of the node's description."""

_Times: TypeAlias = tuple[tuple[str, int, int], ...]


class MachineResources(msgspec.Struct, frozen=True, kw_only=True):
    """The machine's resources at one moment."""

    devices: tuple[str, ...] = ()
    """Paths of the devices that tasks may get."""
    cdi_devices: tuple[str, ...] = ()
    cdi_units: tuple[str, ...] = ()
    """CDI devices that are handed out one by one."""
    routes: tuple[MachineRoute, ...] = ()
    listening: frozenset[UsedPort] = frozenset()
    """Ports on which programs of this machine listen."""


class ResourceReader:
    """Reads the machine's resources and keeps the last result.

    ``configuration`` returns the present configuration, which may be reloaded.  ``may_have`` returns whether tasks may
    have the device at a path.
    """

    def __init__(
        self,
        clock: Clock,
        configuration: Callable[[], Configuration],
        dev: Path = DEV,
        proc: Path = Path("/proc"),
        read_ports: Callable[[], frozenset[UsedPort]] = read_listening_ports,
        may_have: Callable[[str], bool] = is_listed,
    ) -> None:
        self._clock = clock
        self.configuration = configuration
        self._dev = dev
        self._proc = proc
        self._read_ports = read_ports
        self._may_have = may_have
        self._device_times: _Times | None = None
        self._cdi_times: _Times | None = None
        self._described_units: tuple[str, ...] = ()
        self._units_seen: dict[str, float] = {}
        """CDI devices that are counted, and when each was last described."""
        self.present = MachineResources()
        self._unread: set[str] = set()

    async def refresh(self) -> None:
        """Read now.  Unreadable parts keep their last values."""
        self.present = await asyncio.to_thread(self.read, self.present)

    async def prepare(self) -> Callable[[], Coroutine[Any, Any, None]]:
        """Read once, so that the first description has the result.  Returns ``run``."""
        await self.refresh()
        return self.run

    async def run(self) -> None:
        """Read every ``READ_EVERY_S`` until cancelled."""
        while True:
            await tick(self._clock, READ_EVERY_S)
            await self.refresh()

    def read(self, before: MachineResources) -> MachineResources:
        """Return the present resources.  ``before`` is the last result.  Blocks, so call it in a thread."""
        configuration = self.configuration()
        if configuration.executor != "oci":
            devices: tuple[str, ...] = ()
            cdi_devices: tuple[str, ...] = ()
            self._device_times = self._cdi_times = None  # read again once containers can run again
            self._described_units, self._units_seen = (), {}
        else:
            devices = self._devices(before.devices)
            cdi_devices = self._described_devices(configuration.cdi_spec_dirs, before.cdi_devices)
        return MachineResources(
            devices=devices,
            cdi_devices=cdi_devices,
            cdi_units=self._counted_units(),
            routes=self._routes(before.routes),
            listening=self._listening(before.listening),
        )

    def _is_whole(self, what: str, failed: Sequence[OSError]) -> bool:
        """Return whether all of ``what`` was readable.

        If not, earlier results stay: a node without free descriptors still has its devices.
        """
        if failed and what not in self._unread:
            log.warning("machine resources not read", what=what, reason=describe_error(failed[0]))
        (self._unread.add if failed else self._unread.discard)(what)
        return not failed

    def _devices(self, before: tuple[str, ...]) -> tuple[str, ...]:
        failed: list[OSError] = []
        times = _times(device_directories(self._dev, failed.append), failed.append)
        if times == self._device_times and not failed:
            return before
        found = {path for path in device_paths(self._dev, failed.append) if self._may_have(path)}
        if not self._is_whole("devices", failed):
            return tuple(sorted(found.union(before)))  # the next call reads again
        self._device_times = times
        return tuple(sorted(found))

    def _described_devices(self, directories: Iterable[Path], before: tuple[str, ...]) -> tuple[str, ...]:
        failed: list[OSError] = []
        paths = (path for one in directories for path in (one, *_entries(one, failed.append)))
        times = _times(paths, failed.append)
        if times == self._cdi_times and not failed:
            return before
        devices = described(directories, failed.append)
        found, self._described_units = set(devices), units(devices)
        if not self._is_whole("CDI devices", failed):
            return tuple(sorted(found.union(before)))
        self._cdi_times = times
        return tuple(sorted(found))

    def _counted_units(self) -> tuple[str, ...]:
        """Return the CDI devices that are described, or were until a moment ago."""
        now = self._clock.monotonic()
        self._units_seen |= dict.fromkeys(self._described_units, now)
        self._units_seen = {name: at for name, at in self._units_seen.items() if now - at < UNITS_KEPT_S}
        return tuple(sorted(self._units_seen))[:UNITS_MAX]

    def _routes(self, before: tuple[MachineRoute, ...]) -> tuple[MachineRoute, ...]:
        try:
            found = tuple(MachineRoute(*one) for one in read_routes(self._proc / "net"))
        except OSError as error:
            self._is_whole("routes", [error])
            return before
        self._is_whole("routes", ())
        return found

    def _listening(self, before: frozenset[UsedPort]) -> frozenset[UsedPort]:
        try:
            found = self._read_ports()
        except OSError as error:
            self._is_whole("ports", [error])
            return before
        self._is_whole("ports", ())
        return found


def _entries(directory: Path, failed: Failed) -> Iterable[Path]:
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        failed(error)
        return ()


def _times(paths: Iterable[str | Path], failed: Failed) -> _Times:
    """Return path, time and size of the paths that exist."""
    found = []
    for path in paths:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            failed(error)
            continue
        found.append((str(path), status.st_mtime_ns, status.st_size))
    return tuple(found)
