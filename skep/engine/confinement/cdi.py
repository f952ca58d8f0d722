"""Devices by the Container Device Interface: vendors' files that describe a container's access to a device.

``vendor.com/class=name`` names a device.  Files in /etc/cdi and /var/run/cdi, written by the machine's administrator or
the vendor's tools, list its nodes, mounts, variables and hooks.  They are read at each start, because a driver update
replaces them.  They must belong to root, because their hooks run on the machine.

Source: cncf-tags/container-device-interface, SPEC.md (0.8), pkg/cdi; moby, daemon/cdi.go.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from skep.engine.confinement.machine import DeviceRequest
from skep.errors import FailedPrecondition, InvalidArgument
from skep.model.values.encoding import GoInt

log = structlog.get_logger()

DIRECTORIES: Final = (Path("/etc/cdi"), Path("/var/run/cdi"))
"""The specification's directories, in ascending priority: later files override earlier ones."""
_FILE_BYTES_MAX = 1 << 20
"""Limit in bytes for a description file."""
_FILES_MAX = 256
"""Limit for the description files in a directory, and for the parsed files that are cached."""
_ALL: Final = "all"
"""Name with which vendors describe all devices of a kind together."""
_DEPTH_MAX = 64
"""Limit for the nesting depth of lists and mappings."""
_HOOKS = frozenset(
    {"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"}
)


