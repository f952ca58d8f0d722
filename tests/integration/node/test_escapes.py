"""Ways out of a container that Docker closes, tried in a container with the default confinement."""

import errno
import json
import platform
from pathlib import Path
from typing import Any

import pytest

from skep.engine.confinement import apparmor
from skep.engine.containers.container import ExecConfig, MountPoint
from skep.engine.engine import Engine
from skep.errors import SkepError
from tests.integration.node.conftest import Runner
from tests.support.engine.escapes import (
    CALLS,
    EPERM,
    EROFS,
    ESRCH,
    KEYRING,
    SPOIL_GROUPS,
    TRACE,
    TRY_CALLS,
    TRY_FILES,
    WRITE_TO_ETC,
    is_as_it_was,
    lead_etc_out,
    spoil_users,
)
from tests.support.engine.runc_lab import RUNTIME, Lab

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="calls have other numbers")

PYTHON = tuple(
    MountPoint(type="bind", source=path, destination=path, read_only=True)
    for path in ("/usr", "/lib", "/lib64")
)
"""The interpreter of the node, for images that have none."""


async def python(run: Runner, script: str, *arguments: str, **config: Any) -> Any:
    """What ``script`` prints, as JSON, in a container of its own."""
    text = await run.output("/usr/bin/python3", "-ISc", script, *arguments, mounts=PYTHON, **config)
    try:
        return json.loads(text)
    except ValueError:
        raise AssertionError(text) from None


async def test_calls_that_open_the_kernel_are_refused(run: Runner) -> None:
    asked = json.dumps({name: (number, arguments) for name, (number, arguments, _) in CALLS.items()})
    expected = {name: error for name, (_, _, error) in CALLS.items()}
    if RUNTIME == "crun":
        expected["an unknown call"] = EPERM  # only runc adds ENOSYS to the filter (decision 185)
    assert await python(run, TRY_CALLS, asked) == expected
    # Nor are they for a user, or for root without its capabilities.
    assert await python(run, TRY_CALLS, asked, user="1000:1000") == expected
    assert await python(run, TRY_CALLS, asked, capability_drop=("ALL",)) == expected


async def test_what_belongs_to_the_machine_is_not_read_or_written(run: Runner) -> None:
    found = await python(run, TRY_FILES)
    # What no read-only mount keeps from being opened, AppArmor does.
    assert found["writes"].pop("/proc/uptime") == (errno.EACCES if apparmor.is_supported() else "written")
    assert set(found["writes"].values()) <= {EROFS, errno.ENOENT}
    assert found["writes"]["/proc/sys/kernel/core_pattern"] == EROFS
    # (Not every kernel has the key.)
    assert Path("/proc/sysrq-trigger").exists() is (found["writes"]["/proc/sysrq-trigger"] == EROFS)
    assert set(found["reads"].values()) <= {"nothing", errno.ENOENT, errno.EACCES}
    assert all(entries == [] for entries in found["hidden"].values())
    assert found["cgroups"] == [str(EROFS)]
    # A device may be made, as in Docker, and is of no use: its cgroup does not have it.
    assert found["disk"] == found["memory"] == found["kmsg"] == ["made", EPERM]
    assert found["null"] == ["made", "opened"]
    assert found["others"] == ["1"]


async def test_processes_of_others_are_not_there(run: Runner, engine: Engine) -> None:
    victim = await run.start("sleep", "100")
    # A vector of no entries reads nothing, of any process.
    assert await python(run, TRACE, str(victim.pid)) == {"attach": ESRCH, "kill": ESRCH, "read": 0} | {
        "read": "done"
    }
    assert Path(f"/proc/{victim.pid}").exists()
    await engine.remove(victim.id, force=True)


async def test_each_container_has_a_session_keyring_of_its_own(run: Runner, engine: Engine) -> None:
    """Without seccomp, whose profile forbids ``keyctl`` to every process."""
    first = await python(run, KEYRING, seccomp="unconfined")
    second = await python(run, KEYRING, seccomp="unconfined")
    assert first["key"] > 0, first
    assert len({first["session"], second["session"]}) == 2
    import ctypes

    own = ctypes.CDLL(None).syscall(ctypes.c_long(250), 0, ctypes.c_long(-3), 0)
    assert own not in (first["session"], second["session"])


async def test_an_image_leads_nothing_of_the_node_into_its_etc(tmp_path: Path, lab: Lab, run: Runner) -> None:
    """/etc is a link out of the image: hosts and its like are mounted inside, or the container is refused."""
    outside = tmp_path / "outside"
    lead_etc_out(lab.tree, outside)
    try:
        output = await run.output(*WRITE_TO_ETC)
    except SkepError:
        output = ""
    assert is_as_it_was(outside)
    assert "of the machine" not in output


async def test_an_absurd_passwd_is_passed_over(lab: Lab, run: Runner, engine: Engine) -> None:
    """In the image, and written by the container before an exec."""
    spoil_users(lab.tree)
    assert "uid=1000(alice)" in await run.output("id", user="alice")
    container = await run.start("sh", "-c", f"{SPOIL_GROUPS}; sleep 100")
    code = await engine.execs.wait(await _exec(engine, container.id, "id"))
    assert code.exit_code == 0
    await engine.remove(container.id, force=True)


async def _exec(engine: Engine, id: str, *command: str) -> str:
    exec_id = engine.execs.create(id, ExecConfig(command=command))
    (await engine.execs.start(exec_id)).close()
    return exec_id
