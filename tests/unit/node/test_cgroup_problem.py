"""What keeps runc from making cgroups is found before a daemon starts."""

from pathlib import Path

import pytest

from skep.node.host.requirements import cgroup_problem


@pytest.mark.parametrize("name", ["", "missing"])
def test_a_place_where_no_hierarchy_is_mounted_is_named_with_what_to_do(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    assert cgroup_problem(place) == (
        f"no cgroup hierarchy is mounted at {place}, so no container can start: mount -t cgroup2 none {place}"
    )


@pytest.mark.needs("root")
def test_a_machine_that_runs_containers_has_what_they_need() -> None:
    assert cgroup_problem() == ""
