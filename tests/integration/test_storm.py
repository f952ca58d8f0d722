"""The storm guard with real processes: most nodes fall silent at once, nothing is replaced, and all goes on."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from skep.playground.playground import Playground
from tests.support.machines.playground_rig import (
    IDLE,
    IMAGE,
    TestCluster,
    TestNode,
    a_playground,
    containers,
    create,
    nodes_by_name,
    remove_services,
    wait_running,
    wait_until,
)

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]

WORKERS = ("w1", "w2", "w3", "w4")
CUT = WORKERS[:3]
FROZEN = "replacement of tasks is frozen"


@pytest.fixture
def five() -> Iterator[TestCluster]:
    """One manager and four workers."""
    with a_playground("five", managers=1, workers=len(WORKERS)) as cluster:
        yield cluster


def down(m1: TestNode) -> dict[str, str]:
    """Nodes that are down: name -> message."""
    return {
        name: node["Status"].get("Message", "")
        for name, node in nodes_by_name(m1).items()
        if node["Status"]["State"] == "down"
    }


def is_frozen(m1: TestNode) -> bool:
    return any(FROZEN in warning for warning in m1.client().api.info().get("Warnings") or ())


def wanted(m1: TestNode) -> dict[str, str]:
    """Tasks that are to run: id -> node."""
    return {
        task["ID"]: task["NodeID"] for task in m1.client().api.tasks() if task["DesiredState"] == "running"
    }


def pids(cluster: TestCluster) -> dict[str, int]:
    """First processes of all containers by their tasks."""
    found = {}
    for name in WORKERS:
        api = cluster.node(name).client().api
        for container in containers(cluster.node(name), "web"):
            task = container["Labels"]["com.docker.swarm.task.id"]
            found[task] = api.inspect_container(container["Id"])["State"]["Pid"]
    return found


def wait_found_by_all(m1: TestNode) -> None:
    """Until every worker has found the manager again: a task of it runs there."""
    where = ("--constraint", "node.role==worker", "--mode", "global")
    m1.docker("service", "create", "--detach", "--name", "everywhere", *where, IMAGE, *IDLE)
    wait_running(m1, "everywhere", len(WORKERS))
    remove_services(m1)


async def together(cluster: TestCluster, verb: Callable[[Playground, str], Awaitable[None]]) -> None:
    """``cut`` or ``reconnect`` them at one moment; commands would be apart by as long as they take to start."""
    playground = Playground(cluster.directory, cluster.name, lambda _: None)
    await asyncio.gather(*(verb(playground, name) for name in CUT))


def test_three_of_five_nodes_that_are_cut_off_at_once_freeze_replacement_until_they_are_back(
    five: TestCluster,
) -> None:
    m1 = five.node("m1")
    # Who leads anew takes what it finds for what has been so for long; else this would have to last a minute.
    (leader,) = m1.pids("skep-manager")
    m1.kill(leader)
    wait_until(lambda: set(m1.pids("skep-manager")) - {leader}, "another manager process")
    wait_until(lambda: m1.docker("node", "ls", check=False).returncode == 0, "it answers")
    wait_found_by_all(m1)
    create(m1, "web", 8, "--constraint", "node.role==worker", "--restart-delay", "0s")
    wait_running(m1, "web", 8)
    before, tasks = pids(five), wanted(m1)
    assert len(before) == 8

    asyncio.run(together(five, Playground.cut))
    wait_until(lambda: set(down(m1)) == set(CUT), "the three are down", within_s=40)
    wait_until(lambda: is_frozen(m1), "the freeze is shown")
    assert all(FROZEN in message for message in down(m1).values())
    m1.docker("service", "scale", "--detach", "web=9")  # what is new is placed nevertheless
    wait_until(lambda: len(containers(five.node("w4"), "web")) > 2, "one more")
    now = wanted(m1)
    # Two falls are none: the first ones' tasks may be replaced until the third node falls, which is within a second.
    moved = {task: node for task, node in tasks.items() if task not in now}
    assert len(set(moved.values())) < len(CUT)
    assert len(now) == 9
    kept = {task: pid for task, pid in before.items() if task not in moved}

    asyncio.run(together(five, Playground.reconnect))
    wait_until(lambda: not down(m1), "all are back")
    wait_until(lambda: not is_frozen(m1), "the freeze is over")
    wait_running(m1, "web", 9)
    assert now == wanted(m1), "nothing more was replaced, neither in the freeze nor after it"
    assert kept.items() < pids(five).items(), "and these containers never stopped"
