"""The default seccomp profile, in the form runc takes, for a set of capabilities.

The distribution ships Docker's profile (Debian: golang-github-containers-common) with conditions: which
capabilities, architectures and kernels a rule is for.  ``for_runtime`` evaluates them.
"""

import platform
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from skep.errors import InvalidArgument, Unavailable

PROFILE = Path("/usr/share/containers/seccomp.json")

_ARCHITECTURES = {
    "x86_64": ("amd64", "SCMP_ARCH_X86_64"),
    "aarch64": ("arm64", "SCMP_ARCH_AARCH64"),
    "armv7l": ("arm", "SCMP_ARCH_ARM"),
    "riscv64": ("riscv64", "SCMP_ARCH_RISCV64"),
    "ppc64le": ("ppc64le", "SCMP_ARCH_PPC64LE"),
    "s390x": ("s390x", "SCMP_ARCH_S390X"),
}


@cache
def default(capabilities: frozenset[str]) -> msgspec.Raw:
    """``linux.seccomp`` with the distribution's profile, encoded.

    Encoded because it is by far the largest part of a specification and the same for nearly every container.
    Raises: Unavailable: the profile is not installed.
    """
    try:
        text = PROFILE.read_bytes()
    except OSError as error:
        raise Unavailable(
            f"cannot read the seccomp profile {PROFILE}: {error.strerror};"
            " install golang-github-containers-common"
        ) from error
    return custom(text, capabilities)


def custom(profile: bytes, capabilities: Collection[str]) -> msgspec.Raw:
    """``linux.seccomp`` from a profile in Docker's JSON.  Raises: InvalidArgument: it is none."""
    try:
        decoded = msgspec.json.decode(profile)
        rules = for_runtime(
            decoded,
            frozenset(capabilities),
            machine=platform.machine(),
            kernel=_kernel_version(platform.release()),
        )
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidArgument(f"Decoding seccomp profile failed: {error}") from error
    return msgspec.Raw(msgspec.json.encode(rules))


def for_runtime(
    profile: Mapping[str, Any], capabilities: frozenset[str], *, machine: str, kernel: tuple[int, int]
) -> dict[str, Any]:
    """The profile with its conditions evaluated: all of ``includes`` hold, none of ``excludes``.

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
    if oldest and kernel < _kernel_version(oldest):
        return False
    return not (newest and kernel >= _kernel_version(newest))


def _rule_for_runtime(rule: Mapping[str, Any]) -> dict[str, Any]:
    converted: dict[str, Any] = {
        "names": rule.get("names") or [rule["name"]],
        "action": rule["action"],
    }
    if rule.get("args"):
        known = ("index", "value", "valueTwo", "op")
        converted["args"] = [{key: arg[key] for key in known if key in arg} for arg in rule["args"]]
    # runc refuses an error number beside an action that returns none.
    if rule.get("errnoRet") is not None and rule["action"] in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"):
        converted["errnoRet"] = rule["errnoRet"]
    return converted


def _kernel_version(release: str) -> tuple[int, int]:
    major, minor = release.split("-", 1)[0].split(".")[:2]
    return int(major), int(minor)
