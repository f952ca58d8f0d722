"""A real dockerd to record from, with the hostname and the image of a playground's m1.

Its namespaces, files and cgroup are its own; nothing is left of them.
"""

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skep.playground.busybox import busybox_archive
from tests.integration.cluster import CLIS, wait_until

ADDRESS = "10.98.0.11"

# dockerd writes bridge settings through sysfs, which must show its own network namespace; the cgroups go back on top.
_START = """
hostname m1
mkdir -p /etc/docker /run/docker {dir}/cgroups
mount --rbind /sys/fs/cgroup {dir}/cgroups && mount -t sysfs none /sys && mount --rbind {dir}/cgroups /sys/fs/cgroup
mount --bind {dir}/etc /etc/docker && mount -t tmpfs none /run/docker
exec dockerd --data-root {dir}/data --exec-root {dir}/run --pidfile {dir}/docker.pid -H unix://{dir}/docker.sock \
  --cgroup-parent /{name}
"""


@contextmanager
def real_engine() -> Iterator[tuple[str, str]]:
    """A dockerd that is in no swarm, with ``busybox:1``.  Gives its address (unix://) and its netns's name."""
    directory = Path(tempfile.mkdtemp(prefix="skep-beside-", dir="/var/tmp"))
    name = directory.name
    for part in ("etc", "data", "run"):
        (directory / part).mkdir()
    for command in (
        f"netns add {name}",
        f"-n {name} link set lo up",
        f"-n {name} link add eth0 type veth peer name cable",
        f"-n {name} addr add {ADDRESS}/24 dev eth0",
        f"-n {name} link set eth0 up",
        f"-n {name} link set cable up",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    script = _START.format(dir=directory, name=name)
    with (directory / "log").open("ab") as log:
        process = subprocess.Popen(
            [
                "nsenter",
                f"--net=/run/netns/{name}",
                *("unshare", "-m", "-u", "--propagation", "private", "sh", "-c"),
                script,
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    host = f"unix://{directory}/docker.sock"
    try:
        wait_until(lambda: _docker(host, "version").returncode == 0, "dockerd answers", within_s=60)
        assert _docker(host, "load", stdin=asyncio.run(busybox_archive()).data).returncode == 0
        yield host, name
    finally:
        _docker(host, "swarm", "leave", "--force")
        process.terminate()
        process.wait(60)
        subprocess.run(["ip", "netns", "del", name], check=True)
        _remove_cgroups(name)
        shutil.rmtree(directory, ignore_errors=True)


def _docker(host: str, *words: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "DOCKER_HOST": host}
    command = [CLIS[0], *words]
    return subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=60, check=False)


def _remove_cgroups(name: str) -> None:
    cgroups = Path("/sys/fs/cgroup")
    for top in (*cgroups.glob(name), *cgroups.glob(f"*/{name}")):
        for root, _, _ in os.walk(top, topdown=False):
            Path(root).rmdir()
