"""Starts the node of an ordinary user: checks its requirements, and runs the daemon inside RootlessKit.

RootlessKit makes user, mount, network and process namespaces in which the user is root, with the user's ranges of
/etc/subuid and /etc/subgid.  slirp4netns connects the network namespace to the machine's network, and RootlessKit's
port driver lets the machine's ports lead into it.  All processes of the node end with RootlessKit, because their
process namespace does.

Source: moby, contrib/dockerd-rootless.sh; the documentation of rootlesskit 1.1.
"""

import os
import platform
import pwd
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from skep.engine.confinement.cgroups import MOUNT_POINT, Cgroups
from skep.engine.confinement.seccomp import kernel_version
from skep.linux.own_user_namespace import LOWEST_PORT
from skep.node.host.requirements import Unfit
from skep.node.host.user_remap import FIRST_ID, free_range, subordinate_ranges

_PACKAGES = {
    "rootlesskit": "rootlesskit",
    "slirp4netns": "slirp4netns",
    "newuidmap": "uidmap",
    "newgidmap": "uidmap",
}
"""The packages of the programs that are needed, by program."""
_IDS_MIN = 65_536
"""Size of the user's ranges.  Images have owners and groups up to this number."""
_KERNEL_MIN = (5, 11)
"""The first kernel that lets users mount overlays.  Source: Linux, fs/overlayfs/super.c (FS_USERNS_MOUNT)."""
_TUN = Path("/dev/net/tun")
_KERNEL_SETTINGS = {
    "kernel.unprivileged_userns_clone": ("0", "1"),
    "user.max_user_namespaces": ("0", "28633"),
}
"""Settings that forbid user namespaces, with the forbidding value and a better one.  Some kernels lack the first."""
_APPARMOR_SETTING = "kernel.apparmor_restrict_unprivileged_userns"
"""Whether AppArmor takes all capabilities in user namespaces from users' programs without a profile (Ubuntu)."""
_APPARMOR_PROFILES = Path("/etc/apparmor.d")
_MTU = "65520"
"""Largest packet of slirp4netns in bytes, which saves system calls.  Source: dockerd-rootless.sh."""
_OWN_GROUP = "skep-daemon"
"""Control group of the node's own processes, so that the delegated group may have limits (no internal processes)."""
_OWN_DIRECTORIES = ("skep", "docker")
_COMMAND_TIMEOUT_S = 5.0
"""Time limit in seconds for ``getsubids``, which may read a directory service, and for a trial of RootlessKit."""


class RootlessFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about a machine and a user who starts a rootless node."""

    user: str
    uid: int
    kernel: tuple[int, ...] = _KERNEL_MIN
    missing_programs: tuple[str, ...] = ()
    subuids: int = _IDS_MIN
    """Length of the user's ranges in /etc/subuid."""
    subgids: int = _IDS_MIN
    free_id: int = FIRST_ID
    """The first number above all ranges of this machine."""
    settings: Mapping[str, str] = {}
    """Values of kernel settings.  Settings that this kernel lacks are left out."""
    rootlesskit: Path = Path("/usr/bin/rootlesskit")
    is_refused_by_apparmor: bool = False
    apparmor_profile: Path | None = None
    """The file with a profile for ``rootlesskit``, which the kernel may have or not."""
    has_tun: bool = True
    may_open_tun: bool = True
    runtime_dir: str = ""
    """``XDG_RUNTIME_DIR``, empty if unset."""
    owns_runtime_dir: bool = True


