"""Loads Docker's AppArmor profile ``docker-default`` on machines with AppArmor.

The profile restricts the files below /proc and /sys that a container's processes may write, and the processes that they
may signal or trace.  It forbids mounts even if a capability would allow them.  It is loaded once and stays in the
kernel.  If a profile with that name is already loaded (by a Docker Engine), it is the same and is kept.

Source: moby/profiles, apparmor (template.go, apparmor.go); containerd, pkg/apparmor (HostSupports).
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

from skep.errors import FailedPrecondition
from skep.linux.own_user_namespace import is_rootless

DEFAULT_PROFILE: Final = "docker-default"
UNCONFINED: Final = "unconfined"

SYSFS: Final = Path("/sys")
_ENABLED = Path("module/apparmor/parameters/enabled")
_KERNEL = Path("kernel/security/apparmor")
_OWN = Path("/proc/self/attr/current")
_INCLUDED = Path("/etc/apparmor.d")
_TIMEOUT_S = 30.0
"""Time limit in seconds for apparmor_parser."""

_RULES = """\
  network,
  deny network alg,
  capability,
  file,
  umount,

  # Signals come from the machine, from the runtime that stops the container, and from within it.
  signal (receive) peer=unconfined,
  signal (receive) peer=runc,
  signal (receive) peer=crun,
  signal (receive) peer="{daemon}",
  signal (send,receive) peer="{name}",
  ptrace (trace,tracedby,read,readby) peer="{name}",

  # Of /proc its own processes' directories and /proc/sys/kernel/shm* may be written.
  deny @{{PROC}}/* w,
  deny @{{PROC}}/{{[^1-9/],[^1-9/][^0-9/],[^1-9s/][^0-9y/][^0-9s/],[^1-9/][^0-9/][^0-9/][^0-9/]*}}/** w,
  deny @{{PROC}}/sys/[^k]** w,
  deny @{{PROC}}/sys/kernel/{{?,??,[^s][^h][^m]**}} w,
  deny @{{PROC}}/{{kcore,sysrq-trigger}} rwklx,

  deny mount,

  # Of /sys nothing but /sys/fs/cgroup may be changed, and some of it not be read.
  deny /sys/[^f]*/** wklx,
  deny /sys/f[^s]*/** wklx,
  deny /sys/fs/[^c]*/** wklx,
  deny /sys/fs/c[^g]*/** wklx,
  deny /sys/fs/cg[^r]*/** wklx,
  deny /sys/{{firmware,devices/virtual/powercap,kernel/security}}/** rwklx,
"""


@cache
def is_supported(sysfs: Path = SYSFS) -> bool:
    """Return whether the machine has AppArmor and can load a profile, by Docker's criteria."""
    inside = os.environ.get("container")  # noqa: SIM112  # as systemd spells it
    if inside or is_rootless() or shutil.which("apparmor_parser") is None or not (sysfs / _KERNEL).is_dir():
        return False
    try:
        return (sysfs / _ENABLED).read_text().startswith("Y")
    except OSError:
        return False


def profile_text(
    name: str, daemon: str = UNCONFINED, *, is_included: Callable[[str], bool] = lambda _: False
) -> str:
    """Return the text of the profile ``name``.

    ``daemon`` is the profile of this process.  ``is_included`` returns whether /etc/apparmor.d has a file.
    """
    # "network" of a later ABI does not include unix sockets.
    head = ["abi <abi/3.0>,"] if is_included("abi/3.0") else []
    head += ["#include <tunables/global>" if is_included("tunables/global") else "@{PROC}=/proc/"]
    body = ["  #include <abstractions/base>"] if is_included("abstractions/base") else []
    rules = _RULES.format(name=name, daemon=daemon)
    return "\n".join(
        [*head, f'profile "{name}" flags=(attach_disconnected,mediate_deleted) {{', *body, rules + "}\n"]
    )


def load_default(sysfs: Path = SYSFS) -> None:
    """Load ``DEFAULT_PROFILE`` into the kernel.  Blocks.  Raises: FailedPrecondition: it is refused."""
    if is_loaded(_profiles(sysfs), DEFAULT_PROFILE):
        return
    text = profile_text(DEFAULT_PROFILE, own_profile(), is_included=lambda one: (_INCLUDED / one).exists())
    try:
        # -K: write no cache, which may be on a read-only file system.
        subprocess.run(
            ("apparmor_parser", "-Kr"),
            input=text,
            text=True,
            capture_output=True,
            check=True,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", "") or str(error)
        raise FailedPrecondition(
            f"AppArmor enabled on system but the {DEFAULT_PROFILE} profile could not be loaded: {output.strip()}"
        ) from error


def problem(sysfs: Path = SYSFS) -> str:
    """Return why the default profile cannot be loaded now, or "" if it can or AppArmor is missing.  Blocks."""
    if not is_supported(sysfs):
        return ""
    try:
        load_default(sysfs)
    except FailedPrecondition as error:
        return str(error)
    return ""


def is_loaded(profiles: str, name: str) -> bool:
    """Return whether the kernel's list of ``profiles`` has ``name``.  A line is ``docker-default (enforce)``."""
    return any(label_of(line) == name for line in profiles.splitlines())


def own_profile() -> str:
    """Return the profile of this process."""
    try:
        return label_of(_OWN.read_text()) or UNCONFINED
    except OSError:
        return UNCONFINED


def label_of(context: str) -> str:
    """Convert ``a b (enforce)`` to ``a b``.  ``unconfined`` has no mode.  Without AppArmor the context may be empty."""
    text = context.strip("\n\0")
    name, mode, _ = text.rpartition(" (")
    return name if mode and text.endswith(")") else text


def _profiles(sysfs: Path) -> str:
    try:
        return (sysfs / _KERNEL / "profiles").read_text()
    except OSError:
        return ""
