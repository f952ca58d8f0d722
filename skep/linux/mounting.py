"""One mount or unmount in a separate process: ``python -m skep.linux.mounting``, with a JSON request on its input.

A network file system may wait forever for its server, in mount(2) and in every access to its paths.  A thread that
waits in the kernel cannot be ended, but a process can.  This process exits with 0, or with 1 and the reason on its
standard error.

Source: moby/sys, mount/mount_unix.go, mount/flags_linux.go; moby 28, volume/local/local_unix.go (getMountOptions),
internal/safepath/join_linux.go.
"""

import ctypes
import ipaddress
import json
import os
import re
import socket
import stat
import sys
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from skep.linux import syscalls

# Source: linux/mount.h: MS_*.
_PRIVATE, _SLAVE, _SHARED, _UNBINDABLE = 1 << 18, 1 << 19, 1 << 20, 1 << 17
_PROPAGATION = _PRIVATE | _SLAVE | _SHARED | _UNBINDABLE
_SET = {
    "ro": syscalls.MS_RDONLY,
    "nosuid": syscalls.MS_NOSUID,
    "nodev": syscalls.MS_NODEV,
    "noexec": syscalls.MS_NOEXEC,
    "sync": 16,
    "remount": syscalls.MS_REMOUNT,
    "mand": 64,
    "dirsync": 128,
    "noatime": 1 << 10,
    "nodiratime": 1 << 11,
    "bind": syscalls.MS_BIND,
    "rbind": syscalls.MS_BIND | syscalls.MS_REC,
    "unbindable": _UNBINDABLE,
    "runbindable": _UNBINDABLE | syscalls.MS_REC,
    "private": _PRIVATE,
    "rprivate": _PRIVATE | syscalls.MS_REC,
    "slave": _SLAVE,
    "rslave": _SLAVE | syscalls.MS_REC,
    "shared": _SHARED,
    "rshared": _SHARED | syscalls.MS_REC,
    "relatime": 1 << 21,
    "strictatime": 1 << 24,
}
_CLEARED = {
    "defaults": 0,
    "rw": syscalls.MS_RDONLY,
    "suid": syscalls.MS_NOSUID,
    "dev": syscalls.MS_NODEV,
    "exec": syscalls.MS_NOEXEC,
    "async": 16,
    "nomand": 64,
    "atime": 1 << 10,
    "diratime": 1 << 11,
    "norelatime": 1 << 21,
    "nostrictatime": 1 << 24,
}
# Source: linux/prctl.h: PR_SET_PDEATHSIG.
_DEATH_SIGNAL, _SIGKILL = 1, 9


def main() -> int:
    """Execute the request."""
    request = json.load(sys.stdin)
    # End with the node process.  After it was killed, no process would know of a mount that is made here.
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, _SIGKILL, 0, 0, 0)
    try:
        match request:
            case {"mount": str() as target, "options": dict() as options}:
                mount_volume(Path(target), options, request.get("refused", ()))
            case {"bind": str() as target, "root": str() as root, "part": str() as part}:
                bind_part(root, part, Path(target))
            case {"directory": str() as source, "target": str() as target, "refused": list() as refused}:
                bind_directory(source, Path(target), refused)
            case {"unmount": str() as target}:
                syscalls.unmount(Path(target), syscalls.MNT_DETACH)
    except KernelMountFailed as error:
        sys.stderr.write(str(error))
    except OSError as error:
        sys.stderr.write(_words(error.errno or 0))
    else:
        return 0
    return 1


class KernelMountFailed(Exception):
    """A mount failed.  The message has the source and the reason in Docker's words."""


def _words(number: int) -> str:
    """Return the text of an error number as in Go."""
    text = os.strerror(number)
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def parse_options(text: str) -> tuple[int, str]:
    """Split comma-separated options into flags of mount(2) and data for the file system."""
    flags, data = 0, []
    for word in text.split(","):
        if word in _SET:
            flags |= _SET[word]
        elif word in _CLEARED:
            flags &= ~_CLEARED[word]
        elif word:
            data.append(word)
    return flags, ",".join(data)


_LAYERS = ("lowerdir", "lowerdir+", "datadir+", "upperdir", "workdir")
"""Options of an overlay that name directories."""


