"""Stacks: 200 services planned and deployed, compared with ``docker stack deploy`` on Docker Swarm.

Each system has its own node in namespaces.  Both commands read the same files, without a request to a registry.  In
the first file no service has a replica, which measures the command and its requests.  In the second each has one, and
the deploy ends when all of them run.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from bench.docker_lab import DockerLab
from bench.engine import Engine
from bench.figures import Figure, ratio, run_alone
from bench.machine import noise
from bench.skep_lab import SkepLab
from skep.cli.passthrough import find_docker
from skep.playground.images.busybox import busybox_archive

SERVICES = 200
LINES = 10_000
GONE_S, RUNNING_S = 300.0, 600.0
LOOK_S = 0.2
SKEP = str(Path(sys.executable).with_name("skep"))


def a_file(services: int, replicas: int = 0) -> str:
    """Return a Compose file that both commands read."""
    one = (
        "  s{number}:\n    image: {image}\n    command: sleep 600\n    environment:\n      NUMBER: '{number}'\n"
        "    networks: [front]\n    configs: [{{source: site, target: /etc/site}}]\n"
        "    deploy:\n      replicas: {replicas}\n      labels: {{number: '{number}'}}\n"
    )
    body = "".join(
        one.format(number=number, image="busybox:1", replicas=replicas) for number in range(services)
    )
    # A virtual address for each service and one for each task are more than the /24 of the default pools has.
    front = "  front:\n    ipam:\n      config: [{subnet: 10.77.0.0/20}]\n"
    return f"version: '3.8'\nservices:\n{body}networks:\n{front}configs:\n  site:\n    file: ./site\n"


def taken_s(*command: str, cwd: Path, host: str = "", statuses: tuple[int, ...] = (0,)) -> float:
    """Run a command, and return its seconds.  Raises: RuntimeError: it failed."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd)} | ({"DOCKER_HOST": host} if host else {})
    began = time.monotonic()
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    taken = time.monotonic() - began
    if done.returncode not in statuses:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-500:]}")
    return taken


def figures(pairs: int) -> list[Figure]:
    """Measure all results, on fresh nodes."""
    with tempfile.TemporaryDirectory(prefix="skep-bench-", dir="/var/tmp") as directory:
        folder = Path(directory)
        (folder / "compose.yaml").write_text(a_file(SERVICES))
        (folder / "running.yaml").write_text(a_file(SERVICES, replicas=1))
        (folder / "site").write_text("colour = green\n")
        docker, skep = DockerLab(folder / "docker"), SkepLab(folder / "skep", name=f"stacks{os.getpid()}")
        try:
            archive = asyncio.run(busybox_archive())
            docker.up(archive.data, archive.image_id)
            skep.up_alone()
            return [
                *_beside(folder, docker, skep, pairs),
                *_alone(folder, skep, pairs),
                _until_running(folder, docker, skep, pairs),
            ]
        finally:
            docker.down()
            skep.down()


def _in_turns(hosts: Mapping[str, str], pairs: int, busy: list[float]) -> Iterator[str]:
    """Yield both systems ``pairs`` times, in alternating order.  Append the load to ``busy`` before each pair."""
    for number in range(pairs):
        busy.append(noise(0.3))
        yield from sorted(hosts, reverse=number % 2 == 1)


def _beside(folder: Path, docker: DockerLab, skep: SkepLab, pairs: int) -> list[Figure]:
    first: dict[str, list[float]] = {"docker": [], "skep": []}
    again: dict[str, list[float]] = {"docker": [], "skep": []}
    busy: list[float] = []
    hosts = _hosts(docker, skep)
    for system in _in_turns(hosts, pairs, busy):
        deploy = _deploy(system, "compose.yaml")
        first[system].append(taken_s(*deploy, cwd=folder, host=hosts[system]))
        again[system].append(taken_s(*deploy, cwd=folder, host=hosts[system]))
        _remove(folder, hosts[system])
    return [
        # Half of it would be less than the command's start and its reads (docs/decisions/0090).
        ratio(1, f"deploy of {SERVICES} new services, skep / docker", first, limit=1.0, busy=busy),
        ratio(2, f"deploy of {SERVICES} services that are there, skep / docker", again, limit=0.5, busy=busy),
    ]


def _until_running(folder: Path, docker: DockerLab, skep: SkepLab, pairs: int) -> Figure:
    """Measure from the command until every service has its task running."""
    taken: dict[str, list[float]] = {"docker": [], "skep": []}
    busy: list[float] = []
    hosts = _hosts(docker, skep)
    for system in _in_turns(hosts, pairs, busy):
        began = time.monotonic()
        taken_s(*_deploy(system, "running.yaml"), cwd=folder, host=hosts[system])
        engine = Engine(Path(hosts[system].removeprefix("unix://")))
        _wait(lambda engine=engine: _running(engine) == SERVICES, RUNNING_S)  # type: ignore[misc]
        taken[system].append(time.monotonic() - began)
        engine.close()
        _remove(folder, hosts[system])
    what = f"deploy of {SERVICES} new services until the task of each runs, skep / docker"
    return ratio(8, what, taken, limit=0.5, busy=busy)


def _running(engine: Engine) -> int:
    return sum(one["ServiceStatus"]["RunningTasks"] for one in engine.get("/services", status="true"))


def _hosts(docker: DockerLab, skep: SkepLab) -> dict[str, str]:
    return {"docker": f"unix://{docker.directory}/docker.sock", "skep": skep.described.endpoint}


def _deploy(system: str, file: str) -> tuple[str, ...]:
    command = (
        (find_docker(), "stack", "deploy") if system == "docker" else (SKEP, "stack", "deploy", "--detach")
    )
    return (*command, "-c", file, "--resolve-image", "never", "big")


def _remove(folder: Path, host: str) -> None:
    taken_s(find_docker(), "stack", "rm", "big", cwd=folder, host=host)
    _wait(lambda: not _names(folder, host), GONE_S)


def _names(folder: Path, host: str) -> str:
    command = (find_docker(), "network", "ls", "-q", "--filter", "label=com.docker.stack.namespace=big")
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "DOCKER_HOST": host}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def _wait(is_true: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the stack is not as wanted after {limit_s:g} s")
        time.sleep(LOOK_S)


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
