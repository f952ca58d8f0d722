"""Devices of a CDI file: the node counts them, the scheduler hands them out, and each task's container has its own."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.machines.playground_rig import (
    IDLE,
    IMAGE,
    SKEP,
    TestNode,
    a_playground,
    container_pids,
    wait_running,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

KIND = "vendor.com/gpu"
DEVICES = {"0": "/dev/zero", "1": "/dev/full"}
WAITS = "no suitable node (insufficient resources on 1 node)"


def given(node: TestNode) -> list[str]:
    """Return the variable that the description of its device has set, by running container."""
    return sorted(
        word
        for pid in container_pids(node, "train").values()
        for word in Path(f"/proc/{pid}/environ").read_text().split("\0")
        if word.startswith("GPU=")
    )


def test_two_tasks_never_share_a_reserved_gpu_and_a_third_one_waits_for_it(tmp_path: Path) -> None:
    devices = [
        {
            "name": name,
            "containerEdits": {
                "env": [f"GPU={name}"],
                "deviceNodes": [{"path": f"/dev/gpu{name}", "hostPath": path}],
            },
        }
        for name, path in DEVICES.items()
    ]
    (tmp_path / "vendor.json").write_text(
        json.dumps({"cdiVersion": "0.6.0", "kind": KIND, "containerEdits": {}, "devices": devices})
    )
    with a_playground("gpus", managers=1, configured={"m1": f'cdi-spec-dirs = ["{tmp_path}"]\n'}) as cluster:
        m1 = cluster.node("m1")
        allow = [SKEP, "--host", m1.socket, "cluster", "allow", "gpus"]
        subprocess.run(allow, capture_output=True, timeout=60, check=True)
        options = ("--generic-resource", f"{KIND}=1", "--container-label", "skep.gpus=reserved")
        m1.docker(
            "service", "create", "--detach", "--name", "train", "--replicas", "3", *options, IMAGE, *IDLE
        )
        wait_running(m1, "train", 2, 60)
        assert given(m1) == ["GPU=0", "GPU=1"]

        def waiting() -> list[str]:
            tasks = m1.client().api.tasks(filters={"service": "train"})
            return [one["Status"].get("Err", "") for one in tasks if one["Status"]["State"] == "pending"]

        wait_until(lambda: waiting() == [WAITS], "the third one waits", 30)
        for pid in list(container_pids(m1, "train").values())[:1]:
            m1.kill(pid)
        wait_until(lambda: given(m1) == ["GPU=0", "GPU=1"], "the freed device is handed out again", 60)
