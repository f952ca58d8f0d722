"""The default seccomp profile gives Docker's verdicts: each call, argument, capability, kernel and architecture."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.engine.confinement import capabilities, seccomp, seccomp_default

# SHA-256 of the verdicts of moby/profiles' seccomp/default.json (v0.2.3) as ``verdicts`` lists them, worked out from
# that file by an evaluation of its own, after moby's seccomp_linux.go.
DIGESTS = {
    "x86_64": "85a560ce8901ebf6432707506551780e51cffbf9cb1bb1f82e103c57937371bd",
    "aarch64": "c508334a40799a73d0434b602fc2a9ad23535ee66287f9bd40dc7e5a31722d90",
    "s390x": "269463d589cc514ca6164224770c229c75c2b63fdddca66afac98f1952356a6a",
    "riscv64": "5c169896819937d8ce36970eb9f9e83943c0f16d7db44cf5bae9b763969e501e",
    "ppc64le": "5db6c6156a728579ab8c5676945ad138823342d73d1d8b03bbddffbc15321418",
    "armv7l": "17ed83c25ffeb428b691ae5f4ef9eecacf99b464db0428dc8f75386cb654d018",
}
KERNELS = ((4, 7), (6, 1))
"""Before and after the one version that the profile names."""
FIRST = sorted({0, 1, 8, 37, 38, 39, 40, 41, 0x20000, 0x20001, 0x20008, 0xFFFFFFFF, 0x7E020000})
ARGUMENTS = [
    (first, second)
    for first in sorted({*FIRST, *(1 << n for n in range(33))})
    for second in (0, 1 << 17, 1 << 28)
]
REFUSED = "errno 1"


def holds(condition: Mapping[str, Any], arguments: tuple[int, int]) -> bool:
    value, wanted = arguments[condition["index"]], condition["value"]
    match condition["op"]:
        case "SCMP_CMP_EQ":
            return bool(value == wanted)
        case "SCMP_CMP_LT":
            return bool(value < wanted)
        case "SCMP_CMP_GT":
            return bool(value > wanted)
        case "SCMP_CMP_MASKED_EQ":
            return bool(value & wanted == condition.get("valueTwo", 0))
        case unknown:
            raise AssertionError(unknown)


def verdict(rules: Iterable[Mapping[str, Any]], arguments: tuple[int, int] = (0, 0)) -> str:
    """Of the ``rules`` for one call."""
    found = {
        "allow" if rule["action"] == "SCMP_ACT_ALLOW" else f"errno {rule.get('errnoRet', 1)}"
        for rule in rules
        if all(holds(one, arguments) for one in rule.get("args", ()))
    }
    return "allow" if "allow" in found else min(found, default=REFUSED)


def by_name(profile: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for rule in profile["syscalls"]:
        for name in rule["names"]:
            found.setdefault(name, []).append(rule)
    return found


def verdicts(machine: str) -> Iterator[str]:
    """A line for each call that is not simply refused, under no, Docker's, all and each single capability."""
    single = [[name] for name in capabilities.ALL]
    for kernel in KERNELS:
        for given_ in ([], list(capabilities.DEFAULT), list(capabilities.ALL), *single):
            profile = seccomp.for_runtime(
                seccomp_default.profile(), frozenset(given_), machine=machine, kernel=kernel
            )
            yield (
                f"{kernel} {sorted(given_)} {profile['architectures']} {profile['defaultAction']}"
                f" {profile['defaultErrnoRet']}"
            )
            for name, rules in sorted(by_name(profile).items()):
                is_conditional = any(rule.get("args") for rule in rules)
                responses = [verdict(rules, one) for one in (ARGUMENTS if is_conditional else [(0, 0)])]
                if set(responses) != {REFUSED}:
                    yield f"{name} {'|'.join(responses)}"


@pytest.mark.parametrize("machine", sorted(DIGESTS))
def test_every_verdict_is_dockers(machine: str) -> None:
    assert hashlib.sha256("\n".join(verdicts(machine)).encode()).hexdigest() == DIGESTS[machine]


def default(given: Sequence[str] = capabilities.DEFAULT) -> dict[str, list[Mapping[str, Any]]]:
    profile = seccomp.for_runtime(
        seccomp_default.profile(), frozenset(given), machine="x86_64", kernel=(6, 1)
    )
    return by_name(profile)


def test_what_opened_the_hosts_kernel_is_refused() -> None:
    calls = default()
    closed = (
        *(
            "unshare",
            "setns",
            "mount",
            "umount2",
            "pivot_root",
            "fsopen",
            "fsmount",
            "move_mount",
            "open_tree",
        ),
        *("keyctl", "add_key", "request_key", "pidfd_getfd", "set_mempolicy", "reboot", "syslog", "bpf"),
        *("userfaultfd", "io_uring_setup", "open_by_handle_at", "kexec_load", "init_module", "swapon"),
    )
    assert {name: verdict(calls.get(name, ())) for name in closed} == dict.fromkeys(closed, REFUSED)
    assert verdict(calls["clone3"]) == "errno 38"  # so that C libraries use clone
    assert [verdict(calls["socket"], (family, 0)) for family in (1, 2, 38, 39, 40, 41)] == [
        *("allow", "allow", REFUSED, "allow", REFUSED, "allow")
    ]


@given(flags=st.integers(0, 2**32 - 1))
def test_a_clone_makes_no_namespace(flags: int) -> None:
    new = any(flags >> bit & 1 for bit in (17, 25, 26, 27, 28, 29, 30))
    assert verdict(default()["clone"], (flags, 0)) == (REFUSED if new else "allow")
    assert verdict(default([*capabilities.DEFAULT, "CAP_SYS_ADMIN"])["clone"], (flags, 0)) == "allow"


@given(st.sets(st.sampled_from(capabilities.ALL)), st.sampled_from(sorted(DIGESTS)))
def test_no_capability_takes_anything_away_but_the_word_that_there_is_no_clone3(
    given_: set[str], machine: str
) -> None:
    def allowed(names: frozenset[str]) -> set[tuple[str, tuple[int, int]]]:
        profile = seccomp.for_runtime(seccomp_default.profile(), names, machine=machine, kernel=(6, 1))
        return {
            (name, arguments)
            for name, rules in by_name(profile).items()
            for arguments in ((0, 0), (1 << 28, 1 << 28))
            if verdict(rules, arguments) == "allow"
        }

    assert allowed(frozenset()) <= allowed(frozenset(given_)) <= allowed(frozenset(capabilities.ALL))


def test_it_is_what_a_container_gets() -> None:
    encoded = msgspec.json.decode(seccomp.default(frozenset(capabilities.DEFAULT)))
    assert encoded["defaultErrnoRet"] == 1
    assert verdict(by_name(encoded).get("unshare", ())) == REFUSED