def mount_volume(target: Path, options: dict[str, str], refused: Sequence[str] = ()) -> None:
    """Mount ``options["device"]`` on ``target``, unless it contains one of ``refused`` or is inside one.

    Raises: KernelMountFailed, without passwords; OSError.
    """
    kind, device = options.get("type", ""), options.get("device", "")
    if not device:
        raise KernelMountFailed("missing device in volume options")
    given = options.get("o", "")
    if kind in ("nfs", "cifs"):
        device, given = resolved(kind, device, given)
    flags, data = parse_options(given)
    try:
        source = _opened(device, flags, refused) if flags & syscalls.MS_BIND else device
        is_layered = kind == "overlay" and not flags & syscalls.MS_BIND
        opened = _with_opened_layers(data, refused) if is_layered else data
        _mount(source, target, kind, flags, opened)
    except OSError as error:
        shown = f", flags: {flags & ~_PROPAGATION:#x}" if flags & ~_PROPAGATION else ""
        shown += f", data: {data}" if data else ""
        text = f"failed to mount local volume: mount {device}:{target}{shown}: {_words(error.errno or 0)}"
        if error.errno == 19 and kind:  # ENODEV
            text += f" (the kernel of this node has no file system {kind})"
        raise KernelMountFailed(_without_password(text, given)) from error


def _opened(device: str, flags: int, refused: Sequence[str]) -> str:
    """Open the source of a bind mount, so that later changes of its path have no effect.

    Returns its path in ``/proc``.

    Raises: KernelMountFailed; OSError.
    """
    descriptor = os.open(device, os.O_PATH | os.O_CLOEXEC)
    real = os.readlink(f"/proc/self/fd/{descriptor}")
    for one in map(os.path.realpath, refused):
        is_inside = f"{real}/".startswith(f"{one}/")
        is_around = real == "/" or one.startswith(f"{real}/")
        if is_inside or (
            is_around and (flags & syscalls.MS_REC or os.fstat(descriptor).st_dev == os.stat(one).st_dev)
        ):
            raise KernelMountFailed(
                f"failed to mount local volume: {device} has sockets of this node: mount it as a bind, not as a volume"
            )
    return f"/proc/self/fd/{descriptor}"


def _with_opened_layers(data: str, refused: Sequence[str]) -> str:
    """Replace an overlay's directories in its options by opened ones, so that later changes of paths have no effect.

    A layer shows its directory without the mounts below it, unlike a recursive bind mount.
    Raises: KernelMountFailed; OSError.
    """
    words = _split(data, ",")
    for number, word in enumerate(words):
        name, _, value = word.partition("=")
        if name in _LAYERS:
            paths = _split(value, ":")
            opened = [one and _opened(re.sub(r"\\(.)", r"\1", one), 0, refused) for one in paths]
            words[number] = f"{name}={':'.join(opened)}"
    return ",".join(words)


def _split(text: str, separator: str) -> list[str]:
    """Split options like the kernel: a backslash escapes a separator or another backslash."""
    words = re.findall(rf"{separator}(?:\\.?|[^\\{separator}])*", f"{separator}{text}", re.DOTALL)
    return [word[1:] for word in words]


def _mount(device: str, target: Path, type: str, flags: int, data: str) -> None:
    """Call mount(2), then make the separate calls for propagation and for a read-only bind mount."""
    recursive = flags & syscalls.MS_REC if flags & _PROPAGATION and not flags & syscalls.MS_BIND else 0
    plain = flags & ~_PROPAGATION & ~recursive
    syscalls.mount(device, target, type, plain, data or None)
    try:
        if flags & _PROPAGATION:
            syscalls.mount("", target, None, flags & (_PROPAGATION | syscalls.MS_REC))
        if plain & syscalls.MS_BIND and plain & syscalls.MS_RDONLY:
            syscalls.mount("", target, None, plain | syscalls.MS_REMOUNT)
    except OSError:
        syscalls.unmount(target)
        raise


def _without_password(text: str, options: str) -> str:
    for word in options.split(","):
        if word.startswith("password="):
            text = text.replace(word, "password=********")
    return text


def resolved(type: str, device: str, options: str) -> tuple[str, str]:
    """Return device and options of a network file system with host names resolved, because the kernel accepts only
    addresses.

    Raises: KernelMountFailed: the name has no address.
    """
    named = next((word for word in options.split(",") if word.startswith("addr=")), "")
    host = named.removeprefix("addr=")
    if host and not _is_address(host, 4):
        return device, options.replace(named, f"addr={_address_of(host)}", 1)
    if type == "cifs":
        url = urllib.parse.urlsplit(device)
        if url.hostname and not _is_address(url.hostname):
            device = device.replace(url.hostname, _address_of(url.hostname), 1)
    return device, options


