"""A real dockerd for tests, in its own namespaces and cgroup, which is removed completely."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skep.aio.trees import discard_tree_now
from tests.support.machines.playground_rig import CLIS, wait_until

# dockerd writes bridge settings through sysfs, which must show its own network namespace; the cgroups go back on top,
# and securityfs, by which it finds AppArmor.
_START = """
{before}
mkdir -p /etc/docker /run/docker {dir}/cgroups
mount --rbind /sys/fs/cgroup {dir}/cgroups && mount -t sysfs none /sys && mount --rbind {dir}/cgroups /sys/fs/cgroup
[ ! -d /sys/kernel/security ] || mount -t securityfs none /sys/kernel/security
mount --bind {dir}/etc /etc/docker && mount -t tmpfs none /run/docker
exec dockerd --data-root {dir}/data --exec-root {dir}/run --pidfile {dir}/docker.pid -H unix://{dir}/docker.sock \
  --cgroup-parent /{name} {options}
"""


@contextmanager
def plain_engine() -> Iterator[Path]:
    """Run a dockerd outside of a swarm, without images.  Yield its socket."""
    directory = Path(tempfile.mkdtemp(prefix="skep-plain-", dir="/var/tmp"))
    with engine_in(directory, "unshare", "-n", before="ip link set lo up") as socket:
        yield socket


@contextmanager
def engine_in(directory: Path, *enter: str, before: str, options: str = "") -> Iterator[Path]:
    """Run a dockerd with all its files in ``directory``, whose name is its cgroup's.  Yield its socket.

    Args:
        enter: command that enters its network namespace.  It always has its own mount namespace.
        before: shell commands that run there first.
        options: further options of dockerd.
    """
    for part in ("etc", "data", "run"):
        (directory / part).mkdir()
    script = _START.format(before=before, dir=directory, name=directory.name, options=options)
    socket = directory / "docker.sock"
    with (directory / "log").open("ab") as log:
        process = subprocess.Popen(
            [*enter, "unshare", "-m", "-u", "--propagation", "private", "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_until(
            lambda: process.poll() is not None or docker(socket, "version").returncode == 0,
            "dockerd answers",
            within_s=180,
        )
        assert process.poll() is None, (directory / "log").read_text()
        yield socket
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        _remove_cgroups(directory.name)
        discard_tree_now(directory)


def docker(socket: Path, *words: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run the docker command against this engine."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "DOCKER_HOST": f"unix://{socket}"}
    command = [CLIS[0], *words]
    return subprocess.run(
        command, input=stdin, capture_output=True, env=environment, timeout=240, check=False
    )


def _remove_cgroups(name: str) -> None:
    cgroups = Path("/sys/fs/cgroup")
    for top in (*cgroups.glob(name), *cgroups.glob(f"*/{name}")):
        for root, _, _ in os.walk(top, topdown=False):
            Path(root).rmdir()