def problems(facts: RootlessFacts) -> tuple[str, ...]:
    """Return why the user cannot run a node, one sentence with a command for each reason."""
    if facts.uid == 0:
        return (
            "--rootless is for ordinary users, and this is root: leave it out, or start skep as another user",
        )
    found = []
    if facts.missing_programs:
        packages = " ".join(dict.fromkeys(_PACKAGES[name] for name in facts.missing_programs))
        found.append(f"{', '.join(facts.missing_programs)} not found: as root, apt-get install {packages}")
    if min(facts.subuids, facts.subgids) < _IDS_MIN:
        files = [
            name
            for name, ids in (("/etc/subuid", facts.subuids), ("/etc/subgid", facts.subgids))
            if ids < _IDS_MIN
        ]
        numbers = f"{facts.free_id}-{facts.free_id + _IDS_MIN - 1}"
        options = " ".join(f"--add-{name.rpartition('/')[2]}s {numbers}" for name in files)
        found.append(
            f"{facts.user} has fewer than {_IDS_MIN} ids in {' and '.join(files)}: "
            f"as root, usermod {options} {facts.user}"
        )
    found += _kernel_problems(facts)
    # The trial of RootlessKit fails for each reason above as well.
    if facts.is_refused_by_apparmor and not found:
        found.append(
            f"AppArmor restricts users' namespaces, and no loaded profile allows {facts.rootlesskit} one: "
            f"as root, {_profile_command(facts)}, or for all programs, sysctl -w {_APPARMOR_SETTING}=0"
        )
    if not facts.runtime_dir or not facts.owns_runtime_dir:
        reason = f"{facts.runtime_dir} is not writable" if facts.runtime_dir else "XDG_RUNTIME_DIR is not set"
        found.append(
            f"{reason}, so there is no place for the API socket: as root, loginctl enable-linger {facts.user}, "
            f"then export XDG_RUNTIME_DIR=/run/user/{facts.uid}"
        )
    return tuple(found)


def _kernel_problems(facts: RootlessFacts) -> list[str]:
    """Return the reasons that are in the kernel, its settings and its devices."""
    found = []
    if facts.kernel < _KERNEL_MIN:
        found.append(
            f"Linux {'.'.join(map(str, facts.kernel))} lets only root mount overlays, which images need: "
            f"boot {'.'.join(map(str, _KERNEL_MIN))} or newer"
        )
    for name, (forbidding, better) in _KERNEL_SETTINGS.items():
        if facts.settings.get(name) == forbidding:
            found.append(
                f"{name} is {forbidding}, so users cannot make user namespaces: as root, sysctl -w {name}={better}"
            )
    if not facts.has_tun:
        found.append(f"{_TUN} does not exist, so there is no network: as root, modprobe tun")
    elif not facts.may_open_tun:
        found.append(f"{facts.user} may not open {_TUN}, so there is no network: as root, chmod 666 {_TUN}")
    return found


def _profile_command(facts: RootlessFacts) -> str:
    """Return the command that loads a profile for RootlessKit, and writes it first if there is none.

    Source: moby, contrib/dockerd-rootless-setuptool.sh.
    """
    program = facts.rootlesskit
    file = facts.apparmor_profile or _APPARMOR_PROFILES / str(program).lstrip("/").replace("/", ".")
    load = f"apparmor_parser -r {file}"
    if facts.apparmor_profile is not None:
        return load
    text = rf'abi <abi/4.0>,\nprofile "{program}" flags=(unconfined) {{\n  userns,\n}}\n'
    return f"printf '{text}' > {file} && {load}"


def command(state: Path, daemon: Sequence[str], *, is_delegated: bool) -> tuple[str, ...]:
    """Return the command that runs ``daemon`` inside RootlessKit.

    Args:
        state: Directory for RootlessKit's own files.
        is_delegated: Whether control groups of version 2 are delegated to the user.
    """
    evacuate = (f"--evacuate-cgroup2={_OWN_GROUP}",) if is_delegated else ()
    return (
        "rootlesskit",
        f"--state-dir={state}",
        "--net=slirp4netns",
        f"--mtu={_MTU}",
        "--slirp4netns-sandbox=auto",
        "--slirp4netns-seccomp=auto",
        "--disable-host-loopback",  # services on the machine's loopback address trust its users
        "--port-driver=builtin",
        "--copy-up=/etc",
        "--copy-up=/run",
        "--propagation=rslave",
        "--pidns",
        "--cgroupns",
        *evacuate,
        *daemon,
    )


def enter(daemon: Sequence[str]) -> NoReturn:
    """Replace this process by RootlessKit, which runs the command ``daemon``.

    Raises: Unfit: with all problems at once.
    """
    facts = _facts(os.environ)
    if found := problems(facts):
        raise Unfit(found)
    state = Path(facts.runtime_dir) / "skep-rootless"
    arguments = command(state, daemon, is_delegated=_is_delegated())
    own = {"HOME": str(Path.home()), LOWEST_PORT: str(_lowest_port())}
    os.execvpe(arguments[0], arguments, {**os.environ, **own})


