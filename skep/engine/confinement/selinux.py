"""SELinux labels of containers and of their files, as Docker chooses them with ``--selinux-enabled``.

Each container gets a pair of categories that no other container on the node has (``s0:c12,c345``).  Its processes and
its files have this pair, so the kernel keeps two containers apart although both have the type ``container_t``.  Files
for several containers have the level ``s0`` without categories.

``labels_of`` is pure.  The policy's file ``lxc_contexts`` names the types.  Labels of files are the extended attribute
``security.selinux``, and labels of processes are fields of the runtime specification.  libselinux is not needed for
either.

Source: opencontainers/selinux, go-selinux/selinux_linux.go and label/label_linux.go.
"""

import errno
import os
import random
import shutil
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from skep.errors import FailedPrecondition, InvalidArgument
from skep.linux.trees import walk_open

DISABLE: Final = "disable"
SHARED, PRIVATE = "z", "Z"
"""Modes of a mount whose files are relabeled: for all containers, or for its own container only."""

_CATEGORIES: Final = 1024
"""Number of categories in the policies of the distributions."""
_SHARED_LEVEL: Final = "s0"
_UNCONFINED_LEVEL: Final = f"s0:c{_CATEGORIES - 2},c{_CATEGORIES - 1}"
"""Level of the files of a container without SELinux confinement.  No confined container gets it."""
_OPTIONS: Final = ("type", "filetype", "user", "role", "level")

_ATTRIBUTE: Final = "security.selinux"
_FILE_SYSTEM: Final = Path("fs/selinux")
_CONFIG: Final = Path("selinux/config")
_CONTEXTS: Final = Path("/usr/share/containers/selinux/contexts")
"""Contexts of the package container-selinux.  They take precedence over the policy's."""
_OWN: Final = Path("/proc/self/attr/current")
_EXCLUDED: Final = frozenset(
    {
        *("/", "/bin", "/boot", "/dev", "/etc", "/etc/passwd", "/etc/pki", "/etc/shadow", "/home", "/lib"),
        *("/lib64", "/media", "/opt", "/proc", "/root", "/run", "/sbin", "/srv", "/sys", "/tmp", "/usr"),
        *("/var", "/var/lib", "/var/log"),
    }
)
"""Paths that are not relabeled, because the machine would not work afterwards."""


class Policy(NamedTuple):
    """The labels that the machine's policy has for containers."""

    process: str
    file: str
    is_known: bool = True
    """Whether the kernel's policy has these labels.  Debian 12's has not, although its ``lxc_contexts`` names them."""


class Labels(NamedTuple):
    """The labels of one container.  Empty on machines without SELinux.

    ``process`` is also empty for a container without SELinux confinement.
    """

    process: str = ""
    mount: str = ""


NO_LABELS: Final = Labels()


# --- labels -------------------------------------------------------------------------------------------------------


def labels_of(
    policy: Policy | None, options: Sequence[str], in_use: Collection[str], chance: random.Random
) -> Labels:
    """Return the labels of a new container.  Without a ``policy``, options have no effect, as in Docker.

    Args:
        options: Values of ``--security-opt label=``.
        in_use: Process labels of the node's containers.
        chance: Source of the categories.

    Raises: InvalidArgument, in Docker's words: an unknown option; FailedPrecondition: the kernel's policy does not have
    the labels of the file ``lxc_contexts``.
    """
    if policy is None:
        return NO_LABELS
    check(options)
    if not policy.is_known:
        raise FailedPrecondition(
            f"the SELinux policy of this machine does not know the label {policy.process or policy.file}: install a "
            "policy with rules for containers, or start the node without --selinux-enabled"
        )
    if DISABLE in options:
        return Labels(mount=with_level(policy.file, _UNCONFINED_LEVEL))
    if not policy.process:
        return Labels(mount=policy.file)
    process, mount = _parsed(policy.process), _parsed(policy.file)
    given = dict(option.split(":", 1) for option in options)
    if "level" in process:
        level = given.get("level") or _free_level({_level_of(one) for one in in_use}, chance)
        process["level"] = mount["level"] = level
    mount |= {name: given[name] for name in ("user", "level") if name in given}
    if "filetype" in given:
        mount["type"] = given.pop("filetype")
    return Labels(_joined(process | given), _joined(mount))


def check(options: Iterable[str]) -> None:
    """Raise InvalidArgument, in Docker's words, for an unknown option."""
    for option in options:
        name, separator, _ = option.partition(":")
        if option != DISABLE and not (separator and name in _OPTIONS):
            raise InvalidArgument(
                f"bad label option \"{option}\", valid options 'disable' or \n"
                "'user, role, level, type, filetype' followed by ':' and a value"
            )


def options_from(process: str) -> tuple[str, ...]:
    """Return the options by which a container that joins another one's namespaces gets its ``process`` label."""
    parts = _parsed(process) if process else {}
    return tuple(f"{name}:{value}" for name, value in parts.items()) if parts.get("type") else ()


