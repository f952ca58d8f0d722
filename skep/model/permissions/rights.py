"""Rights over the node that a service requests by container labels, and the permissions for them.

Docker's services have no field for devices, privileges, GPUs, shared memory and host namespaces.  Skep takes them from
labels of the *container*, which belong to the task's spec.  A change of such a label therefore replaces the tasks, and
a rollback reverts it.  A right is granted only if both the cluster and the node allow its kind, each by its own
``skep.allow``.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Set
from enum import Enum
from typing import Any, Final

import msgspec

from skep.errors import InvalidArgument
from skep.model.container import ContainerSpec

API_LABEL: Final = "skep.api"
"""Container label with the calls that a container may make on a mounted API socket (``ApiAccess``)."""
EXECUTOR_LABEL: Final = "skep.executor"
"""Container label with which a task runs a program of its node instead of an image (``processes``)."""
PROCESS: Final = "process"
ALLOW_LABEL: Final = "skep.allow"
"""Label of the cluster, and engine label of nodes, with the kinds of rights that they allow to services."""
DEVICES_LABEL: Final = "skep.devices"
"""Engine label with a node's devices, separated by commas.  ``...`` at the end means that the list was cut."""
CDI_LABEL: Final = "skep.cdi"
"""Engine label with a node's devices that vendors describe (CDI), separated by commas."""
MORE: Final = "..."
_WORDS_MAX = 256
"""Largest number of words in one container label.  The scheduler searches each node for the device that a word names.
"""

_SIZE = re.compile(r"(\d{1,15})([bkmgt]?)b?", re.IGNORECASE)
_FACTORS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
RESERVED: Final = "reserved"
"""Value of ``skep.gpus`` and ``skep.devices``: the CDI devices that the task has reserved as generic resources."""
_CDI_NAME = re.compile(r"[a-zA-Z][\w.-]*/[a-zA-Z][\w.-]*=[\w.:-]+")
_ACCESS = re.compile(r"[rwm]{1,3}")
_RULE = re.compile(r"[acb] ([0-9]+|\*):([0-9]+|\*) [rwm]{1,3}")
_UNLISTED = re.compile(
    r"/dev/((tty|vcs[au]?|loop|ram|dm-|zram|pty|ptyp|ttyp)\d*|null|zero|full|random|urandom|ptmx|console)"
    r"|/dev/(disk|char|block|pts|shm|mqueue|mapper|fd)/.*"
)


class ApiAccess(Enum):
    """Calls that a container may make on its own Engine API socket, as named in ``skep.api``."""

    READ = "read"
    """Lists and details, without the values of environment variables and without the data of configs."""
    INSPECT = "inspect"
    """All details, and logs."""
    FULL = "full"
    """All that root on the node can do."""


class Right(Enum):
    """A kind of right, as named in ``skep.allow``."""

    PRIVILEGED = "privileged"
    """All that root on the node can do."""
    DEVICES = "devices"
    GPUS = "gpus"
    NAMESPACES = "namespaces"
    """Processes, shared memory and host name of the machine."""
    RESOURCES = "resources"
    """Sizes and limits for which ``docker service create`` has no option."""
    API = "api"
    """All calls of the Engine API, for containers that mount its socket."""
    API_INSPECT = "api-inspect"
    """Reading environment variables, configs and logs of others through the Engine API, which may contain secrets."""
    PROCESSES = "processes"
    """Programs of the machine instead of images, with its files that every user may read in /etc, /usr and /opt."""


ALL_RIGHTS: Final = frozenset(Right)


class Device(msgspec.Struct, frozen=True):
    """A device, or a directory of devices.  ``access``: letters of ``rwm``."""

    path: str
    path_in_container: str
    access: str = "rwm"


class Gpus(msgspec.Struct, frozen=True, kw_only=True):
    """Requested GPUs: a number of them (``count`` -1 for all), GPUs with these names, or the task's reserved GPUs."""

    count: int = 0
    ids: tuple[str, ...] = ()
    is_reserved: bool = False


