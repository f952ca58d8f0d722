"""A drain on real nodes waits until the replacement is healthy, and not only until it runs, in any update order."""

import subprocess
from collections.abc import Mapping
from typing import Any

import pytest

from tests.support.machines.playground_rig import (
    IMAGE,
    SKEP,
    TestCluster,
    a_playground,
    nodes_by_name,
    wait_running,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

STARTS_S = 8
"""Seconds until a new task is healthy."""
CHECK = ("--health-cmd", "test -e /tmp/ready", "--health-interval", "500ms", "--health-start-period", "60s")


def states(cluster: TestCluster) -> dict[str, Mapping[str, Any]]:
    return {task["ID"]: task for task in cluster.node("m1").client().api.tasks(filters={"service": "web"})}


def test_the_old_task_stops_only_when_its_replacement_is_healthy() -> None:
    with a_playground("healthy", managers=1, workers=2) as cluster:
        m1 = cluster.node("m1")
        command = ("sh", "-c", f"sleep {STARTS_S}; touch /tmp/ready; exec sleep 600")
        words = (
            "--detach",
            "--name",
            "web",
            "--update-order",
            "stop-first",
            "--constraint",
            "node.role==worker",
        )
        m1.docker("service", "create", *words, *CHECK, IMAGE, *command)
        (old,) = wait_running(m1, "web", 1, 60)
        home = {node["ID"]: name for name, node in nodes_by_name(m1).items()}[old["NodeID"]]
        drain = subprocess.Popen([SKEP, "--host", m1.socket, "node", "drain", home])
        starting = 0
        while drain.poll() is None:
            tasks = states(cluster)
            (new,) = [task for id, task in tasks.items() if id != old["ID"]] or [None]
            if new is not None and new["Status"]["State"] == "starting":
                starting += 1
                assert tasks[old["ID"]]["DesiredState"] == "running", "the replacement is not healthy yet"
                assert tasks[old["ID"]]["Status"]["State"] == "running"
        assert drain.returncode == 0
        assert starting > 1, "the replacement took its time"
        (new,) = wait_running(m1, "web", 1, 10)
        assert new["NodeID"] != old["NodeID"]
