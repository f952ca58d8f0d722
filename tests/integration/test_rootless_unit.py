"""The systemd unit of a user's node, in a virtual machine that systemd has booted: ``SYSTEMD=1 make virtual``.

It follows docs/guide/rootless.md on the machine itself: it changes units, and opens root's home directory.
"""

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from skep.playground.images.busybox import busybox_archive
from tests.support.machines.daemon_rig import wait_until
from tests.support.machines.rootless_user import RootlessNode, a_rootless_node

_ROOT = Path(__file__).parents[2]
_UNITS = Path("/etc/systemd/user")
_DELEGATION = Path("/etc/systemd/system/user@.service.d/delegate.conf")
_PATIENT = _UNITS / "skep.service.d" / "patient.conf"
_COMMAND = Path("/usr/local/bin/skep")
_USER = "skep-test-user"
_IMAGE = "busybox:1"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.environ.get("SKEP_VIRTUAL") != "1" or not Path("/run/systemd/system").is_dir(),
        reason="it changes systemd's units of the machine, so it needs one that systemd booted: docs/untested.md",
    ),
]


def root(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=120)


def systemctl(*words: str, check: bool = True) -> str:
    """Run ``systemctl --user`` as the user, and return its output."""
    uid = pwd.getpwnam(_USER).pw_uid
    command = [
        "setpriv",
        "--reuid",
        _USER,
        "--regid",
        _USER,
        "--init-groups",
        "env",
        f"XDG_RUNTIME_DIR=/run/user/{uid}",
    ]
    done = subprocess.run(
        [*command, "systemctl", "--user", *words], capture_output=True, text=True, timeout=660, check=False
    )
    assert not check or done.returncode == 0, done.stderr + journal()
    return done.stdout.strip()


def journal() -> str:
    command = ("journalctl", "--no-pager", "--lines", "60", f"_UID={pwd.getpwnam(_USER).pw_uid}")
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout


@pytest.fixture
def node() -> Iterator[RootlessNode]:
    """Install the unit as the Debian package does, and delegate control groups as the guide does."""
    _DELEGATION.parent.mkdir(parents=True, exist_ok=True)
    _DELEGATION.write_text("[Service]\nDelegate=cpu cpuset io memory pids\n")
    root("systemctl", "daemon-reload")
    _UNITS.mkdir(exist_ok=True)
    shutil.copy(_ROOT / "packaging" / "skep-rootless.service", _UNITS / "skep.service")
    _PATIENT.parent.mkdir(exist_ok=True)
    _PATIENT.write_text("[Service]\nTimeoutStartSec=600\n")  # the processor is emulated
    _COMMAND.symlink_to(Path(sys.executable).with_name("skep"))
    mode = Path.home().stat().st_mode & 0o777
    Path.home().chmod(0o711)
    try:
        with a_rootless_node(_USER) as node:
            node.runtime_dir = Path("/run/user", str(pwd.getpwnam(_USER).pw_uid))
            node.socket = f"unix://{node.runtime_dir / 'skep.sock'}"
            root("loginctl", "enable-linger", _USER)
            wait_until((node.runtime_dir / "systemd" / "private").exists, "the user's systemd runs", 600)
            try:
                yield node
            finally:
                systemctl("stop", "skep", check=False)
                root("loginctl", "disable-linger", _USER)
                wait_until(lambda: not node.pids(), "all processes of the user have ended", 600)
    finally:
        Path.home().chmod(mode)
        for made in (_COMMAND, _UNITS / "skep.service", _PATIENT, _DELEGATION):
            made.unlink()


def containers() -> list[str]:
    """Return the pids of the containers of this test, whatever their users are."""
    command = ("pgrep", "-f", "sleep 1000000")
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.split()


def is_running(node: RootlessNode, name: str) -> bool:
    return node.docker("inspect", "--format", "{{.State.Status}}", name, check=False).stdout == "running\n"


async def test_the_unit_serves_sets_limits_and_comes_back_after_a_crash(node: RootlessNode) -> None:
    systemctl("enable", "--now", "skep")
    loaded = Path("/sys/kernel/security/apparmor/profiles").read_text()
    assert systemctl("is-active", "skep", check=False) == "active", loaded + journal()
    assert node.docker("info", "--format", "{{.CgroupDriver}} {{.CgroupVersion}}").stdout != "none 2\n"
    node.docker("load", stdin=(await busybox_archive()).data)
    limits = ("--memory", "64m", "--pids-limit", "50", "--cpus", "0.5")
    shown = node.docker(
        "run", "--rm", *limits, _IMAGE, "sh", "-c", "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max"
    ).stdout
    assert shown.split() == [str(64 << 20), "50", "50000", "100000"]

    node.docker("run", "--detach", "--restart", "always", "--name", "kept", _IMAGE, "sleep", "1000000")
    first = systemctl("show", "--property", "MainPID", "--value", "skep")
    root("kill", "-KILL", first)
    wait_until(
        lambda: systemctl("show", "--property", "MainPID", "--value", "skep") not in (first, "0"),
        "a new daemon",
        120,
    )
    wait_until(lambda: is_running(node, "kept"), "the container runs again", 600)
    assert containers()

    systemctl("stop", "skep")
    assert node.pids("skep") == []
    assert node.pids("rootlesskit") == []
    assert containers() == []
    systemctl("start", "skep")
    wait_until(lambda: is_running(node, "kept"), "the container runs again after the node's start", 600)
