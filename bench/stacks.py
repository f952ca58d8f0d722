"""Stacks: 200 services planned and deployed, beside ``docker stack deploy`` on Docker Swarm; what the command costs.

Each system has a node of its own in namespaces; both commands read the same file, without asking a registry and
without waiting for tasks (there are none: all services have no replicas).
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.docker_lab import DockerLab
from bench.figures import Figure, ratio, run_alone
from bench.machine import noise
from bench.skep_lab import SkepLab
from skep.cli.passthrough import find_docker
from skep.playground.busybox import busybox_archive

SERVICES = 200
LINES = 10_000
SKEP = str(Path(sys.executable).with_name("skep"))


def a_file(services: int) -> str:
    """A Compose file that both commands read."""
    one = (
        "  s{number}:\n    image: {image}\n    command: sleep 600\n    environment:\n      NUMBER: '{number}'\n"
        "    networks: [front]\n    configs: [{{source: site, target: /etc/site}}]\n"
        "    deploy:\n      replicas: 0\n      labels: {{number: '{number}'}}\n"
    )
    body = "".join(one.format(number=number, image="busybox:1") for number in range(services))
    return f"version: '3.8'\nservices:\n{body}networks:\n  front: {{}}\nconfigs:\n  site:\n    file: ./site\n"


def taken_s(*command: str, cwd: Path, host: str = "", statuses: tuple[int, ...] = (0,)) -> float:
    """Seconds of a command.  Raises: RuntimeError: it failed."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd)} | ({"DOCKER_HOST": host} if host else {})
    began = time.monotonic()
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    taken = time.monotonic() - began
    if done.returncode not in statuses:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-500:]}")
    return taken


def figures(pairs: int) -> list[Figure]:
    """All of them, on fresh nodes."""
    with tempfile.TemporaryDirectory(prefix="skep-bench-", dir="/var/tmp") as directory:
        folder = Path(directory)
        (folder / "compose.yaml").write_text(a_file(SERVICES))
        (folder / "site").write_text("colour = green\n")
        docker, skep = DockerLab(folder / "docker"), SkepLab(folder / "skep", name=f"stacks{os.getpid()}")
        try:
            archive = asyncio.run(busybox_archive())
            docker.up(archive.data, archive.image_id)
            skep.up_alone()
            return [*_beside(folder, docker, skep, pairs), *_alone(folder, skep, pairs)]
        finally:
            docker.down()
            skep.down()


def _beside(folder: Path, docker: DockerLab, skep: SkepLab, pairs: int) -> list[Figure]:
    hosts = {"docker": f"unix://{docker.directory}/docker.sock", "skep": skep.described.endpoint}
    files = ("-c", "compose.yaml", "--resolve-image", "never")
    deploys = {
        "docker": (find_docker(), "stack", "deploy", *files, "big"),
        "skep": (SKEP, "stack", "deploy", "--detach", *files, "big"),
    }
    first: dict[str, list[float]] = {"docker": [], "skep": []}
    again: dict[str, list[float]] = {"docker": [], "skep": []}
    busy: list[float] = []
    for number in range(pairs):
        busy.append(noise(0.3))
        for system in sorted(hosts, reverse=number % 2 == 1):
            first[system].append(taken_s(*deploys[system], cwd=folder, host=hosts[system]))
            again[system].append(taken_s(*deploys[system], cwd=folder, host=hosts[system]))
            taken_s(find_docker(), "stack", "rm", "big", cwd=folder, host=hosts[system])
            _wait(lambda system=system: not _names(folder, hosts[system]))  # type: ignore[misc]
    return [
        ratio(1, f"deploy of {SERVICES} new services, docker / skep", first, limit=0.5, busy=busy),
        ratio(2, f"deploy of {SERVICES} services that are there, docker / skep", again, limit=0.5, busy=busy),
    ]


def _names(folder: Path, host: str) -> str:
    command = (find_docker(), "network", "ls", "-q", "--filter", "label=com.docker.stack.namespace=big")
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "DOCKER_HOST": host}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def _wait(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError("the stack is not gone")
        time.sleep(0.2)


def _alone(folder: Path, skep: SkepLab, pairs: int) -> list[Figure]:
    host = skep.described.endpoint
    options = ("-c", "compose.yaml", "--resolve-image", "never", "big")
    new = [
        taken_s(SKEP, "stack", "plan", *options, cwd=folder, host=host, statuses=(2,)) for _ in range(pairs)
    ]
    taken_s(SKEP, "stack", "deploy", "--detach", *options, cwd=folder, host=host)
    same = [taken_s(SKEP, "stack", "plan", *options, cwd=folder, host=host) for _ in range(pairs)]
    text = a_file(LINES // 9)
    (folder / "large.yaml").write_text(text)
    parsed = [taken_s(SKEP, "stack", "config", "-q", "-c", "large.yaml", cwd=folder) for _ in range(pairs)]
    help_ = [taken_s(SKEP, "--help", cwd=folder) for _ in range(pairs)]
    status = [taken_s(SKEP, "status", cwd=folder, host=host) for _ in range(pairs)]
    rows = (
        (3, f"plan of {SERVICES} new services", new, 2.0),
        (4, f"plan of {SERVICES} services without a change", same, 2.0),
        (
            5,
            f"a file of {text.count(chr(10))} lines read and checked, the command's start in it",
            parsed,
            1.0,
        ),
        (6, "skep --help", help_, 0.15),
        (7, "skep status", status, 0.3),
    )
    return [
        Figure(number=number, what=what, unit="s", values=tuple(values), limit=limit)
        for number, what, values, limit in rows
    ]


if __name__ == "__main__":
    run_alone(__doc__ or "", "stacks", figures)
