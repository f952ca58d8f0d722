"""The same containers on a machine whose cgroups are pure v2, with both runtimes.

A mount namespace with cgroup2 over ``/sys/fs/cgroup`` is such a machine for the runtimes and for us; only the
controllers may be missing there (where v1 holds them), so limits are not asked for.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from skep.engine.confinement import capabilities

HERE = Path(__file__).parent
TESTS = (
    "test_container_life.py::test_another_stop_signal_is_used",
    "test_container_life.py::test_a_paused_container_stands_still_and_can_be_killed",
    "test_container_life.py::test_nothing_is_left_after_removal",
    "test_devices.py::test_a_named_device_opens_and_no_other_does",
    "test_devices.py::test_a_rule_opens_every_device_of_its_numbers",
    "test_devices.py::test_a_privileged_container_has_what_its_node_has",
    "test_cgroup_parents.py::test_a_container_has_its_group_where_it_was_asked_for[False]",
    "test_cgroup_parents.py::test_a_container_has_its_group_where_it_was_asked_for[True]",
    "test_survival_of_containers.py::test_a_restart_finds_running_containers_and_their_exit_code",
)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("runtime", ["runc", pytest.param("crun", marks=pytest.mark.slow)])
def test_containers_live_and_are_found_again_on_cgroup_v2(tmp_path: Path, runtime: str) -> None:
    if runtime == "crun" and "CAP_SYS_RESOURCE" not in capabilities.bounding_set():
        pytest.skip("crun cannot raise its limit of locked memory on this machine")
    is_v2 = '[ "$(stat -f -c %T /sys/fs/cgroup)" = cgroup2fs ]'
    on_v2 = f'mount --make-rprivate / && {{ {is_v2} || mount -t cgroup2 none /sys/fs/cgroup; }} && exec "$@"'
    pytest_here = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tmp_path}/inside",
    ]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", on_v2, "sh", *pytest_here, *(str(HERE / test) for test in TESTS)],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
        env={**os.environ, "PYTEST_ADDOPTS": "", "SKEP_TEST_RUNTIME": runtime},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"{len(TESTS)} passed" in done.stdout
