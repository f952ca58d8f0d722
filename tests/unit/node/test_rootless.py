"""What an ordinary user needs for a node, and the command that runs it."""

from pathlib import Path
from typing import Any

import pytest

from skep.node.host.features import Features, warnings
from skep.node.host.rootless import (
    RootlessFacts,
    command,
    hide_machines_directories,
    problems,
    subordinate_ids,
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
                "settings": {"kernel.apparmor_restrict_unprivileged_userns": "1"},
                "has_apparmor_profile": False,
            },
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
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


def test_a_restricting_apparmor_with_a_profile_of_rootlesskit_is_no_problem() -> None:
    settings = {"kernel.apparmor_restrict_unprivileged_userns": "1", "user.max_user_namespaces": "28633"}
    assert problems(RootlessFacts(**FIT | {"settings": settings})) == ()


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