class MachineRights(msgspec.Struct, frozen=True, kw_only=True):
    """The rights that a container's labels request."""

    privileged: bool = False
    devices: tuple[Device, ...] = ()
    cdi_devices: tuple[str, ...] = ()
    has_reserved_devices: bool = False
    """Whether the task gets the CDI devices, except GPUs, that the scheduler has assigned to it."""
    device_rules: tuple[str, ...] = ()
    gpus: Gpus | None = None
    pid: str = ""
    """``host`` or empty.  The same holds for the next two fields."""
    ipc: str = ""
    uts: str = ""
    shm_bytes: int = 0
    cpu_shares: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    memory_swap: int = 0
    """Limit of memory and swap together, in bytes, or -1 for no limit."""
    memory_swappiness: int | None = None
    api_full: bool = False
    api_inspect: bool = False
    is_process: bool = False
    """Whether the task runs a program of its node, without an image."""
    blkio_weight: int = 0
    read_bps: tuple[tuple[str, int], ...] = ()
    """Path of a block device, and bytes per second.  The next three fields have the same form."""
    write_bps: tuple[tuple[str, int], ...] = ()
    read_iops: tuple[tuple[str, int], ...] = ()
    write_iops: tuple[tuple[str, int], ...] = ()

    @property
    def kinds(self) -> frozenset[Right]:
        """Return the kinds of rights that the labels need."""
        return frozenset(
            _KINDS.get(name, Right.RESOURCES)
            for name in self.__struct_fields__
            if getattr(self, name) != getattr(_NOTHING, name)
        )


_NOTHING: Final = MachineRights()
_KINDS: Final = {
    name: right
    for right, names in {
        Right.PRIVILEGED: ("privileged",),
        Right.DEVICES: ("devices", "cdi_devices", "has_reserved_devices", "device_rules"),
        Right.GPUS: ("gpus",),
        Right.NAMESPACES: ("pid", "ipc", "uts"),
        Right.API: ("api_full",),
        Right.API_INSPECT: ("api_inspect",),
        Right.PROCESSES: ("is_process",),
    }.items()
    for name in names
}
"""The kind of right that each field needs.  The other fields need ``Right.RESOURCES``."""


def rights_of(container: ContainerSpec | None) -> MachineRights:
    """Return the rights that a container's labels request.  Raises: InvalidArgument: a label is invalid."""
    if container is None or _READERS.keys().isdisjoint(container.labels):
        return _NOTHING
    found: dict[str, Any] = {}
    for name, read in _READERS.items():
        text = container.labels.get(name)
        if text is None:
            continue
        try:
            found |= read(text)
        except ValueError as error:
            raise InvalidArgument(f"invalid label {name}={text}: {error}") from None
    return MachineRights(**found) if found else _NOTHING


def labels_for(container: ContainerSpec | None, kinds: Set[Right]) -> tuple[str, ...]:
    """Return the container's labels that request a right of ``kinds``, in order."""
    labels = container.labels if container is not None else {}
    requested = {
        name: MachineRights(**read(labels[name])) for name, read in _READERS.items() if name in labels
    }
    return tuple(name for name, rights in requested.items() if rights.kinds & kinds)


def api_access(labels: Mapping[str, str]) -> ApiAccess:
    """Return the access that a container's labels permit on its own API socket.  Raises: InvalidArgument."""
    text = labels.get(API_LABEL, ApiAccess.READ.value)
    try:
        _api(text)
    except ValueError as error:
        raise InvalidArgument(f"invalid label {API_LABEL}={text}: {error}") from None
    return ApiAccess(text)


def is_reserved_by(rights: MachineRights, kind: str) -> bool:
    """Return whether a container with ``rights`` gets its reserved resources of this kind, ``vendor.com/class``."""
    if "/" not in kind:
        return False
    if kind.endswith("/gpu"):
        return rights.gpus is not None and rights.gpus.is_reserved
    return rights.has_reserved_devices


def check_service_rights(container: ContainerSpec | None, service_labels: Iterable[str]) -> None:
    """Check a service's labels for rights.

    Raises: InvalidArgument: a label is invalid, or is set on the service instead of the container.
    """
    misplaced = sorted(_READERS.keys() & set(service_labels))
    if misplaced:
        raise InvalidArgument(
            f"the label {misplaced[0]} works on containers only: set it with --container-label, not with --label"
        )
    rights_of(container)