def with_level(label: str, level: str) -> str:
    """Return ``label`` with another level."""
    return _joined(_parsed(label) | {"level": level})


def shared(label: str) -> str:
    """Return the label of files that all containers may use."""
    return with_level(label, _SHARED_LEVEL)


def mount_option(label: str) -> str:
    """Return the option of mount(2) by which all files of a mount have ``label``.  Empty without a label.

    The quotes are needed because a level has commas.
    """
    return f'context="{label}"' if label else ""


def _parsed(label: str) -> dict[str, str]:
    return dict(zip(("user", "role", "type", "level"), label.split(":", 3), strict=False))


def _joined(parts: Mapping[str, str]) -> str:
    return ":".join(parts[name] for name in ("user", "role", "type", "level") if name in parts)


def _level_of(label: str) -> str:
    return _parsed(label).get("level", "")


def _free_level(taken: Collection[str], chance: random.Random) -> str:
    """Return a level that is not ``taken``.  There are half a million, and a node has far fewer containers."""
    while True:
        low, high = sorted(chance.sample(range(_CATEGORIES), 2))
        level = f"s0:c{low},c{high}"
        if level not in taken and level != _UNCONFINED_LEVEL:
            return level


# --- the machine --------------------------------------------------------------------------------------------------


def is_active(sysfs: Path = Path("/sys"), own: Path = _OWN) -> bool:
    """Return whether the kernel has SELinux and a policy is loaded, enforcing or not.

    Source: go-selinux, getEnabled.
    """
    try:
        return (sysfs / _FILE_SYSTEM / "policyvers").exists() and own.read_text().strip("\0\n") != "kernel"
    except OSError:
        return False


def find_policy(
    sysfs: Path = Path("/sys"), etc: Path = Path("/etc"), contexts: Path = _CONTEXTS, own: Path = _OWN
) -> Policy | None:
    """Return the policy's labels for containers, or None if SELinux is not active."""
    if not is_active(sysfs, own):
        return None
    kind = _values(etc / _CONFIG).get("SELINUXTYPE", "")
    found = _values(contexts) or _values(etc / "selinux" / kind / "contexts/lxc_contexts")
    process, file = found.get("process", ""), found.get("file", "")
    is_known = bool(file) and all(_is_known(label, sysfs) for label in (process, file) if label)
    return Policy(process, file, is_known)


def _is_known(label: str, sysfs: Path) -> bool:
    """Return whether the kernel's policy has a label.  Source: go-selinux, securityCheckContext."""
    try:
        (sysfs / _FILE_SYSTEM / "context").write_bytes(label.encode())
    except OSError:
        return False
    return True


def _values(path: Path) -> dict[str, str]:
    """Return the assignments in a file of SELinux's configuration.  Empty if it cannot be read."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.partition("=") for line in lines if "=" in line and line.strip()[:1] not in ("#", ";"))
    return {name.strip(): value.strip().strip('"') for name, _, value in pairs}


# --- labels of files ----------------------------------------------------------------------------------------------


def relabel(path: str, label: str, mode: str) -> None:
    """Label ``path`` and everything below it.  ``path`` itself is labeled last.  Does nothing without a label.

    No symbolic link below ``path`` is followed, even if a container creates one meanwhile.  Mounts below ``path`` are
    not entered.  ``mode`` is ``SHARED`` or ``PRIVATE``.

    Raises: FailedPrecondition, in Docker's words: the path is excluded, or it cannot be labeled.
    """
    if not label:
        return
    label = shared(label) if mode == SHARED else label
    source = os.path.realpath(path)
    if source in _EXCLUDED or source == os.environ.get("HOME"):
        raise FailedPrecondition(
            f"error setting label on mount source '{source}': SELinux relabeling of {source} is not allowed"
        )
    try:
        top = os.open(source, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for descriptor in walk_open(top):
                with suppress(FileNotFoundError):
                    _set(descriptor, label)
            _set(top, label)
        finally:
            os.close(top)
    except OSError as error:
        if error.errno != errno.ENOTSUP:  # such as NFS, whose mount has one label
            raise FailedPrecondition(
                f"error setting label on mount source '{source}': lsetxattr(label={label}) {source}: {error.strerror}"
            ) from error


def shared_program(program: str, place: Path, label: str) -> str:
    """Return the path of a copy of ``program`` that all confined containers may start.  Blocks.

    A container may not start a program of the machine, only files with the label of containers.
    Raises: OSError; FailedPrecondition.
    """
    copy = place / os.path.basename(program)
    if not copy.exists():
        own = place / f"{copy.name}.{threading.get_ident()}"
        shutil.copy(program, own)
        relabel(str(own), label, SHARED)
        own.rename(copy)
    return str(copy)


def _set(descriptor: int, label: str) -> None:
    """Label an open file, which may be a symbolic link.  Raises: OSError."""
    path, value = f"/proc/self/fd/{descriptor}", label.encode()
    with suppress(OSError):
        if os.getxattr(path, _ATTRIBUTE).rstrip(b"\0") == value:
            return
    os.setxattr(path, _ATTRIBUTE, value)