def hide_machines_directories(run: Path = Path("/run")) -> None:
    """Remove RootlessKit's links from this namespace's /run to directories that the node makes or reads itself.

    A Docker Engine or a node of root may have them on the machine.
    """
    for name in _OWN_DIRECTORIES:
        if (run / name).is_symlink():
            (run / name).unlink()


def _facts(environment: Mapping[str, str]) -> RootlessFacts:
    uid = os.getuid()
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    runtime_dir = environment.get("XDG_RUNTIME_DIR", "")
    rootlesskit = Path(shutil.which("rootlesskit") or "rootlesskit").resolve()
    return RootlessFacts(
        user=user,
        uid=uid,
        kernel=kernel_version(platform.release()),
        missing_programs=tuple(name for name in _PACKAGES if shutil.which(name) is None),
        subuids=_ids_of(user, uid, Path("/etc/subuid"), ()),
        subgids=_ids_of(user, uid, Path("/etc/subgid"), ("-g",)),
        free_id=max(free_range(_text(Path("/etc", name))) for name in ("subuid", "subgid")),
        settings={name: value for name in _KERNEL_SETTINGS if (value := _setting(name))},
        rootlesskit=rootlesskit,
        is_refused_by_apparmor=_setting(_APPARMOR_SETTING) == "1" and not may_make_namespaces(rootlesskit),
        apparmor_profile=profile_of(rootlesskit),
        has_tun=_TUN.exists(),
        may_open_tun=os.access(_TUN, os.R_OK | os.W_OK),
        runtime_dir=runtime_dir,
        owns_runtime_dir=os.access(runtime_dir, os.W_OK | os.X_OK),
    )


def may_make_namespaces(rootlesskit: Path, timeout_s: float = _COMMAND_TIMEOUT_S) -> bool:
    """Return whether RootlessKit can make its namespaces, is missing, or does not end in time.

    Users cannot read which profiles the kernel has, so this tries it.  A refusal comes at once, so a machine on which
    it takes long is busy.
    """
    try:
        done = subprocess.run((rootlesskit, "true"), capture_output=True, check=False, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired):
        return True
    return done.returncode == 0


def profile_of(program: Path, profiles: Path = _APPARMOR_PROFILES) -> Path | None:
    """Return the file of ``profiles`` that has a profile for ``program``, or None."""
    # The path is a word of the profile's head, with or without quotes.
    head = re.compile(rf'^[^#\n]*(?<![^\s"]){re.escape(str(program))}(?![^\s"]).*\{{', re.MULTILINE)
    files = sorted(profiles.iterdir()) if profiles.is_dir() else []
    return next((file for file in files if file.is_file() and head.search(_text(file))), None)


def _ids_of(user: str, uid: int, file: Path, options: Sequence[str]) -> int:
    """Return the length of a user's ranges in ``file``, or else in the directory service that getsubids(1) reads."""
    if found := subordinate_ids(_text(file), user, uid):
        return found
    try:
        done = subprocess.run(
            ("getsubids", *options, user),
            capture_output=True,
            text=True,
            check=True,
            timeout=_COMMAND_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError):
        return 0
    # Each line is "0: USER START COUNT".
    counts = (line.split()[-1] for line in done.stdout.splitlines() if line.split())
    return sum(int(count) for count in counts if count.isdecimal())


def subordinate_ids(text: str, user: str, uid: int) -> int:
    """Return the length of a user's ranges in the ``text`` of /etc/subuid, where users have names or numbers."""
    return sum(count for _, count in subordinate_ranges(text, user, uid))


def _lowest_port() -> int:
    """Return the lowest port on which RootlessKit may listen: any, if its file has the capability for it."""
    program = shutil.which("rootlesskit")
    if program is not None and "security.capability" in os.listxattr(program):
        return 1
    text = _setting("net.ipv4.ip_unprivileged_port_start")
    return int(text) if text.isdecimal() else 1024  # as before Linux 4.11


def _setting(name: str) -> str:
    return _text(Path("/proc/sys", *name.split("."))).strip()


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _is_delegated() -> bool:
    """Return whether this process's control group of version 2 belongs to its user (systemd's ``Delegate=yes``)."""
    if not Cgroups("").is_v2:
        return False
    own = _text(Path("/proc/self/cgroup")).partition("::")[2].strip()
    return os.access(MOUNT_POINT / own.lstrip("/") / "cgroup.procs", os.W_OK)
