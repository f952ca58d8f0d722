"""Looks up the machine's devices for a container's options: device nodes, block device numbers, CDI descriptions.

This is done at each start, because devices come and go.  ``runtime_spec`` uses the result and is pure.

Source: moby 20.10, oci/devices_linux.go (DevicesFromPath), daemon/oci_linux.go (WithDevices);
opencontainers/runc, libcontainer/devices/device_unix.go (HostDevices).
"""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import msgspec

from skep.engine.confinement import cdi
from skep.engine.confinement.machine import DeviceMapping, MachineOptions
from skep.errors import FailedPrecondition

Failed: TypeAlias = Callable[[OSError], None]
"""Called for each path that cannot be read at the moment, so that its contents are unknown."""

DEV = Path("/dev")
_NOT_DEVICES = frozenset({"pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"})
"""Entries of /dev that are not devices of the machine, because each container has its own."""
_ENTRIES_MAX = 10_000
"""Limit for the files in a directory that a ``--device`` option names."""


class DeviceNode(msgspec.Struct, frozen=True, kw_only=True):
    """A device file.  ``type`` is ``c`` or ``b``.  ``access`` has the container's rights, letters of ``rwm``.

    ``source`` is the machine's file of this device, empty if it has none with these numbers.
    """

    path: str
    type: str
    major: int
    minor: int
    mode: int = 0
    uid: int = 0
    gid: int = 0
    access: str = "rwm"
    source: str = ""


class Devices(msgspec.Struct, frozen=True, kw_only=True):
    """Devices found for a container."""

    nodes: tuple[DeviceNode, ...] = ()
    bound: tuple[DeviceNode, ...] = ()
    """Devices that are bind mounts instead."""
    limited: dict[str, tuple[int, int]] = {}
    """Major and minor numbers of block devices with limits, by path."""
    edits: cdi.Edits = cdi.Edits()


NO_DEVICES = Devices()


def look_up(options: MachineOptions, directories: tuple[Path, ...]) -> Devices:
    """Return this machine's devices for ``options``.  Later CDI ``directories`` take precedence.

    Raises: FailedPrecondition: a device is missing, in Docker's words.
    """
    nodes = {node.path: node for node in machine_devices()} if options.privileged else {}
    for mapping in options.devices:
        nodes |= {node.path: node for node in _mapped(mapping)}
    paths = [one.path for one in options.blkio_weight_device]
    paths += [one.path for devices in options.throttles.values() for one in devices]
    limited = {path: _numbers_of(path) for path in paths}
    edits = cdi.edits_for(options.device_requests, directories) if options.device_requests else cdi.Edits()
    nodes |= {one.path: _of_edit(one) for one in edits.nodes}
    return Devices(nodes=tuple(nodes.values()), limited=limited, edits=edits)


def machine_devices() -> Iterator[DeviceNode]:
    """Yield every device of the machine, except terminals and the console, because each container has its own."""
    for directory, names, files in os.walk(DEV):
        names[:] = sorted(name for name in names if name not in _NOT_DEVICES)
        for name in sorted(files):
            node = device_at(Path(directory, name))
            if node is not None and name != "console":
                yield node


def device_directories(dev: Path, failed: Failed) -> Iterator[str]:
    """Yield the directories of ``device_paths``.

    A device that appears or disappears changes its directory's modification time.
    """
    for directory, _ in _walk(dev, failed):
        yield directory


def device_paths(dev: Path, failed: Failed) -> Iterator[str]:
    """Yield the paths of the machine's devices, including links to them (``/dev/serial/by-id/...``)."""
    for directory, files in _walk(dev, failed):
        for name in sorted(files):
            path = os.path.join(directory, name)
            try:
                mode = os.stat(path).st_mode
            except FileNotFoundError:  # the device disappeared, or the link leads nowhere
                continue
            except OSError as error:
                failed(error)
                continue
            if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                yield path


def _walk(dev: Path, failed: Failed) -> Iterator[tuple[str, list[str]]]:
    def note(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):  # it disappeared
            failed(error)

    for directory, names, files in os.walk(dev, onerror=note):
        names[:] = sorted(name for name in names if name not in _NOT_DEVICES)
        yield directory, files


def device_at(path: Path, shown: str = "", access: str = "rwm") -> DeviceNode | None:
    """Return the device file ``path``, or None if it is not a device or disappeared.

    ``shown``: path in the container.
    """
    try:
        status = os.lstat(path)
    except OSError:
        return None
    kind = {stat.S_IFCHR: "c", stat.S_IFBLK: "b"}.get(stat.S_IFMT(status.st_mode))
    if kind is None:
        return None
    return DeviceNode(
        path=shown or str(path),
        type=kind,
        major=os.major(status.st_rdev),
        minor=os.minor(status.st_rdev),
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        access=access,
        source=str(path),
    )


def _mapped(mapping: DeviceMapping) -> Iterator[DeviceNode]:
    """Yield the devices of a ``--device`` option.  Raises: FailedPrecondition."""
    real = Path(os.path.realpath(mapping.path_on_host))
    shown = mapping.path_in_container or mapping.path_on_host
    access = mapping.cgroup_permissions or "rwm"
    node = device_at(real, shown, access)
    if node is not None:
        yield node
        return
    if not real.is_dir():
        reason = "not a device node" if real.exists() else "no such file or directory"
        raise FailedPrecondition(
            "error gathering device information while adding custom device "
            f'"{mapping.path_on_host}": {reason}'
        )
    seen = 0
    for directory, names, files in os.walk(real):
        names.sort()
        seen += len(names) + len(files)
        if seen > _ENTRIES_MAX:  # the user has perhaps named a whole file system
            raise FailedPrecondition(
                f'custom device "{mapping.path_on_host}": more than {_ENTRIES_MAX} files are in this directory'
            )
        for name in sorted(files):
            path = Path(directory, name)
            inside = device_at(path, str(Path(shown, path.relative_to(real))), access)
            if inside is not None:
                yield inside


def _numbers_of(path: str) -> tuple[int, int]:
    """Return a block device's numbers.  Raises: FailedPrecondition: the path is not a device."""
    node = device_at(Path(os.path.realpath(path)))
    if node is None:
        reason = "not a device node" if os.path.exists(path) else "no such file or directory"
        raise FailedPrecondition(f"cannot limit device {path}: {reason}")
    return node.major, node.minor


def _of_edit(edit: cdi.DeviceFile) -> DeviceNode:
    """Return the device node of a CDI description, with omitted fields from the machine.

    Raises: FailedPrecondition.
    """
    found = device_at(
        Path(os.path.realpath(edit.host_path or edit.path)), edit.path, edit.permissions or "rwm"
    )
    if found is None:
        raise FailedPrecondition(
            f'CDI device injection failed: failed to stat CDI host device "{edit.host_path or edit.path}": '
            "no such file or directory"
        )
    numbers = (
        edit.type or found.type,
        edit.major if edit.major is not None else found.major,
        edit.minor if edit.minor is not None else found.minor,
    )
    return DeviceNode(
        path=edit.path,
        type=numbers[0],
        major=numbers[1],
        minor=numbers[2],
        mode=edit.file_mode if edit.file_mode is not None else found.mode,
        uid=edit.uid if edit.uid is not None else found.uid,
        gid=edit.gid if edit.gid is not None else found.gid,
        access=found.access,
        source=found.source if numbers == (found.type, found.major, found.minor) else "",
    )
