"""A command in a container: in one of this node and in one of another, beside a Docker Engine.

    python -m bench.reaching --rounds 40

Each round runs ``true`` once in every way, in turn.  The same docker command talks to both systems; ``requests`` are
the three of an exec (create, start, inspect) without any command around them.
"""

import argparse
import asyncio
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.docker_lab import DockerLab
from bench.requests import quantile
from bench.run import commit, result_name, write_result
from bench.skep_lab import SkepLab
from skep.playground.busybox import busybox_archive

_IDLE = ["sh", "-c", "while :; do sleep 3600; done"]
_BODY = {"AttachStdout": True, "AttachStderr": True, "Cmd": ["true"]}
Ways = Mapping[str, Callable[[], None]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    archive = asyncio.run(busybox_archive())
    with tempfile.TemporaryDirectory(prefix="skep-bench-", dir="/var/tmp") as directory, ExitStack() as stack:
        skep = SkepLab(Path(directory) / "skep", "reaching", workers=1)
        docker = DockerLab(Path(directory) / "docker")
        stack.callback(skep.down)
        skep.up_alone()
        stack.callback(docker.down)
        docker.up(archive.data, archive.image_id)
        values = _measured(_ways(skep, docker), options.rounds)
    now = datetime.now(UTC)
    text = _table(values, f"{now:%Y-%m-%d %H:%M} UTC, commit {commit()}, {options.rounds} rounds")
    write_result(result_name(now, commit(), "reaching"), text, values)
    print(text)


def _ways(skep: Any, docker: Any) -> Ways:
    here, there, beside = (*_skep_tasks(skep), _docker_container(docker))
    cli = shutil.which("docker") or "docker"
    command = str(Path(skep._skep))
    local = skep.engine.get(f"/tasks/{here}")["Status"]["ContainerStatus"]["ContainerID"]

    def by_docker(lab: Any, container: str) -> Callable[[], None]:
        return lambda: _run(cli, "-H", f"unix://{lab.engine.path}", "exec", container, "true")

    def by_skep(task: str) -> Callable[[], None]:
        return lambda: _run(command, "-H", f"unix://{skep.engine.path}", "exec", task, "true")

    def by_requests(lab: Any, container: str, exec: str) -> Callable[[], None]:
        return lambda: _exec(lab.engine.path, container, exec)

    task = "/skep/tasks/{}"
    return {
        "docker exec, Docker": by_docker(docker, beside),
        "docker exec, Skep": by_docker(skep, local),
        "skep exec, same node": by_skep(here),
        "skep exec, another node": by_skep(there),
        "requests, Docker": by_requests(docker, f"/containers/{beside}", ""),
        "requests, Skep": by_requests(skep, f"/containers/{local}", ""),
        "requests, Skep, task of the same node": by_requests(
            skep, f"{task.format(here)}/container", task.format(here)
        ),
        "requests, Skep, task of another node": by_requests(
            skep, f"{task.format(there)}/container", task.format(there)
        ),
    }


def _skep_tasks(lab: Any) -> tuple[str, str]:
    """A task of the manager's node, and one of the worker."""
    spec = {
        "Name": "idle",
        "TaskTemplate": {"ContainerSpec": {"Image": lab.image, "Command": _IDLE}},
        "Mode": {"Global": {}},
    }
    lab.engine.post("/services/create", spec)
    own = lab.engine.get("/info")["Swarm"]["NodeID"]
    for _ in range(600):
        tasks = [task for task in lab.engine.get("/tasks") if task["Status"]["State"] == "running"]
        if len(tasks) == 2:
            tasks.sort(key=lambda task: str(task["NodeID"]) != own)
            return str(tasks[0]["ID"]), str(tasks[1]["ID"])
        time.sleep(0.1)
    raise TimeoutError("the tasks did not run within a minute")


def _docker_container(lab: Any) -> str:
    id = lab.engine.post("/containers/create", {"Image": lab.image, "Cmd": _IDLE})["Id"]
    lab.engine.raw("POST", f"/containers/{id}/start")
    return str(id)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _exec(path: Path, container: str, exec: str) -> None:
    id = json.loads(_exchange(path, "POST", f"{container}/exec", _BODY))["Id"]
    _exchange(path, "POST", f"{exec}/exec/{id}/start", {"Detach": False, "Tty": False}, upgrade=True)
    ended = json.loads(_exchange(path, "GET", f"{exec}/exec/{id}/json"))
    assert ended["ExitCode"] == 0


def _exchange(path: Path, method: str, target: str, body: Any = None, *, upgrade: bool = False) -> bytes:
    """The body of one response, on a connection of its own."""
    content = json.dumps(body).encode() if body is not None else b""
    lines = [f"{method} {target} HTTP/1.1", "Host: engine", "Content-Type: application/json"]
    lines += ["Connection: Upgrade", "Upgrade: tcp"] if upgrade else ["Connection: close"]
    lines.append(f"Content-Length: {len(content)}")
    received = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connected:
        connected.settimeout(60)
        connected.connect(str(path))
        connected.sendall("\r\n".join((*lines, "", "")).encode() + content)
        while data := connected.recv(65536):
            received += data
    head, _, rest = received.partition(b"\r\n\r\n")
    assert head.split(b" ")[1] in (b"101", b"200", b"201"), received
    return rest


def _measured(ways: Ways, rounds: int) -> dict[str, list[float]]:
    """Milliseconds by way; each ran once before."""
    values: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            began = time.perf_counter()
            run()
            if number:
                values[way].append((time.perf_counter() - began) * 1e3)
    return values


def _table(values: Mapping[str, list[float]], title: str) -> str:
    lines = [f"# A command in a container, ms ({title})", "", "| way | p10 | p50 | p90 | p50, of Docker's |"]
    lines.append("|---|---|---|---|---|")
    for way, found in values.items():
        docker = values["requests, Docker" if way.startswith("requests") else "docker exec, Docker"]
        p10, p50, p90 = (quantile(found, share) for share in (0.1, 0.5, 0.9))
        lines.append(f"| {way} | {p10:.1f} | {p50:.1f} | {p90:.1f} | {p50 / quantile(docker, 0.5):.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