class DeviceFile(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A device file in the container.  Omitted fields come from the machine's device."""

    path: str
    host_path: str = ""
    type: str = ""
    major: int | None = None
    minor: int | None = None
    file_mode: int | None = None
    permissions: str = ""
    uid: int | None = None
    gid: int | None = None


class BindMount(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A mount from the machine."""

    host_path: str
    container_path: str
    options: tuple[str, ...] = ()
    type: str = ""


class Hook(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A program that the runtime runs on the machine at one point of the container's life."""

    hook_name: str
    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    timeout: GoInt | None = None


class Edits(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """``containerEdits``: additions to a container."""

    env: tuple[str, ...] = ()
    nodes: tuple[DeviceFile, ...] = msgspec.field(name="deviceNodes", default=())
    mounts: tuple[BindMount, ...] = ()
    hooks: tuple[Hook, ...] = ()
    additional_gids: tuple[int, ...] = msgspec.field(name="additionalGids", default=())

    def __add__(self, other: "Edits") -> "Edits":
        return Edits(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})


class _Device(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    name: str
    container_edits: Edits = Edits()


class _File(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    kind: str
    devices: tuple[_Device, ...]
    container_edits: Edits = Edits()


class Described(msgspec.Struct, frozen=True, kw_only=True):
    """One device.

    ``shared`` has the edits for all devices of its file, which are applied once even for several devices.
    """

    edits: Edits
    file: Path
    shared: Edits


def described(
    directories: Iterable[Path] = DIRECTORIES, failed: Callable[[OSError], None] = lambda _: None
) -> Mapping[str, Described]:
    """Return every device in this machine's descriptions by name.  A file that cannot be read is logged and skipped.

    Args:
        failed: Called for each file or directory that may be readable a moment later.
    """
    found: dict[str, Described] = {}
    for directory in directories:
        try:
            files = sorted(path for path in directory.iterdir() if path.suffix in (".json", ".yaml", ".yml"))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            failed(error)
            continue
        for path in files[:_FILES_MAX]:
            try:
                content = _read(path)
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                if isinstance(error, OSError):
                    failed(error)
                _report_unread(str(path), str(error))
                continue
            for device in content.devices:
                found[f"{content.kind}={device.name}"] = Described(
                    edits=device.container_edits, file=path, shared=content.container_edits
                )
    return found


def units(devices: Mapping[str, Described]) -> tuple[str, ...]:
    """Return the devices that can be handed out one by one: each device file belongs to at most one of a kind.

    Vendors also describe names for all devices together, and several names of one device.  A device with the device
    files of another one and further ones counts as a name for several.  Of equal devices, the first name counts.
    """
    found: dict[tuple[str, object], str] = {}
    for name, one in sorted(devices.items()):
        kind, _, word = name.partition("=")
        if word != _ALL:
            found.setdefault((kind, _files_of(one) or one.edits), name)
    files = {name: _files_of(devices[name]) for name in found.values()}
    kinds: dict[str, list[frozenset[str]]] = {}
    for name, own in files.items():
        kinds.setdefault(name.partition("=")[0], []).append(own)
    return tuple(
        name
        for name, own in files.items()
        if not any(other and other < own for other in kinds[name.partition("=")[0]])
    )


def _files_of(device: Described) -> frozenset[str]:
    return frozenset(one.host_path or one.path for one in device.edits.nodes)


@lru_cache(_FILES_MAX)
def _report_unread(path: str, error: str) -> None:
    """Log once for each reason, because nodes read all descriptions every few seconds."""
    log.warning("CDI description not read", path=path, error=error)


def edits_for(requests: Sequence[DeviceRequest], directories: Iterable[Path] = DIRECTORIES) -> Edits:
    """Return the container edits for the devices of ``requests``.

    Raises: FailedPrecondition: a device does not exist; InvalidArgument: the request cannot be satisfied on this
    machine.
    """
    known = described(directories)
    names = [name for request in requests for name in names_of(request, known)]
    missing = [name for name in names if name not in known]
    if missing:
        raise FailedPrecondition(
            f"CDI device injection failed: unresolvable CDI devices {', '.join(missing)}"
        )
    edits, files = Edits(), set()
    for name in dict.fromkeys(names):
        device = known[name]
        edits += device.edits if device.file in files else device.shared + device.edits
        files.add(device.file)
    return edits


def names_of(request: DeviceRequest, known: Iterable[str]) -> Sequence[str]:
    """Return the devices that a request names.  ``known`` are the machine's devices.

    ``--gpus`` requests GPUs of any described vendor.  A driver name selects one of several.
    Raises: FailedPrecondition: there are fewer devices; InvalidArgument: the request contradicts itself.

    Source: moby, daemon/devices.go (error texts) and daemon/nvidia_linux.go (capabilities of GPUs).
    """
    if request.driver == "cdi":
        if request.count:
            raise InvalidArgument("cannot specify Count for CDI devices")
        return request.device_ids
    is_gpu = any("gpu" in one for one in request.capabilities)
    kinds = sorted({name.partition("=")[0] for name in known if name.partition("=")[0].endswith("/gpu")})
    kind = next((one for one in kinds if one.startswith(request.driver)), None)
    if not is_gpu or kind is None:
        shown = " ".join(f"[{' '.join(one)}]" for one in request.capabilities)
        raise FailedPrecondition(
            f'could not select device driver "{request.driver}" with capabilities: [{shown}]'
        )
    if request.device_ids:
        if request.count:
            raise InvalidArgument("cannot set both Count and DeviceIDs on device request")
        return [f"{kind}={id}" for id in request.device_ids]
    own = [name for name in known if name.startswith(f"{kind}=") and name != f"{kind}=all"]
    if request.count < 0:
        return [f"{kind}=all"] if f"{kind}=all" in known else own
    if request.count > len(own):
        raise FailedPrecondition(
            f"{request.count} devices {kind} were requested, but this machine has {len(own)}"
        )
    return sorted(own)[: request.count]


def oci_hooks(hooks: Iterable[Hook]) -> dict[str, list[dict[str, Any]]]:
    """Return ``hooks`` of the runtime specification."""
    found: dict[str, list[dict[str, Any]]] = {}
    for hook in hooks:
        entry: dict[str, Any] = {"path": hook.path, "args": list(hook.args), "env": list(hook.env)}
        if hook.timeout is not None:
            entry["timeout"] = hook.timeout
        found.setdefault(hook.hook_name, []).append(entry)
    return found


def _parsed(path: Path) -> Any:
    """Parse JSON, or YAML without aliases, of which a few lines could expand to gigabytes.

    Raises: OSError; ValueError; msgspec.MsgspecError.
    """
    content = path.read_bytes()
    if path.suffix == ".json":
        return msgspec.json.decode(content)
    import yaml  # here: 0.7 MB in every process of the node, and few nodes have such files

    try:
        depth = 0
        for event in yaml.parse(content, yaml.CSafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _DEPTH_MAX:
                raise ValueError(
                    "aliases are not supported" if depth <= _DEPTH_MAX else "it is nested too deeply"
                )
        return yaml.load(content, yaml.CSafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _read(path: Path) -> _File:
    """Read a description file.  Raises: OSError; ValueError; msgspec.MsgspecError."""
    status = path.stat()
    if status.st_size > _FILE_BYTES_MAX:
        raise ValueError(f"larger than {_FILE_BYTES_MAX} bytes")
    return _read_as_of(path, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(_FILES_MAX)
def _read_as_of(path: Path, _inode: int, _mtime_ns: int, _ctime_ns: int) -> _File:
    """Read a file.

    Cached by the arguments, so that an unchanged file is parsed once although nodes look every few seconds.
    """
    content = msgspec.convert(_parsed(path), _File)
    for edits in (content.container_edits, *(one.container_edits for one in content.devices)):
        unknown = {hook.hook_name for hook in edits.hooks} - _HOOKS
        if unknown:
            raise ValueError(f"unknown hooks: {', '.join(sorted(unknown))}")
    return content
