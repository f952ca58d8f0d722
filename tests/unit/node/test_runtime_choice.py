"""Which OCI runtime a node's containers get, and the reason that it gives."""

from pathlib import Path

import pytest

from skep.node.host.runtime_choice import InstalledRuntime, choose, crun_problem, look_up

GOOD = ""
HYBRID = crun_problem(is_cgroup_v2=False, may_raise_limits=True)
RUNC, CRUN = InstalledRuntime(program="runc"), InstalledRuntime(program="crun")
NO_CRUN = InstalledRuntime(program="crun", problem="crun is missing or cannot be run: apt-get install crun")
NO_RUNC = InstalledRuntime(program="runc", problem="runc is missing or cannot be run: apt-get install runc")
FLAWED_RUNC = InstalledRuntime(
    program="runc", warning="runc 1.1.5 has known container escapes (A): upgrade it"
)
FLAWED_CRUN = InstalledRuntime(
    program="crun", warning="crun 1.8.1 has known container escapes (B): upgrade it"
)


@pytest.mark.parametrize(
    ("runc", "crun", "problem", "default", "reason"),
    [
        (RUNC, CRUN, GOOD, "crun", "crun needs less processor time than runc"),
        (NO_RUNC, CRUN, GOOD, "crun", "crun needs less processor time than runc"),
        (FLAWED_RUNC, FLAWED_CRUN, GOOD, "crun", "crun needs less processor time than runc"),
        (RUNC, FLAWED_CRUN, GOOD, "runc", "crun 1.8.1 has known container escapes (B)"),
        (NO_RUNC, FLAWED_CRUN, GOOD, "crun", "crun needs less processor time than runc"),
        (RUNC, NO_CRUN, GOOD, "runc", "crun is missing or cannot be run"),
        (
            RUNC,
            CRUN,
            HYBRID,
            "runc",
            "crun does not support this machine's cgroup hierarchy, which is v1 or hybrid",
        ),
    ],
)
def test_crun_is_chosen_where_it_can_be_used(
    runc: InstalledRuntime, crun: InstalledRuntime, problem: str, default: str, reason: str
) -> None:
    choice = choose({"runc": runc, "crun": crun}, wanted="auto", crun_problem=problem)
    assert (choice.default, choice.reason, choice.problem) == (default, reason, "")
    expected = {name for name, one in (("runc", runc), ("crun", crun)) if not one.problem}
    assert set(choice.programs) == expected - ({"crun"} if problem else set())


def test_a_node_without_any_runtime_names_the_command_that_installs_one() -> None:
    choice = choose({"runc": NO_RUNC, "crun": CRUN}, wanted="auto", crun_problem=HYBRID)
    assert choice.problem == NO_RUNC.problem


@pytest.mark.parametrize(
    ("wanted", "crun", "problem", "expected"),
    [
        ("runc", CRUN, GOOD, ""),
        ("crun", CRUN, GOOD, ""),
        ("crun", NO_CRUN, GOOD, NO_CRUN.problem),
        ("crun", CRUN, HYBRID, HYBRID),
    ],
)
def test_a_configured_runtime_is_used_or_refused_with_advice(
    wanted: str, crun: InstalledRuntime, problem: str, expected: str
) -> None:
    choice = choose({"runc": RUNC, "crun": crun}, wanted=wanted, crun_problem=problem)
    assert (choice.default, choice.problem) == (wanted, expected)


def test_only_the_default_runtime_is_warned_of() -> None:
    installed = {"runc": FLAWED_RUNC, "crun": CRUN}
    assert choose(installed, wanted="auto", crun_problem=GOOD).warnings == ()
    assert choose(installed, wanted="runc", crun_problem=GOOD).warnings == (FLAWED_RUNC.warning,)


def test_crun_needs_cgroup_v2_and_its_limit_of_locked_memory() -> None:
    assert crun_problem(is_cgroup_v2=True, may_raise_limits=True) == ""
    assert "set --runtime runc" in HYBRID
    assert "CAP_SYS_RESOURCE" in crun_problem(is_cgroup_v2=True, may_raise_limits=False)


def test_versions_and_flaws_are_those_that_the_programs_print(tmp_path: Path) -> None:
    programs = {}
    for name, version in (("runc", "1.2.5"), ("crun", "1.5")):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho {name} version {version}\necho commit: none\n")
        program.chmod(0o755)
        programs[name] = str(program)
    found = look_up(programs)
    assert found["runc"].version == "1.2.5"
    assert found["runc"].warning.startswith("runc 1.2.5 has known container escapes (CVE-2025-31133, ")
    assert found["crun"].problem.startswith(
        "crun 1.5 is too old, skep needs 1.8.0 or newer: apt-get install crun"
    )
    missing = look_up({**programs, "crun": str(tmp_path / "none")})["crun"]
    assert missing.problem.endswith(
        "is missing or cannot be run: apt-get install crun, or name it with --crun"
    )
