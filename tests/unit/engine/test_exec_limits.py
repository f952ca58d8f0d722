"""An exec has the soft limit of open files of its container, whenever runc has set it."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from skep.engine.containers.exec_limits import held, open_files_of
from tests.support.machines.playground_rig import wait_until

OPEN_FILES = {"type": "RLIMIT_NOFILE", "soft": 200, "hard": 300}
CHILD = """
import ctypes, sys, time
libc = ctypes.CDLL(None)
libc.prctl(15, sys.argv[1].encode())
print("named", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("rlimits", "wanted"),
    [
        ([OPEN_FILES], (200, 300)),
        ([{"type": "RLIMIT_NPROC", "soft": 1, "hard": 2}, OPEN_FILES], (200, 300)),
        ([OPEN_FILES | {"soft": 300}], None),
        ([], None),
        (None, None),
    ],
)
def test_only_limits_that_differ_can_be_lost(
    rlimits: list[dict] | None, wanted: tuple[int, int] | None
) -> None:
    assert open_files_of({"rlimits": rlimits}) == wanted


def test_the_limit_of_runcs_child_is_set_again_and_that_of_no_other_process(tmp_path: Path) -> None:
    (tmp_path / "process.json").write_text(json.dumps({"rlimits": [OPEN_FILES]}))
    names = ("runc:[2:INIT]", "sh", "runc:[2:INIT]")
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, name], stdout=subprocess.PIPE) for name in names
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == b"named\n"
            resource.prlimit(child.pid, resource.RLIMIT_NOFILE, (300, 300))
        init, other, earlier = (child.pid for child in children)
        pids = [earlier]
        with held(tmp_path / "process.json", lambda: frozenset(pids)):
            pids += [init, other]
            wait_until(lambda: resource.prlimit(init, resource.RLIMIT_NOFILE) == (200, 300), "set again")
            resource.prlimit(init, resource.RLIMIT_NOFILE, (300, 300))  # as its Go runtime does
            wait_until(lambda: resource.prlimit(init, resource.RLIMIT_NOFILE) == (200, 300), "set once more")
        limits = [resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in (other, earlier)]
        assert limits == [(300, 300), (300, 300)]
    finally:
        for child in children:
            child.kill()
            child.wait()
