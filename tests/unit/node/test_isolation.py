"""What a node says of the programs that confine its containers."""

import asyncio
from pathlib import Path

import pytest

from skep.aio.clock import SystemClock
from skep.engine.confinement import apparmor
from skep.node.host.conditions import Conditions
from skep.node.host.isolation import check_isolation, keep_profile
from tests.support.engine.oci_rig import QuickClock


def a_runc(directory: Path, version: str) -> str:
    program = directory / "runc"
    program.write_text(f"#!/bin/sh\necho runc version {version}\necho commit: none\n")
    program.chmod(0o755)
    return str(program)


def test_a_runc_with_known_ways_out_is_warned_of(tmp_path: Path) -> None:
    conditions = Conditions(SystemClock())
    (warning,) = check_isolation(a_runc(tmp_path, "1.2.5"), conditions)
    assert warning.startswith("runc 1.2.5 has known container escapes (CVE-2025-31133, ")
    assert check_isolation(a_runc(tmp_path, "1.4.2"), conditions) == ()
    assert check_isolation(str(tmp_path / "none"), conditions) == ()
    assert conditions.present() == {}


def test_a_profile_that_cannot_be_loaded_is_a_condition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditions = Conditions(SystemClock())
    monkeypatch.setattr(apparmor, "problem", lambda: "AppArmor enabled on system but ...")
    assert check_isolation(a_runc(tmp_path, "1.4.2"), conditions) == ()
    assert conditions.present() == {"apparmor": "AppArmor enabled on system but ..."}


async def test_the_condition_ends_when_the_profile_is_loaded_and_begins_when_it_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    conditions, problems = Conditions(SystemClock()), [""]
    monkeypatch.setattr(apparmor, "problem", lambda: problems[-1])
    looking = asyncio.create_task(keep_profile(conditions, QuickClock()))
    for problem in ("could not be loaded", "", "lost"):
        problems.append(problem)
        async with asyncio.timeout(30):
            while conditions.present() != ({"apparmor": problem} if problem else {}):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    looking.cancel()