def _is_address(text: str, version: int = 0) -> bool:
    try:
        return ipaddress.ip_address(text).version == (version or ipaddress.ip_address(text).version)
    except ValueError:
        return False


def _address_of(host: str) -> str:
    """Return the host's IPv4 address, else its IPv6 address, like Go's ResolveIPAddr."""
    try:
        found = sorted(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM), key=lambda one: one[0])
    except OSError as error:
        text = f"error resolving passed in network volume address: lookup {host}: no such host"
        raise KernelMountFailed(text) from error
    return str(found[0][4][0])


def bind_part(root: str, part: str, target: Path) -> None:
    """Bind the file or directory ``part`` of the tree ``root`` to ``target``.  Links cannot lead outside the tree.

    Mounts the opened file, regardless of later changes of its path.  Raises: KernelMountFailed; OSError.
    """
    try:
        descriptor = syscalls.open_beneath(Path(root), part)
    except OSError as error:
        if error.errno in (18, 40):  # EXDEV, ELOOP
            text = f"path concatenation escapes the base directory, base: {root}, subpath: {part}"
        else:
            path = os.path.join(root, part)
            text = f"cannot access path {path}: lstat {path}: {_words(error.errno or 0)}"
        raise KernelMountFailed(text) from error
    try:
        bind_opened(descriptor, target)
    finally:
        os.close(descriptor)


def bind_opened(descriptor: int, target: Path) -> None:
    """Bind an open file or directory to ``target``, which is created if missing.  Raises: OSError."""
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
    else:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        target.touch(mode=0o600)
    syscalls.mount(f"/proc/self/fd/{descriptor}", target, None, syscalls.MS_BIND | syscalls.MS_REC)
    syscalls.mount("", target, None, syscalls.MS_PRIVATE | syscalls.MS_REC)


_NO_VOLUMES = (
    *(
        "/",
        "/bin",
        "/boot",
        "/etc",
        "/home",
        "/lib",
        "/lib64",
        "/mnt",
        "/opt",
        "/root",
        "/run",
        "/sbin",
        "/srv",
    ),
    *("/tmp", "/usr", "/var", "/var/lib", "/var/run"),
)
_KERNEL_DIRECTORIES = ("/proc", "/sys", "/dev")


def bind_directory(source: str, target: Path, refused: list[str]) -> None:
    """Bind a volume's directory that a volume plug-in named.  Later mounts below it become visible in the volume.

    Refuses system directories and directories inside ``refused``, even if reached by links.  Mounts the opened
    directory.
    Raises: KernelMountFailed; OSError.
    """
    descriptor = os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        real = os.readlink(f"/proc/self/fd/{descriptor}")
        is_refused = any(f"{real}/".startswith(f"{one}/") for one in (*_KERNEL_DIRECTORIES, *refused))
        if real in _NO_VOLUMES or is_refused:
            raise KernelMountFailed(f"{source} cannot be a volume: it leads to {real}")
        syscalls.mount(f"/proc/self/fd/{descriptor}", target, None, syscalls.MS_BIND | syscalls.MS_REC)
    finally:
        os.close(descriptor)
    syscalls.mount("", target, None, _SLAVE | syscalls.MS_REC)


_ESCAPED = re.compile(r"\\([0-7]{3})")


def mount_targets() -> set[str]:
    """Return this process's mount points from mountinfo(5), without accessing a file system."""
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return {_unescaped(line.split(" ", 5)[4]) for line in lines}


def is_target(path: Path) -> bool:
    """Return whether something is mounted at ``path`` itself.

    Links in its parent are resolved, so the parent must be on a local file system, which cannot hang.
    """
    return os.path.join(os.path.realpath(path.parent), path.name) in mount_targets()


def containing_mount(path: str) -> tuple[str, tuple[str, ...]]:
    """Return the mount that contains ``path``, which has no links, and its propagation: ``shared:7``, ``master:3``."""
    found: tuple[str, tuple[str, ...]] = ("/", ())
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        words = line.split(" ")
        target = _unescaped(words[4])
        is_above = target == "/" or f"{path}/".startswith(f"{target}/")
        if is_above and len(target) >= len(found[0]):
            found = target, tuple(words[6 : words.index("-")])
    return found


def _unescaped(target: str) -> str:
    return _ESCAPED.sub(lambda code: chr(int(code[1], 8)), target)


if __name__ == "__main__":
    sys.exit(main())
