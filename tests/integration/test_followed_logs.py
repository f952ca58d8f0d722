"""``docker service logs -f`` while nodes die, come back, and get tasks of others."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.machines.playground_rig import (
    CLIS,
    TestNode,
    a_playground,
    create,
    nodes_by_name,
    ready,
    wait_running,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

TICKING = (
    "sh",
    "-c",
    "trap 'exit 0' TERM; n=0; while :; do n=$((n+1)); echo $HOSTNAME tick $n; sleep 0.5; done",
)


@contextmanager
def following(node: TestNode, service: str, output: Path) -> Iterator[None]:
    """``docker service logs -f --tail 0`` of a service, its output in a file."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "DOCKER_HOST": node.socket}
    words = [CLIS[-1], "service", "logs", "--raw", "-f", "--tail", "0", service]
    with open(output, "wb") as file:
        reader = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        yield
    finally:
        reader.kill()
        reader.wait()


def test_a_follower_shows_the_tasks_of_a_node_that_went_down_and_came_back(tmp_path: Path) -> None:
    """The task of another node that moves there, too; each line once."""
    output = tmp_path / "lines"
    with a_playground("follow", managers=3, workers=2) as cluster:
        m1 = cluster.node("m1")
        wait_until(lambda: ready(m1) == {"m1", "m2", "m3", "w1", "w2"}, "all nodes are ready", 60)
        create(
            m1, "web", 4, "--constraint", "node.role==worker", "--hostname", "{{.Task.ID}}", command=TICKING
        )
        first = wait_running(m1, "web", 4)
        with following(m1, "web", output):
            wait_until(lambda: shown(output) >= {task["ID"] for task in first}, "four tasks are followed")
            cluster.skep("kill", "w1")
            wait_until(lambda: nodes_by_name(m1)["w1"]["Status"]["State"] == "down", "w1 is down")
            wait_until(
                lambda: "skep: node w1 does not answer\n" in output.read_text(), "the follower sees its name"
            )
            cluster.skep("start", "w1")
            wait_until(lambda: "w1" in ready(m1), "w1 is back", 60)
            m1.docker("node", "update", "--availability", "drain", "w2")
            w1 = nodes_by_name(m1)["w1"]["ID"]
            wait_until(
                lambda: {task["NodeID"] for task in wait_running(m1, "web", 4)} == {w1},
                "all tasks are on w1",
                90,
            )
            now = {task["ID"] for task in wait_running(m1, "web", 4)}
            wait_until(lambda: shown(output) >= now, "the tasks on w1 are followed")
            seen = ticks(output)
            for task in now:
                wait_until(lambda task=task: ticks(output)[task] >= seen[task] + 3, "they go on")  # type: ignore[misc]
        lines = [line for line in output.read_text().splitlines() if " tick " in line]
        assert sorted(lines) == sorted(set(lines))
        now -= {task["ID"] for task in first}
        assert now
        for task in now:
            numbers = [int(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{task} tick ")]
            assert numbers == list(range(1, len(numbers) + 1))


def ticks(output: Path) -> dict[str, int]:
    """Last number that each task has shown."""
    lines = [line.split(" tick ") for line in output.read_text().splitlines() if " tick " in line]
    return {words[0]: int(words[1] or 0) for words in lines}


def shown(output: Path) -> set[str]:
    return set(ticks(output))
