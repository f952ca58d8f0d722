"""Docker's AppArmor profile in force, on a kernel that has AppArmor (``make virtual`` boots one)."""

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from skep.agent.executor.oci import OciExecutor
from skep.engine.api.responses.container_responses import inspected
from skep.engine.confinement import apparmor
from skep.engine.containers.container import ExecConfig
from skep.engine.engine import Engine
from skep.errors import SkepError
from tests.integration.node.conftest import Runner
from tests.integration.node.test_escapes import python

pytestmark = pytest.mark.skipif(
    not apparmor.is_supported(), reason="this kernel has no AppArmor, or it is off: docs/untested.md"
)

OWN_PROFILE = "skep-test-no-tmp"
"""A profile of this test's: everything but files below /tmp."""

_TRY = """
import ctypes, json, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def tried(act):
    try:
        act()
    except OSError as error:
        return error.errno
    return "done"
def opened(path, mode):
    return tried(lambda: os.close(os.open(path, mode)))
def mounted(*words):
    ctypes.set_errno(0)
    return "done" if libc.mount(*words) == 0 else ctypes.get_errno()
print(json.dumps({
    "profile": open("/proc/self/attr/current").read().strip(),
    "new mount": mounted(b"x", b"/etc", b"tmpfs", 0, None),
    "bind": mounted(b"/proc/sys", b"/etc", None, 4096, None),
    "remount": mounted(None, b"/proc/sys", None, 4096 | 32, None),
    "write below /proc": opened("/proc/uptime", os.O_WRONLY),
    "write core_pattern": opened("/proc/sys/kernel/core_pattern", os.O_WRONLY),
    "read kcore": opened("/proc/kcore", os.O_RDONLY),
    "crypto socket": tried(lambda: socket.socket(38, socket.SOCK_SEQPACKET, 0).close()),
    "write below /tmp": opened("/tmp/file", os.O_WRONLY | os.O_CREAT),
}))
"""
REFUSED = errno.EACCES
"""AppArmor's answer; a seccomp filter gives EPERM, a mount that is read-only EROFS."""


@pytest.fixture
def own_profile() -> Iterator[str]:
    allowed = "".join(
        f"  {what},\n" for what in ("network", "capability", "file", "mount", "umount", "signal")
    )
    text = f"profile {OWN_PROFILE} flags=(attach_disconnected) {{\n{allowed}  deny /tmp/** w,\n}}\n"
    _parser("-Kr", text)
    yield OWN_PROFILE
    _parser("-R", text)


def _parser(option: str, text: str) -> None:
    subprocess.run(("apparmor_parser", option), input=text, text=True, check=True, timeout=60)


def unload_default() -> None:
    """Who starts the next container loads its own."""
    if apparmor.DEFAULT_PROFILE in loaded():
        _parser("-R", apparmor.profile_text(apparmor.DEFAULT_PROFILE))


def loaded() -> dict[str, str]:
    """The kernel's profiles and their modes."""
    lines = Path("/sys/kernel/security/apparmor/profiles").read_text().splitlines()
    return {name: mode.rstrip(")") for name, _, mode in (line.rpartition(" (") for line in lines)}


async def shown(run: Runner, executor: OciExecutor, **config: str) -> str:
    """What ``docker inspect`` says of a container."""
    container = await run.create("true", **config)
    response = inspected(container, executor.engine.bundles, (), {})
    await executor.engine.remove(container.id)
    return str(response["AppArmorProfile"])


async def test_the_default_profile_is_in_force(run: Runner, executor: OciExecutor) -> None:
    found = await python(run, _TRY)
    assert found["profile"] == "docker-default (enforce)"
    assert loaded()["docker-default"] == "enforce"
    assert found["write below /proc"] == found["read kcore"] == REFUSED
    assert found["write below /tmp"] == "done"
    assert await shown(run, executor) == "docker-default"


async def test_what_a_capability_would_allow_is_refused_by_the_profile(run: Runner) -> None:
    """CAP_SYS_ADMIN opens the seccomp filter for mounts; nothing but AppArmor is left then."""
    found = await python(run, _TRY, capability_add=("SYS_ADMIN",))
    assert found["new mount"] == found["bind"] == found["remount"] == REFUSED
    assert found["write core_pattern"] == errno.EROFS  # and stays, without the mount
    found = await python(run, _TRY, capability_add=("ALL",), seccomp="unconfined")
    assert found["new mount"] == found["remount"] == found["crypto socket"] == REFUSED
    assert found["write below /proc"] == found["read kcore"] == REFUSED


async def test_unconfined_is_respected(run: Runner, executor: OciExecutor) -> None:
    found = await python(run, _TRY, capability_add=("SYS_ADMIN",), apparmor="unconfined")
    assert found["profile"] == "unconfined"
    assert found["new mount"] == found["bind"] == found["write below /proc"] == "done"
    assert await shown(run, executor, apparmor="unconfined") == "unconfined"


async def test_a_profile_of_the_users_confines(run: Runner, own_profile: str) -> None:
    found = await python(run, _TRY, apparmor=own_profile)
    assert found["profile"] == f"{own_profile} (enforce)"
    assert found["write below /tmp"] == REFUSED
    assert found["write below /proc"] == "done"
    with pytest.raises(SkepError, match="apparmor"):
        await run.start("true", apparmor="skep-test-never-loaded")


async def test_execs_are_confined_too(run: Runner, engine: Engine) -> None:
    container = await run.start("sleep", "100")
    command = ("sh", "-c", "cat /proc/self/attr/current && ! true > /proc/uptime")
    exec_id = engine.execs.create(container.id, ExecConfig(command=command))
    (await engine.execs.start(exec_id)).close()
    assert (await engine.execs.wait(exec_id)).exit_code == 0
    await engine.remove(container.id, force=True)


async def test_a_profile_that_was_unloaded_confines_the_next_container(run: Runner) -> None:
    """As an upgrade of AppArmor does it."""
    unload_default()
    assert apparmor.DEFAULT_PROFILE not in loaded()
    assert (await python(run, _TRY))["profile"] == "docker-default (enforce)"
