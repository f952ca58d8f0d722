"""Reads the settings that apply during a measurement from the running systems, instead of assuming them.

One task is started on each system.  Its process shows whether seccomp filters it and which capabilities bound it, the
API returns its log line, and the processes of the node show whether its store syncs to disk.
"""

import time
from pathlib import Path
from typing import Any

from bench.machine import daemons

_LINE = "the log is kept"


def facts(lab: Any) -> dict[str, str]:
    """Return facts of one running system, each a short word for the result file."""
    service = lab.engine.post(
        "/services/create",
        {
            "Name": "facts",
            "TaskTemplate": {
                "ContainerSpec": {
                    "Image": lab.image,
                    "Command": ["sh", "-c", f"echo '{_LINE}'; exec sleep 600"],
                }
            },
            "Mode": {"Replicated": {"Replicas": 1}},
        },
    )["ID"]
    try:
        container = _container(lab, service)
        status = Path(f"/proc/{container['State']['Pid']}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        return {
            "version": lab.version(),
            "seccomp": {"0": "OFF", "1": "strict", "2": "filter"}[fields["Seccomp"].strip()],
            "capabilities (bounding)": fields["CapBnd"].strip(),
            "log driver": container["HostConfig"]["LogConfig"]["Type"],
            "log line kept": "yes" if _LINE.encode() in _logs(lab, container["Id"]) else "NO",
            "fsync": fsync(lab.netns, lab.root_pids),
        }
    finally:
        lab.engine.delete(f"/services/{service}")


def _container(lab: Any, service: str) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        tasks = lab.engine.get("/tasks", filters={"service": [service]})
        if tasks and tasks[0]["Status"]["State"] == "running":
            id = tasks[0]["Status"]["ContainerStatus"]["ContainerID"]
            response: dict[str, Any] = lab.engine.get(f"/containers/{id}/json")
            return response
        time.sleep(0.05)
    raise TimeoutError(f"{lab.system}: the task that shows the facts did not run within 30 s")


def _logs(lab: Any, container: str) -> bytes:
    deadline = time.monotonic() + 5
    data = b""
    while not data and time.monotonic() < deadline:
        data = lab.engine.raw("GET", f"/containers/{container}/logs?stdout=1")
    return data


def fsync(netns: Path, root_pids: list[int]) -> str:
    """Return whether a machine's store syncs to disk.

    Docker's raft log has no option to turn it off. etcd has one, which appears on its command line.
    """
    for pid in daemons(netns, root_pids):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"--unsafe-no-fsync" in command or b"--unsafe-no-fsync=true" in command:
            return "OFF"
    return "on"
