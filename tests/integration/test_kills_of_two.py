"""Any two of a node's processes die at one moment: nothing is lost, nothing moves, and all goes on."""

from pathlib import Path

import pytest

from tests.support.machines.kills import PAIRS, strike, wait_started_again
from tests.support.machines.playground_rig import (
    TestNode,
    container_pids,
    containers,
    create,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(120)


QUICK = (("node", "etcd"), ("manager", "conmon"))
"""Every kind of process once; all six pairs in long runs."""


@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, marks=[] if pair in QUICK else [pytest.mark.slow]) for pair in PAIRS],
    ids="-".join,
)
def test_of_any_two_that_are_killed_together_nothing_is_lost_and_nothing_moves(
    m1: TestNode, pair: tuple[str, str]
) -> None:
    create(m1, "web", 3, "--restart-delay", "0s")
    tasks = {task["ID"] for task in wait_running(m1, "web", 3)}
    before = container_pids(m1, "web")
    struck = strike(m1, *pair)
    wait_started_again(m1, struck)
    wait_until(lambda: m1.docker("service", "ls", check=False).returncode == 0, "the API answers again")
    assert {id: pid for id, pid in before.items() if Path(f"/proc/{pid}").exists()} == before
    assert {task["ID"] for task in wait_running(m1, "web", 3)} == tasks
    assert container_pids(m1, "web") == before
    m1.docker("service", "scale", "--detach", "web=4")  # the whole chain works again
    assert tasks < {task["ID"] for task in wait_running(m1, "web", 4)}
    assert before.items() <= container_pids(m1, "web").items()
    m1.docker("service", "scale", "--detach", "web=0")  # and what was adopted can still be stopped
    wait_until(lambda: not containers(m1, "web"), "the containers are stopped")
