"""What leaving out an architecture of the seccomp profile changes, asked of the filter that libseccomp makes."""

import ctypes
import os
import platform
import struct
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from skep.engine.confinement import capabilities, seccomp

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86_64 has x32")

X86_64, X86 = 0xC000003E, 0x40000003
"""AUDIT_ARCH of the kernel; libseccomp names these two the same."""
X32_BIT = 0x40000000
KILL, ERRNO, ALLOW = 0x00000000, 0x00050000, 0x7FFF0000
CALLS = range(600)
ARGUMENTS = (0, 8, 0x20000, 0x20008, 0xFFFFFFFF, 0x7E020000, 37, 38, 39, 40, 41)
"""First arguments that rules of the profile look at (personality, clone, socket), and others."""
_COMPARED = {"SCMP_CMP_LT": 2, "SCMP_CMP_EQ": 4, "SCMP_CMP_GT": 6, "SCMP_CMP_MASKED_EQ": 7}


class _Comparison(ctypes.Structure):
    _fields_ = [
        ("argument", ctypes.c_uint),
        ("operation", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    ]


def a_filter(profile: Mapping[str, Any]) -> list[tuple[int, int, int, int]]:
    """The instructions (code, jump if true, jump if false, k) that runc would hand to the kernel."""
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(
        library.seccomp_init(ctypes.c_uint32(ERRNO | profile.get("defaultErrnoRet", 1)))
    )
    for name in profile["architectures"]:
        token = library.seccomp_arch_resolve_name(name.removeprefix("SCMP_ARCH_").lower().encode())
        assert library.seccomp_arch_add(context, ctypes.c_uint32(token)) in (0, -17)  # -17: the native one
    for rule in profile["syscalls"]:
        action = ALLOW if rule["action"] == "SCMP_ACT_ALLOW" else ERRNO | rule.get("errnoRet", 1)
        comparisons = [
            _Comparison(one["index"], _COMPARED[one["op"]], one["value"], one.get("valueTwo", 0))
            for one in rule.get("args", ())
        ]
        array = (_Comparison * len(comparisons))(*comparisons)
        for name in rule["names"]:
            number = library.seccomp_syscall_resolve_name(name.encode())
            added = library.seccomp_rule_add_array(
                context, ctypes.c_uint32(action), number, len(comparisons), array
            )
            assert added in (0, -22, -33), name  # unknown here, as runc leaves it out
    exported = os.memfd_create("filter")
    try:
        assert library.seccomp_export_bpf(context, exported) == 0
        os.lseek(exported, 0, os.SEEK_SET)
        code = os.read(exported, 1 << 20)
    finally:
        os.close(exported)
        library.seccomp_release(context)
    return list(struct.iter_unpack("=HBBI", code))


def answer(program: list[tuple[int, int, int, int]], architecture: int, call: int, argument: int) -> int:
    """What the filter answers: a run of the classic BPF instructions that libseccomp uses."""
    data = struct.pack("=IIQ6Q", call, architecture, 0, argument, *(0,) * 5)
    at = accumulator = 0
    while True:
        code, if_true, if_false, k = program[at]
        at += 1
        match code:
            case 0x20:
                accumulator = int.from_bytes(data[k : k + 4], "little")
            case 0x54:
                accumulator &= k
            case 0x05:
                at += k
            case 0x15:
                at += if_true if accumulator == k else if_false
            case 0x25:
                at += if_true if accumulator > k else if_false
            case 0x35:
                at += if_true if accumulator >= k else if_false
            case 0x06:
                return k
            case _:
                raise AssertionError(f"instruction {code:#x}")


@pytest.fixture(scope="module")
def filters() -> tuple[list[tuple[int, int, int, int]], list[tuple[int, int, int, int]]]:
    """Of the whole default profile, and of the one for kernels without x32."""
    granted = frozenset(capabilities.DEFAULT)
    whole, narrow = (seccomp.default(granted, has_x32=has_x32) for has_x32 in (True, False))
    return a_filter(msgspec.json.decode(whole)), a_filter(msgspec.json.decode(narrow))


@pytest.mark.parametrize("architecture", [X86_64, X86])
def test_without_x32_the_filter_answers_every_call_of_the_other_architectures_as_before(
    filters: tuple[list[tuple[int, int, int, int]], list[tuple[int, int, int, int]]], architecture: int
) -> None:
    whole, narrow = filters
    asked = [(call, argument) for call in CALLS for argument in ARGUMENTS]
    before = [answer(whole, architecture, *one) for one in asked]
    assert [answer(narrow, architecture, *one) for one in asked] == before
    assert {ALLOW, ERRNO | 1} < set(before)  # the comparison is of real filters


def test_without_x32_no_x32_call_is_allowed(
    filters: tuple[list[tuple[int, int, int, int]], list[tuple[int, int, int, int]]],
) -> None:
    whole, narrow = filters
    asked = [(X32_BIT | call, argument) for call in CALLS for argument in ARGUMENTS]
    assert ALLOW in {answer(whole, X86_64, *one) for one in asked}
    assert {answer(narrow, X86_64, *one) for one in asked} == {KILL}


def test_without_x32_the_filter_is_much_shorter(
    filters: tuple[list[tuple[int, int, int, int]], list[tuple[int, int, int, int]]],
) -> None:
    whole, narrow = filters
    assert len(narrow) < 0.75 * len(whole)
