"""Converts units of fleet whose command is a program of the machine to plain processes (``skep.executor=process``).

Source: systemd.exec(5), systemd.service(5), systemd.resource-control(5), of the versions that fleet ran on and later.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from skep.errors import InvalidArgument
from skep.imports.docker_run import ConvertedRun
from skep.model.permissions.processes import NO_IMAGE, USER
from skep.model.permissions.rights import EXECUTOR_LABEL, PROCESS

_NETWORK_NOTE: Final = (
    "the process has the machine's network, as the unit had, where only root may use ports below 1024. To publish "
    "ports instead, replace network_mode by ports"
)

Settings = Callable[[str], Sequence[str]]
"""Returns the values of a setting of ``[Service]``."""

_LIMITS: Final = {
    "MemoryLimit": "mem_limit",
    "MemoryMax": "mem_limit",
    "CPUQuota": "cpus",
    "TasksMax": "pids_limit",
}
_MOUNTS: Final = {
    "ReadWritePaths": "",
    "ReadWriteDirectories": "",
    "BindPaths": "",
    "ReadOnlyPaths": ":ro",
    "ReadOnlyDirectories": ":ro",
    "BindReadOnlyPaths": ":ro",
}
"""Settings that name directories of the machine, with the mode of their mounts."""
_DIRECTORIES: Final = {
    "StateDirectory": "/var/lib",
    "CacheDirectory": "/var/cache",
    "LogsDirectory": "/var/log",
}
_CONFINED: Final = {
    "NoNewPrivileges", "PrivateTmp", "PrivateDevices", "PrivateIPC", "ProtectSystem", "ProtectHome", "ProtectClock",
    "ProtectControlGroups", "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables",
    "RestrictSUIDSGID", "RestrictNamespaces", "CapabilityBoundingSet", "KillMode", "SyslogIdentifier",
}  # fmt: skip
"""Settings that every process has, or that mean nothing in a container."""
_SHOWN: Final = re.compile(r"/(usr|etc|opt|bin|sbin|lib\w*|tmp|var/tmp)(/|$)|/$")
"""Directories that a process sees without a mount."""
_ULIMIT: Final = re.compile(r"Limit([A-Z]+)")


def process_of(words: Sequence[str], settings: Settings, keys: Iterable[str], name: str) -> ConvertedRun:
    """Convert a unit of the command ``words`` with the settings ``keys``.  Notes begin with the setting.

    Raises: InvalidArgument: it puts itself in the background.
    """
    if _last(settings, "Type") == "forking":
        raise InvalidArgument(
            f"{name}: Type=forking puts the program in the background: add the program's option to stay in the "
            "foreground, and remove the Type"
        )
    notes: list[tuple[str, str]] = []
    entry: dict[str, Any] = {"image": NO_IMAGE, "command": list(words), "labels": {EXECUTOR_LABEL: PROCESS}}
    entry["network_mode"] = "host"
    notes.append(("ExecStart", _NETWORK_NOTE))
    if user := _user(settings, notes):
        entry["user"] = user
    if groups := [word for line in settings("SupplementaryGroups") for word in line.split()]:
        entry["group_add"] = groups
    if directory := _last(settings, "WorkingDirectory").removeprefix("-"):
        entry["working_dir"] = directory
    if signal := _last(settings, "KillSignal"):
        entry["stop_signal"] = signal
    if volumes := _volumes(settings, notes):
        entry["volumes"] = volumes
    if places := [f"/run/{word}" for line in settings("RuntimeDirectory") for word in line.split()]:
        entry["tmpfs"] = places
    entry |= _limits(settings, notes)
    if ulimits := _ulimits(settings, keys):
        entry["ulimits"] = ulimits
    return ConvertedRun(entry=entry, name="", notes=tuple(notes))


def is_converted(key: str) -> bool:
    """Return whether ``process_of`` converts a setting of ``[Service]``, or every process has it."""
    known = {
        "Type",
        "User",
        "Group",
        "SupplementaryGroups",
        "WorkingDirectory",
        "KillSignal",
        "RuntimeDirectory",
    }
    known |= _LIMITS.keys() | _MOUNTS.keys() | _DIRECTORIES.keys() | _CONFINED
    return key in known or _ULIMIT.fullmatch(key) is not None


def _last(settings: Settings, key: str) -> str:
    found = settings(key)
    return found[-1] if found else ""


def _user(settings: Settings, notes: list[tuple[str, str]]) -> str:
    user, group = _last(settings, "User"), _last(settings, "Group")
    if user in ("", "root", "0"):
        notes.append(
            (
                "User",
                "the unit ran as root, and the process runs as nobody. Give it a user that may read its files",
            )
        )
        user = USER.partition(":")[0] if group else ""
    if group in ("root", "0"):
        notes.append(("Group", "dropped: a plain process cannot have the group root"))
        group = ""
    return f"{user}:{group}" if group else user


def _volumes(settings: Settings, notes: list[tuple[str, str]]) -> list[str]:
    """Return the mounts of directories that a process does not see, one for each target."""
    found: dict[str, str] = {}
    directory = _last(settings, "WorkingDirectory").removeprefix("-")
    if directory and not _SHOWN.match(directory):
        found[directory] = f"{directory}:{directory}"
    for key, mode in _MOUNTS.items():
        for word in (word.lstrip("-+") for line in settings(key) for word in line.split()):
            source, _, rest = word.partition(":")
            target = rest.partition(":")[0] or source
            if not (mode and source == target and _SHOWN.match(target)):
                found[target] = f"{source}:{target}{mode}"
    for key, parent in _DIRECTORIES.items():
        for word in (word for line in settings(key) for word in line.split()):
            path = f"{parent}/{word.partition(':')[0]}"
            notes.append(
                (key, f"create {path} for the process's user on each machine, where systemd created it")
            )
            found[path] = f"{path}:{path}"
    return list(found.values())


def _limits(settings: Settings, notes: list[tuple[str, str]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, name in _LIMITS.items():
        text = _last(settings, key)
        if text in ("", "infinity"):
            continue
        percent = re.fullmatch(r"([0-9]+)%", text)
        if name == "cpus" and percent:
            found[name] = str(int(percent[1]) / 100)
        elif name == "mem_limit" and re.fullmatch(r"[0-9]+[KMGT]?", text):
            found[name] = text.lower()
        elif name == "pids_limit" and text.isascii() and text.isdigit():
            found[name] = int(text)
        else:
            notes.append((key, f"dropped: {text!r} is not a limit that a service can have"))
    return found


def _ulimits(settings: Settings, keys: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in keys:
        if match := _ULIMIT.fullmatch(key):
            soft, _, hard = _last(settings, key).replace("infinity", "-1").partition(":")
            found[match[1].lower()] = {"soft": _number(soft, key), "hard": _number(hard or soft, key)}
    return found


def _number(text: str, key: str) -> int:
    if not re.fullmatch(r"-1|[0-9]{1,18}", text):
        raise InvalidArgument(f"{key}={text}: expected a number or infinity")
    return int(text)
