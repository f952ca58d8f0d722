"""One container by Docker, Podman and Skep: its start, a command in it, and its removal.

    python -m bench.single --pairs 7

Each is what a user types: ``docker run -d``, ``docker exec`` and ``docker rm -f`` against a Docker Engine and a node of
Skep, and the same three with ``podman``, which has no daemon.  All three have the same image, runc, the same limits and
their default network.
"""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from bench.docker_lab import DockerLab
from bench.figures import Figure, run_alone, side_by_side
from bench.scenarios import WORKLOAD
from bench.skep_lab import SkepLab
from skep.playground.images.busybox import busybox_archive

IMAGE = "busybox:1"
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")
"""Podman's default limits need rights that not every machine has."""


class Command:
    """The command of one system, with the words that lead to its containers."""

    def __init__(self, system: str, *words: str, environment: Mapping[str, str] | None = None) -> None:
        self.system = system
        self._words = words
        self._environment = {**os.environ, **(environment or {})}

    def run(self, *words: str) -> str:
        """Run the command, and return its output.  Raises: CalledProcessError."""
        return subprocess.run(
            [*self._words, *words], env=self._environment, check=True, capture_output=True, text=True
        ).stdout.strip()

    def timed(self, *words: str) -> float:
        """Return the seconds that the command takes."""
        began = time.monotonic()
        self.run(*words)
        return time.monotonic() - began


def one_container(command: Command) -> Mapping[str, float]:
    """Measure the life of one container."""
    return {
        "start of one container, s": command.timed(
            "run", "--detach", "--name", "one", *LIMITS, IMAGE, *WORKLOAD
        ),
        "exec of one container, s": command.timed("exec", "one", "true"),
        "removal of one container, s": command.timed("rm", "--force", "one"),
    }


def podman(directory: Path, stack: ExitStack) -> Command:
    """Return Podman with files and a network of its own, in namespaces that end with ``stack``."""
    path = shutil.which("podman")
    if path is None:
        raise SystemExit("no podman found: apt-get install podman, then run the benchmark again")
    directory.mkdir()
    holder = subprocess.Popen(
        ["unshare", "--mount", "--net", "--propagation", "private", "sh", "-c", "echo made; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    stack.callback(holder.terminate)
    assert holder.stdout is not None
    holder.stdout.readline()
    within = ("nsenter", "-t", str(holder.pid), "--mount", "--net")
    subprocess.run([*within, "ip", "link", "set", "lo", "up"], check=True)
    places = ("--root", str(directory / "root"), "--runroot", str(directory / "run"))
    runtime = ("--runtime", shutil.which("runc") or "runc")
    made = Command("podman", *within, path, *runtime, "--cgroup-manager", "cgroupfs", *places)
    stack.callback(lambda: made.run("system", "reset", "--force"))
    return made


def measure(pairs: int) -> list[Figure]:
    """Measure all three systems in turn."""
    archive = asyncio.run(busybox_archive())
    docker = shutil.which("docker") or str(Path(sys.executable).with_name("docker"))
    with tempfile.TemporaryDirectory(prefix="skep-bench-", dir="/var/tmp") as directory, ExitStack() as stack:
        place = Path(directory)
        (place / "image.tar").write_bytes(archive.data)
        labs = (DockerLab(place / "docker"), SkepLab(place / "skep", "single"))
        commands = []
        for lab in labs:
            stack.callback(lab.down)
            lab.up(archive.data, archive.image_id)
            host = {"DOCKER_HOST": f"unix://{lab.engine.path}"}
            commands.append(Command(lab.system, docker, environment=host))
        commands.insert(1, podman(place / "podman", stack))
        for command in commands:
            command.run("load", "--input", str(place / "image.tar"))
            one_container(command)  # the first container makes networks
        sides, busy = side_by_side(commands, pairs, one_container)
    return [
        Figure(
            number=0,
            what=what,
            unit="of Podman's",
            values=tuple(mine / other for other, mine in zip(values["podman"], values["skep"], strict=True)),
            sides={system: tuple(found) for system, found in values.items()},
            busy=tuple(busy),
        )
        for what, values in sides.items()
    ]


def main() -> None:
    run_alone(__doc__ or "", "single", measure)


if __name__ == "__main__":
    main()
