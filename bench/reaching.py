"""Measures a command in a container: on this node, on another node, and in a Docker Engine.

The same docker command talks to both systems.  ``requests`` are the three requests of an exec (create, start, inspect)
without the docker command.  ``runc`` is only the command that both systems finally execute.
"""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.support.machines.playground_rig import CLIS

_IDLE = ["sh", "-c", "while :; do sleep 3600; done"]
_BODY = {"AttachStdout": True, "AttachStderr": True, "Cmd": ["true"]}
Ways = Mapping[str, Callable[[], None]]


def ways(skep: Any, docker: Any) -> Ways:
    """Return functions that each run ``true`` in their kind of container.  ``skep`` has a manager and a worker."""
    here, there, beside = (*_skep_tasks(skep), _docker_container(docker))
    local = skep.engine.get(f"/tasks/{here}")["Status"]["ContainerStatus"]["ContainerID"]
    command = str(Path(sys.executable).with_name("skep"))

    def by_docker(lab: Any, container: str) -> Callable[[], None]:
        return lambda: _run(CLIS[0], "-H", f"unix://{lab.engine.path}", "exec", container, "true")

    def by_skep(task: str) -> Callable[[], None]:
        return lambda: _run(command, "-H", f"unix://{skep.engine.path}", "exec", task, "true")

    def by_requests(lab: Any, container: str, exec: str) -> Callable[[], None]:
        return lambda: _exec(lab.engine.path, container, exec)

    def of_task(task: str) -> Callable[[], None]:
        return by_requests(skep, f"/skep/tasks/{task}/container", f"/skep/tasks/{task}")

    def by_runc(lab: Any, root: str, container: str) -> Callable[[], None]:
        inside = ("nsenter", "-m", "-t", str(lab.root_pids[0]))
        return lambda: _run(*inside, "runc", "--root", root, "exec", container, "true")

    return {
        "docker exec, Docker": by_docker(docker, beside),
        "docker exec, Skep": by_docker(skep, local),
        "skep exec, same node": by_skep(here),
        "skep exec, another node": by_skep(there),
        "requests, Docker": by_requests(docker, f"/containers/{beside}", ""),
        "requests, Skep": by_requests(skep, f"/containers/{local}", ""),
        "requests, same node": of_task(here),
        "requests, another node": of_task(there),
        "runc, Docker": by_runc(docker, f"{docker.directory}/run/runtime-runc/moby", beside),
        "runc, Skep": by_runc(skep, "/run/skep/runc", local),
    }


def _skep_tasks(lab: Any) -> tuple[str, str]:
    """Return a task of the manager's node, and one of the worker."""
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
    """Return the body of one response, on a separate connection."""
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
