"""What an ordinary user needs for a node, and the command that runs it."""

from pathlib import Path
from typing import Any

import pytest

from skep.node.host.features import Features, warnings
from skep.node.host.rootless import (
    RootlessFacts,
    command,
    hide_machines_directories,
    may_make_namespaces,
    problems,
    profile_of,
    subordinate_ids,
)

WRITTEN = (
    r"""printf 'abi <abi/4.0>,\nprofile "/home/ada/bin/rootlesskit" flags=(unconfined) {\n  userns,\n}\n'"""
    " > /etc/apparmor.d/home.ada.bin.rootlesskit"
)
FIT: dict[str, Any] = {"user": "ada", "uid": 1000, "runtime_dir": "/run/user/1000"}


def said(**facts: Any) -> str:
    (problem,) = problems(RootlessFacts(**FIT | facts))
    return problem


def test_a_user_with_everything_starts() -> None:
    assert problems(RootlessFacts(**FIT)) == ()


@pytest.mark.parametrize(
    ("facts", "advice"),
    [
        (
            {"missing_programs": ("rootlesskit", "newuidmap", "newgidmap")},
            "apt-get install rootlesskit uidmap",
        ),
        (
            {"subuids": 0, "subgids": 1000, "free_id": 165536},
            "usermod --add-subuids 165536-231071 --add-subgids 165536-231071 ada",
        ),
        ({"subgids": 0}, "usermod --add-subgids 100000-165535 ada"),
        (
            {"settings": {"kernel.unprivileged_userns_clone": "0"}},
            "sysctl -w kernel.unprivileged_userns_clone=1",
        ),
        ({"settings": {"user.max_user_namespaces": "0"}}, "sysctl -w user.max_user_namespaces=28633"),
        (
            {
                "is_refused_by_apparmor": True,
                "apparmor_profile": Path("/etc/apparmor.d/rootlesskit"),
            },
            "apparmor_parser -r /etc/apparmor.d/rootlesskit, or for all programs, sysctl -w kernel.apparmor_restrict",
        ),
        (
            {"is_refused_by_apparmor": True, "rootlesskit": Path("/home/ada/bin/rootlesskit")},
            WRITTEN + " && apparmor_parser -r /etc/apparmor.d/home.ada.bin.rootlesskit",
        ),
        ({"kernel": (5, 10)}, "boot 5.11 or newer"),
        ({"has_tun": False}, "modprobe tun"),
        ({"may_open_tun": False}, "chmod 666 /dev/net/tun"),
        ({"runtime_dir": ""}, "loginctl enable-linger ada, then export XDG_RUNTIME_DIR=/run/user/1000"),
        ({"owns_runtime_dir": False}, "/run/user/1000 is not writable"),
        ({"uid": 0}, "leave it out"),
    ],
)
def test_each_missing_requirement_comes_with_a_command(facts: dict[str, Any], advice: str) -> None:
    assert advice in said(**facts)


def test_all_problems_are_named_at_once() -> None:
    assert len(problems(RootlessFacts(**FIT | {"subuids": 0, "has_tun": False, "runtime_dir": ""}))) == 3


def test_a_trial_that_fails_for_another_reason_is_not_put_down_to_apparmor() -> None:
    assert "AppArmor" not in said(is_refused_by_apparmor=True, subuids=0)


def test_a_profile_is_found_by_the_whole_path_of_its_program(tmp_path: Path) -> None:
    (tmp_path / "abi").mkdir()
    (tmp_path / "kit").write_text(
        "# /opt/rootlesskit {\nprofile kit /usr/bin/rootlesskit flags=(unconfined) {\n  userns,\n}\n"
    )
    (tmp_path / "own").write_text('profile "/home/ada/bin/rootlesskit" flags=(unconfined) {\n}\n')
    (tmp_path / "runc").write_text("profile runc /usr/sbin/runc { /usr/bin/slirp4netns ix, }\n")
    assert profile_of(Path("/usr/bin/rootlesskit"), tmp_path) == tmp_path / "kit"
    assert profile_of(Path("/home/ada/bin/rootlesskit"), tmp_path) == tmp_path / "own"
    for other in ("/opt/rootlesskit", "/bin/rootlesskit", "/usr/bin/rootless", "/usr/bin/slirp4netns"):
        assert profile_of(Path(other), tmp_path) is None
    assert profile_of(Path("/usr/bin/rootlesskit"), tmp_path / "none") is None


@pytest.mark.parametrize(("text", "may"), [("exit 0", True), ("exit 1", False), (None, True)])
def test_a_program_that_is_refused_its_namespaces_is_noticed(
    tmp_path: Path, text: str | None, may: bool
) -> None:
    program = tmp_path / "rootlesskit"
    if text is not None:
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    assert may_make_namespaces(program) is may


def test_a_trial_that_does_not_end_in_time_is_no_refusal(tmp_path: Path) -> None:
    program = tmp_path / "rootlesskit"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    assert may_make_namespaces(program, timeout_s=0.1)


def test_ranges_are_counted_by_name_and_by_number() -> None:
    text = "# comment\nada:100000:60000\nbob:200000:65536\n1000:300000:5536\nada:x:1\n"
    assert subordinate_ids(text, "ada", 1000) == 65536
    assert subordinate_ids(text, "eve", 1001) == 0


def test_processes_are_evacuated_only_from_a_delegated_group() -> None:
    state, daemon = Path("/run/user/1000/skep-rootless"), ("python", "-m", "skep.daemon", "--rootless")
    plain, delegated = (command(state, daemon, is_delegated=one) for one in (False, True))
    assert set(delegated) - set(plain) == {"--evacuate-cgroup2=skep-daemon"}
    assert plain[-len(daemon) :] == daemon
    assert "--disable-host-loopback" in plain


def test_directories_of_the_machines_own_engines_are_hidden(tmp_path: Path) -> None:
    for name in ("skep", "docker", "user"):
        (tmp_path / name).symlink_to("/elsewhere")
    hide_machines_directories(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["user"]
    (tmp_path / "skep").mkdir()
    hide_machines_directories(tmp_path)
    assert (tmp_path / "skep").is_dir(), "the node's own directory stays"


@pytest.mark.parametrize(
    ("version", "advice"), [(1, "boot the system in cgroup v2 mode"), (2, "Systemd is required")]
)
def test_a_node_without_control_groups_warns_as_rootless_docker_does(version: int, advice: str) -> None:
    features = Features(is_rootless=True, has_cgroups=False, cgroup_version=version)
    (warning,) = warnings(features)
    assert warning.startswith("WARNING: Running in rootless-mode without cgroups. ")
    assert advice in warning
