"""A real dockerd to record from, with the hostname and the image of a playground's m1.

Its namespaces, files and cgroup are its own; nothing is left of them.
"""

import asyncio
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skep.playground.images.busybox import busybox_archive
from tests.support.machines.plain_engine import docker, engine_in

ADDRESS = "10.98.0.11"


@contextmanager
def real_engine() -> Iterator[tuple[str, str]]:
    """A dockerd that is in no swarm, with ``busybox:1``.  Gives its address (unix://) and its netns's name."""
    directory = Path(tempfile.mkdtemp(prefix="skep-beside-", dir="/var/tmp"))
    name = directory.name
    for command in (
        f"netns add {name}",
        f"-n {name} link set lo up",
        f"-n {name} link add eth0 type veth peer name cable",
        f"-n {name} addr add {ADDRESS}/24 dev eth0",
        f"-n {name} link set eth0 up",
        f"-n {name} link set cable up",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    enter = ("nsenter", f"--net=/run/netns/{name}")
    try:
        with engine_in(directory, *enter, before="hostname m1") as socket:
            try:
                assert docker(socket, "load", stdin=asyncio.run(busybox_archive()).data).returncode == 0
                yield f"unix://{socket}", name
            finally:
                docker(socket, "swarm", "leave", "--force")
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)