def allowed_rights(text: str) -> frozenset[Right]:
    """Return the kinds in a value of ``skep.allow``: ``devices,gpus``, ``all``, or none.  Raises: InvalidArgument."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if words == ["all"]:
        return ALL_RIGHTS
    if words == ["none"]:
        return frozenset()
    try:
        return frozenset(Right(word) for word in words)
    except ValueError:
        known = ", ".join(right.value for right in Right)
        raise InvalidArgument(
            f"invalid label {ALLOW_LABEL}={text}: expected all, none, or some of {known}, separated by commas"
        ) from None


def allowed_by(labels: Mapping[str, str]) -> frozenset[Right]:
    """Return the kinds in the labels of a cluster or node; none if the label is missing or invalid."""
    try:
        return allowed_rights(labels.get(ALLOW_LABEL, ""))
    except InvalidArgument:
        return frozenset()


def reported_rights(rights: frozenset[Right]) -> str:
    """Return the kinds as a node reports them.

    All of them are reported as ``all``, because managers of other versions may not know every name.
    """
    return "all" if rights == ALL_RIGHTS else rights_text(rights)


def rights_text(rights: Iterable[Right]) -> str:
    """Return the kinds in the form of ``skep.allow``."""
    return ",".join(sorted(right.value for right in rights))


def is_listed(path: str) -> bool:
    """Return whether nodes report a device at ``path``; terminals and loop devices, for example, are not reported."""
    return path.startswith("/dev/") and not _UNLISTED.fullmatch(path)


def missing_devices(rights: MachineRights, engine_labels: Mapping[str, str]) -> tuple[str, ...]:
    """Return the requested devices that a node lacks, by its labels."""
    # A text search is fast enough for thousands of nodes with hundreds of devices each.
    listed = f",{engine_labels.get(DEVICES_LABEL, '')},"
    described = [one for one in engine_labels.get(CDI_LABEL, "").split(",") if one]
    missing: list[str] = []
    if f",{MORE}," not in listed:
        missing += [
            one.path
            for one in rights.devices
            if is_listed(one.path)
            and f",{one.path}," not in listed
            and f",{one.path.rstrip('/')}/" not in listed
        ]
    if MORE not in described:
        missing += [name for name in rights.cdi_devices if name not in described]
        missing += _missing_gpus(rights.gpus, described) if rights.gpus is not None else []
    return tuple(missing)


def _missing_gpus(gpus: Gpus, described: Iterable[str]) -> list[str]:
    names = {name.partition("=")[2] for name in described if name.partition("=")[0].endswith("/gpu")}
    if gpus.ids:
        return [f"GPU {id}" for id in gpus.ids if id not in names]
    single = names - {"all"}
    if gpus.count < 0:
        return [] if names else ["GPU"]
    return [] if len(single) >= gpus.count else [f"{gpus.count} GPUs (it has {len(single)})"]


# --- labels ------------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ValueError("it is empty")
    if len(words) > _WORDS_MAX:  # See ``_WORDS_MAX``.
        raise ValueError(f"it has more than {_WORDS_MAX} parts")
    return words


def _boolean(text: str) -> dict[str, Any]:
    if text not in ("true", "false"):
        raise ValueError("expected true or false")
    return {"privileged": text == "true"}


def _api(text: str) -> dict[str, Any]:
    if text not in ("read", "inspect", "full"):
        raise ValueError("expected read, inspect or full")
    return {} if text == "read" else {f"api_{text}": True}


def _executor(text: str) -> dict[str, Any]:
    if text != PROCESS:
        raise ValueError(f"expected {PROCESS}")
    return {"is_process": True}


def _devices(text: str) -> dict[str, Any]:
    """Parse devices in the form of ``--device``, ``/dev/a[:/dev/b[:rwm]]``, and CDI names."""
    devices, names = [], []
    words = _words(text)
    for word in words:
        if word == RESERVED:
            continue
        if _CDI_NAME.fullmatch(word):
            names.append(word)
            continue
        parts = word.split(":")
        if len(parts) == 2 and _ACCESS.fullmatch(parts[1]):
            parts = [parts[0], parts[0], parts[1]]
        path, inside, access = (*parts, *("", "", "")[len(parts) :]) if len(parts) <= 3 else ("", "", "")
        inside, access = inside or path, access or "rwm"
        if not (path.startswith("/") and inside.startswith("/") and _ACCESS.fullmatch(access)):
            raise ValueError(
                "expected devices like /dev/ttyUSB0 or /dev/ttyUSB0:/dev/modem:rw, separated by commas"
            )
        devices.append(Device(path, inside, access))
    return {
        "devices": tuple(devices),
        "cdi_devices": tuple(names),
        "has_reserved_devices": RESERVED in words,
    }


def _rules(text: str) -> dict[str, Any]:
    words = _words(text)
    if not all(map(_RULE.fullmatch, words)):
        raise ValueError("expected rules like c 188:* rwm, separated by commas")
    return {"device_rules": tuple(words)}


def _gpus(text: str) -> dict[str, Any]:
    words = _words(text)
    if words == ["all"]:
        return {"gpus": Gpus(count=-1)}
    if words == [RESERVED]:
        return {"gpus": Gpus(is_reserved=True)}
    if len(words) == 1 and words[0].isascii() and words[0].isdigit() and 0 < int(words[0]) <= 1024:
        return {"gpus": Gpus(count=int(words[0]))}
    names = text.removeprefix("device=").split(",") if text.startswith("device=") else []
    if not names or not all(re.fullmatch(r"[\w.:-]+", name) for name in names):
        raise ValueError("expected all, a number, reserved, or device=NAME,...")
    return {"gpus": Gpus(ids=tuple(names))}


def _of_the_machine(field: str) -> Callable[[str], dict[str, Any]]:
    def read(text: str) -> dict[str, Any]:
        if text != "host":
            raise ValueError("expected host")
        return {field: text}

    return read


def size(text: str) -> int:
    """Return the bytes of a size such as ``64m``, ``1g`` or ``4096``.  Raises: ValueError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError("expected a size like 64m or 1g")
    return int(match[1]) * _FACTORS[match[2].lower()]


