"""A rootless node where AppArmor restricts users' namespaces, as Ubuntu's kernel does.

It unloads profiles of the machine, so it runs only in a virtual one: ``make virtual SUITE=noble``.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from skep.playground.images.busybox import busybox_archive
from tests.support.machines.rootless_user import RootlessNode, a_rootless_node

_SETTING = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
_PROFILE = Path("/etc/apparmor.d/rootlesskit")
_IMAGE = "busybox:1"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.environ.get("SKEP_VIRTUAL") != "1" or not _SETTING.exists() or _SETTING.read_text() != "1\n",
        reason="this kernel does not restrict users' namespaces, or is not a virtual machine's: docs/untested.md",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def profile() -> None:
    """Load the distribution's profile, as its service does at boot.  The virtual machine starts no services."""
    subprocess.run(("apparmor_parser", "-r", _PROFILE), check=True, capture_output=True, timeout=60)


@pytest.fixture
def node() -> Iterator[RootlessNode]:
    with a_rootless_node("skep-test-user") as node:
        yield node


def refusal(node: RootlessNode, **environment: str) -> str:
    """Return the only problem that the daemon names, when it does not start."""
    command = node.daemon(**environment)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    return line


def follow(advice: str) -> None:
    """Run the command of a message, as root."""
    match = re.search(r"as root, (.+), or for all programs, ", advice)
    assert match is not None, advice
    subprocess.run(match[1], shell=True, check=True, capture_output=True, timeout=60)


@contextmanager
def not_loaded(profile: Path) -> Iterator[None]:
    subprocess.run(("apparmor_parser", "-R", profile), check=True, capture_output=True, timeout=60)
    try:
        yield
    finally:
        subprocess.run(("apparmor_parser", "-r", profile), check=True, capture_output=True, timeout=60)


async def test_containers_run_under_the_distributions_profile(node: RootlessNode) -> None:
    node.start()
    node.docker("load", stdin=(await busybox_archive()).data)
    shown = node.docker("run", "--rm", _IMAGE, "sh", "-c", "id -u; cat /proc/self/uid_map").stdout.split()
    assert shown[:2] == ["0", "0"]
    assert shown[2] != "0", "root of the container is not root of the machine"
    assert node.docker("run", "--rm", "--user", "7", _IMAGE, "id", "-u").stdout == "7\n"


def test_a_profile_that_is_not_loaded_is_named_with_the_command_that_loads_it(node: RootlessNode) -> None:
    with not_loaded(_PROFILE):
        advice = refusal(node)
        assert "no loaded profile allows /usr/bin/rootlesskit" in advice
        follow(advice)
        node.start()


def test_a_program_elsewhere_gets_the_profile_of_the_message(node: RootlessNode, tmp_path: Path) -> None:
    own = Path(tmp_path.root, "opt", "kit")
    written = Path("/etc/apparmor.d/opt.kit.rootlesskit")
    own.mkdir()
    try:
        shutil.copy2("/usr/bin/rootlesskit", own)
        path = {"PATH": f"{own}:{os.environ['PATH']}"}
        follow(refusal(node, **path))
        assert written.exists()
        node.start(**path)
        node.end()
    finally:
        if written.exists():
            subprocess.run(("apparmor_parser", "-R", written), check=False, timeout=60)
            written.unlink()
        shutil.rmtree(own)
