"""While both processors are kept busy no node is taken for dead: the judge measures in its own time."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.machines.playground_rig import TestNode, a_playground, create, wait_running

BUSY = "while True: pass"


@contextmanager
def busy_processors() -> Iterator[list[subprocess.Popen[bytes]]]:
    """As many processes that do nothing but compute as there are processors."""
    burning = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 2)]
    try:
        yield burning
        assert all(process.poll() is None for process in burning), "a processor was not kept busy"
    finally:
        for process in burning:
            process.kill()
            process.wait()


@contextmanager
def node_events(node: TestNode) -> Iterator[list[dict[str, str]]]:
    """Attributes of the events of nodes, as they come."""
    received: list[dict[str, str]] = []
    stream = node.client().events(decode=True, filters={"type": "node"})

    def listen() -> None:
        received.extend(event["Actor"]["Attributes"] for event in stream)

    listening = threading.Thread(target=listen, daemon=True)
    listening.start()
    try:
        yield received
    finally:
        stream.close()
        listening.join(5)


def went_down(received: list[dict[str, str]]) -> list[str]:
    return [event["name"] for event in received if event.get("state.new") == "down"]


def keep_scaling(node: TestNode, replicas: int, seconds: float) -> None:
    """Up to ``replicas`` and down again, for that long; ends with all of them."""
    create(node, "load", 1)
    until = time.monotonic() + seconds
    while True:
        node.docker("service", "scale", "--detach", f"load={replicas}")
        wait_running(node, "load", replicas, within_s=240)
        if time.monotonic() >= until:
            return
        node.docker("service", "scale", "--detach", "load=1")
        wait_running(node, "load", 1, within_s=240)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("workers", "replicas", "seconds"),
    [
        pytest.param(2, 20, 5, id="short", marks=pytest.mark.timeout(300)),
        pytest.param(
            7, 100, 300, id="five-minutes-of-eight-nodes", marks=[pytest.mark.slow, pytest.mark.timeout(1500)]
        ),
    ],
)
def test_no_node_is_taken_for_dead_while_the_machine_is_busy(
    workers: int, replicas: int, seconds: float
) -> None:
    with a_playground("busy", managers=1, workers=workers) as cluster:
        m1 = cluster.node("m1")
        with node_events(m1) as received, busy_processors():
            keep_scaling(m1, replicas, seconds)
            m1.docker("node", "update", "--label-add", "seen=yes", "w1")  # events do come
        assert received
        assert went_down(received) == []
        tasks = m1.client().api.tasks(filters={"service": "load"})
        assert all(task["Status"]["State"] != "failed" for task in tasks)
