"""Finds out whether this machine needs a reboot, and keeps the condition ``reboot-required`` current.

Only files are read: package managers leave marks, and a kernel that was installed since the boot does not run yet.
No package manager is started for this, because it would cost seconds and take its lock.
"""

import asyncio
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from skep.aio.clock import SystemClock, tick
from skep.model.node_reports.conditions import ConditionName
from skep.model.values.times import SECOND_NS
from skep.node.host.conditions import Conditions

PERIOD_S = 60.0
"""Seconds between two looks.  A reboot is planned for hours or days later, so a minute is soon enough."""
MARKS = ("run/reboot-required", "run/reboot-needed")
"""Marks of Debian and Ubuntu, and of SUSE.  Both are in memory, so a reboot removes them."""
_NAMES = "run/reboot-required.pkgs"
"""Names of the packages that need the reboot, one per line, often repeated."""
_NAMES_BYTES_MAX = 64 << 10
"""Debian appends a line at each installation, and a machine that is rarely rebooted has some hundred of them."""
_NAMES_SHOWN = 3
"""Packages in the condition's text.  The others are counted, because a condition has at most 300 characters."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._:~-]{0,63}")
"""A package or kernel name that is shown.  Other lines of the file are left out."""


class PendingReboot(msgspec.Struct, frozen=True):
    """The reason for a reboot.  ``source``: the file or folder in which it was seen."""

    source: str
    names: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Return the condition's text."""
        more = len(self.names) - _NAMES_SHOWN
        cause = f" for {', '.join(self.names[:_NAMES_SHOWN])}" if self.names else ""
        rest = f" and {more} more" if more > 0 else ""
        return f"the machine needs a reboot{cause}{rest} ({self.source}): run skep upgrade --system"


def pending_reboot(root: Path, release: str, booted_ns: int, now_ns: int) -> PendingReboot | None:
    """Return why the machine below ``root`` needs a reboot, or None.  Blocks.

    Args:
        release: Release of the running kernel.
        booted_ns: Unix time of the boot.
    """
    for mark in MARKS:
        if (root / mark).exists():
            return PendingReboot(f"/{mark}", _packages(root / _NAMES) if mark == MARKS[0] else ())
    kernels = sorted(_installed_kernels(root, release, booted_ns, now_ns))
    return PendingReboot("/lib/modules", tuple(kernels)) if kernels else None


def _packages(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            lines = file.read(_NAMES_BYTES_MAX).decode(errors="replace").splitlines()
    except OSError:
        return ()
    return tuple(sorted({line.strip() for line in lines if _NAME.fullmatch(line.strip())}))


def _installed_kernels(root: Path, release: str, booted_ns: int, now_ns: int) -> Iterator[str]:
    """Yield the kernels that were installed since the boot.

    A machine without the files of its own kernel is a container, and other kernels there concern nobody.  The change
    time counts, because packages keep the modification time of their build.  A change time in the future means that the
    clock has not been set yet.
    """
    modules = root / "lib/modules"
    if not (modules / release).is_dir():
        return
    for one in modules.iterdir():
        for image in (one / "vmlinuz", root / f"boot/vmlinuz-{one.name}"):
            try:
                changed_ns = os.stat(image).st_ctime_ns
            except OSError:
                continue
            if booted_ns < changed_ns <= now_ns and _NAME.fullmatch(one.name):
                yield f"kernel {one.name}"
                break


def look(clock: SystemClock) -> str:
    """Return the condition's text, or an empty text.  Blocks."""
    now_ns = clock.now_ns()
    booted_ns = now_ns - round(clock.since_boot() * SECOND_NS)
    try:
        found = pending_reboot(Path("/"), os.uname().release, booted_ns, now_ns)
    except OSError:  # the modules' folder vanished during the look
        return ""
    return found.text if found is not None else ""


async def keep_condition(
    conditions: Conditions, clock: SystemClock, changed: Callable[[], None], find: Callable[[], str]
) -> None:
    """Keep the condition ``reboot-required`` current until cancelled.  ``changed``: called after each change."""
    while True:
        before = conditions.present()
        conditions.report(ConditionName.REBOOT_REQUIRED, await asyncio.to_thread(find))
        if conditions.present() != before:
            changed()
        await tick(clock, PERIOD_S)
