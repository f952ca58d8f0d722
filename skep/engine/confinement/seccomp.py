"""Translates seccomp profiles into runc's format.

In Docker's JSON, each rule of a profile may depend on capabilities, architecture and kernel version.  ``for_runtime``
evaluates these conditions.  The default profile is in ``seccomp_default``.

runc builds the filter at every start, and each architecture of the profile takes 5 to 8 ms of processor time.  So the
default profile leaves out x32 (a second numbering of the system calls of x86_64) on kernels that cannot run x32 calls
(``runs_x32``).  This allows no additional call, because x32 calls cannot succeed there.  The difference is that such a
call kills the process, as with systemd's ``SystemCallArchitectures=native``, instead of returning ENOSYS or EPERM.
"""

import platform
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import msgspec

from skep.engine.confinement import seccomp_default
from skep.errors import InvalidArgument

_ARCHITECTURES = {
    "x86_64": ("amd64", "SCMP_ARCH_X86_64"),
    "aarch64": ("arm64", "SCMP_ARCH_AARCH64"),
    "armv7l": ("arm", "SCMP_ARCH_ARM"),
    "riscv64": ("riscv64", "SCMP_ARCH_RISCV64"),
    "ppc64le": ("ppc64le", "SCMP_ARCH_PPC64LE"),
    "s390x": ("s390x", "SCMP_ARCH_S390X"),
}


_RELEASE = re.compile(r"([0-9]{1,9})\.([0-9]{1,9})", re.ASCII)
_HERE = platform.release()
_X32 = "SCMP_ARCH_X32"
_X32_PROBE = """
import ctypes, errno, sys
libc = ctypes.CDLL(None, use_errno=True)
result = libc.syscall(ctypes.c_long(0x40000000 | 39))  # getpid
sys.exit(0 if result < 0 and ctypes.get_errno() == errno.ENOSYS else 1)
"""
_PROBE_TIMEOUT_S = 5.0
"""Time limit in seconds for the test of x32.  If it takes longer, x32 counts as supported."""


@cache
def runs_x32() -> bool:
    """Return whether this kernel may run x32 calls, by trying one in a separate process.

    Only the error ENOSYS means no.  A seccomp filter around this process may kill the test, which says nothing about
    the kernel.
    """
    if platform.machine() != "x86_64":
        return False
    command = (sys.executable, "-I", "-S", "-c", _X32_PROBE)
    try:
        probe = subprocess.run(command, check=False, capture_output=True, timeout=_PROBE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return True
    return probe.returncode != 0


@cache
def default(capabilities: frozenset[str], *, has_x32: bool = True) -> msgspec.Raw:
    """Return the default profile as an encoded ``linux.seccomp``.

    ``has_x32`` tells whether the kernel may run x32 calls.

    The result is cached in its encoded form, because it is by far the largest part of a specification and almost always
    the same.
    """
    return _here(seccomp_default.profile(), capabilities, has_x32=has_x32)


def custom(
    profile: bytes, capabilities: Collection[str], *, has_x32: bool = True, release: str = _HERE
) -> msgspec.Raw:
    """Convert a profile in Docker's JSON to ``linux.seccomp``, without x32 unless ``has_x32``.

    ``release`` is the kernel's (``uname -r``).

    Raises: InvalidArgument: the profile is invalid.
    """
    try:
        return _here(msgspec.json.decode(profile), frozenset(capabilities), has_x32=has_x32, release=release)
    except (RecursionError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidArgument(f"Decoding seccomp profile failed: {error}") from error


def _here(
    profile: Mapping[str, Any], capabilities: frozenset[str], *, has_x32: bool, release: str = _HERE
) -> msgspec.Raw:
    """Evaluate a profile for this machine and kernel."""
    rules = for_runtime(profile, capabilities, machine=platform.machine(), kernel=kernel_version(release))
    if not has_x32:
        rules["architectures"] = [name for name in rules["architectures"] if name != _X32]
    return msgspec.Raw(msgspec.json.encode(rules))


def for_runtime(
    profile: Mapping[str, Any], capabilities: frozenset[str], *, machine: str, kernel: tuple[int, int]
) -> dict[str, Any]:
    """Return the rules of a profile that apply.

    For these, all conditions in ``includes`` hold and none in ``excludes``.

    Source: moby, profiles/seccomp/seccomp_linux.go (setupSeccomp).
    """
    architecture, name = _ARCHITECTURES.get(machine, (machine, ""))
    result: dict[str, Any] = {"defaultAction": profile["defaultAction"], "architectures": [], "syscalls": []}
    if profile.get("defaultErrnoRet") is not None:
        result["defaultErrnoRet"] = profile["defaultErrnoRet"]
    for entry in profile.get("archMap") or ():
        if entry["architecture"] == name:
            result["architectures"] = [name, *(entry.get("subArchitectures") or ())]
    if not profile.get("archMap"):
        result["architectures"] = list(profile.get("architectures") or ())
    for rule in profile.get("syscalls") or ():
        if _applies(rule, capabilities, architecture, kernel):
            result["syscalls"].append(_rule_for_runtime(rule))
    return result


def _applies(
    rule: Mapping[str, Any], capabilities: frozenset[str], architecture: str, kernel: tuple[int, int]
) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    if includes.get("arches") and architecture not in includes["arches"]:
        return False
    if architecture in (excludes.get("arches") or ()):
        return False
    if not capabilities.issuperset(includes.get("caps") or ()):
        return False
    if not capabilities.isdisjoint(excludes.get("caps") or ()):
        return False
    oldest, newest = includes.get("minKernel"), excludes.get("minKernel")
    if oldest and kernel < kernel_version(oldest):
        return False
    return not (newest and kernel >= kernel_version(newest))


def _rule_for_runtime(rule: Mapping[str, Any]) -> dict[str, Any]:
    converted: dict[str, Any] = {
        "names": rule.get("names") or [rule["name"]],
        "action": rule["action"],
    }
    if rule.get("args"):
        known = ("index", "value", "valueTwo", "op")
        converted["args"] = [{key: arg[key] for key in known if key in arg} for arg in rule["args"]]
    # runc refuses an error number if the action does not return one.
    if rule.get("errnoRet") is not None and rule["action"] in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"):
        converted["errnoRet"] = rule["errnoRet"]
    return converted


def kernel_version(release: str) -> tuple[int, int]:
    """Return the major and minor number of a kernel release (``uname -r``).  Raises: ValueError."""
    found = _RELEASE.match(release)  # for example 6.16+deb14-amd64
    if found is None:
        raise ValueError(f"not a kernel version: {release}")
    return int(found[1]), int(found[2])