def _size(field: str, *, is_unlimited: bool = False) -> Callable[[str], dict[str, Any]]:
    def read(text: str) -> dict[str, Any]:
        if is_unlimited and text == "-1":
            return {field: -1}
        bytes_ = size(text)
        if not 0 < bytes_ < 2**63:
            raise ValueError("expected a size like 64m or 1g")
        return {field: bytes_}

    return read


def _number(field: str, least: int, most: int) -> Callable[[str], dict[str, Any]]:
    def read(text: str) -> dict[str, Any]:
        if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
            raise ValueError(f"expected a number from {least} to {most}")
        return {field: int(text)}

    return read


def _ranges(field: str) -> Callable[[str], dict[str, Any]]:
    def read(text: str) -> dict[str, Any]:
        if not re.fullmatch(r"[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*", text):
            raise ValueError("expected numbers like 0-3,5")
        return {field: text}

    return read


def _rates(field: str, amount: Callable[[str], int]) -> Callable[[str], dict[str, Any]]:
    def read(text: str) -> dict[str, Any]:
        found = []
        for word in _words(text):
            path, separator, rate = word.rpartition(":")
            if not separator or not path.startswith("/"):
                raise ValueError("expected DEVICE:RATE, separated by commas")
            found.append((path, amount(rate)))
            if found[-1][1] >= 2**63:
                raise ValueError("the rate is too large")
        return {field: tuple(found)}

    return read


def _operations(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ValueError("expected DEVICE:OPERATIONS, separated by commas")
    return int(text)


_READERS: Final[Mapping[str, Callable[[str], dict[str, Any]]]] = {
    API_LABEL: _api,
    EXECUTOR_LABEL: _executor,
    "skep.privileged": _boolean,
    "skep.devices": _devices,
    "skep.device-rules": _rules,
    "skep.gpus": _gpus,
    "skep.pid": _of_the_machine("pid"),
    "skep.ipc": _of_the_machine("ipc"),
    "skep.uts": _of_the_machine("uts"),
    "skep.shm-size": _size("shm_bytes"),
    "skep.cpu-shares": _number("cpu_shares", 2, 262_144),
    "skep.cpuset-cpus": _ranges("cpuset_cpus"),
    "skep.cpuset-mems": _ranges("cpuset_mems"),
    "skep.memory-swap": _size("memory_swap", is_unlimited=True),
    "skep.memory-swappiness": _number("memory_swappiness", 0, 100),
    "skep.blkio-weight": _number("blkio_weight", 10, 1000),
    "skep.device-read-bps": _rates("read_bps", size),
    "skep.device-write-bps": _rates("write_bps", size),
    "skep.device-read-iops": _rates("read_iops", _operations),
    "skep.device-write-iops": _rates("write_iops", _operations),
}
"""Every container label that requests a right."""

RIGHT_LABELS: Final = frozenset(_READERS)
